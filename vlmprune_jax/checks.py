"""Options and names that a user gives: checked, with a suggestion for a typo."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from vlmprune_jax.errors import UserError


def one_of(kind: str, value: Any, known: Collection[str]) -> str:
    """`value`, or a UserError that lists what is known and suggests the nearest."""
    if value in known:
        return value
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{kind} {value!r} is not one of {', '.join(known)}{hint}")


def with_defaults(what: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` overridden by `options`; an unknown name is refused."""
    for name in options:
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{what} has no option {name!r} (options: {', '.join(defaults) or 'none'}){hint}")
    return {**defaults, **options}


def layer_range(name: str, value: Any, n_layers: int) -> range:
    """Layers of "all" or of a half-open (start, stop) in original numbering."""
    if value == "all":
        return range(n_layers)
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise UserError(f'{name}={value!r} must be "all" or a half-open pair (start, stop)')
    start, stop = value
    if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start <= stop <= n_layers):
        raise UserError(f"{name}={value!r} must lie within the {n_layers} layers: 0 <= start <= stop <= {n_layers}")
    return range(start, stop)


def fraction(name: str, value: Any) -> float:
    """A number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{name}={value!r} must be at least 0 and below 1 (0.3 is 30 %)")
    return float(value)


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, or the list of what there is."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f" (there is {', '.join(names)})"
