"""Checks of names and numbers given by a user, with a suggestion for a misspelled name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmprune_jax.core.errors import UserError


def one_of(kind: str, value: Any, known: Collection[str]) -> str:
    """Return `value` if it is a known name; otherwise raise a UserError that suggests the nearest name."""
    if value in known:
        return value
    raise UserError(f"{kind} {value!r} is not one of {', '.join(known)}{_near(str(value), known)}")


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def with_defaults(what: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return `defaults` overridden by `options`; raise a UserError for an unknown name."""
    for name in options:
        if name not in defaults:
            options_text = ", ".join(defaults) or "none"
            raise UserError(f"{what} has no option {name!r} (options: {options_text}){_near(name, defaults)}")
    return {**defaults, **options}


def layer_range(name: str, value: Sequence[int], n_layers: int) -> range:
    """Return the layers of a half-open range (start, stop) in original numbering; () means all layers."""
    if not value:
        return range(n_layers)
    if len(value) != 2:
        raise UserError(f"{name}={value!r} must be a half-open pair (start, stop), or () for all layers")
    start, stop = value
    if not 0 <= start <= stop <= n_layers:
        raise UserError(f"{name}={value!r} must lie within the {n_layers} layers: 0 <= start <= stop <= {n_layers}")
    return range(start, stop)


def fraction(name: str, value: Any) -> float:
    """Return `value` as a float in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{name}={value!r} must be at least 0 and below 1 (0.3 is 30 %)")
    return float(value)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known name, or else a list of the known names."""
    names = list(known)
    return _near(name, names) or f" (known: {', '.join(names)})"


def file_of_users(function: Any) -> Path | None:
    """Return the source file of a user's function, or None for functions of this package."""
    code = getattr(function, "__code__", None)
    path = Path("" if code is None else code.co_filename)
    return path if path.is_file() and Path(__file__).parents[1] not in path.parents else None
