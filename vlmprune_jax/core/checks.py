"""Settings and names given by a user: declared once, checked, with a suggestion for a misspelled name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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


def layer_range(name: str, value: Any, n_layers: int) -> range:
    """Return the layers selected by "all" or by a half-open pair (start, stop) in original numbering."""
    if value == "all":
        return range(n_layers)
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise UserError(f'{name}={value!r} must be "all" or a half-open pair (start, stop)')
    start, stop = value
    if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start <= stop <= n_layers):
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


@dataclass(frozen=True)
class Setting:
    """Declaration of one setting, beside its name and type; see `setting`."""

    default: Any
    sentence: str
    affects: tuple[str, ...]
    unit: str
    choices: Collection[str] | str
    least: float | None
    above: float | None
    below: float | None
    most: float | None
    by_content: bool
    offered: bool

    @property
    def bounds(self) -> str:
        """The allowed range in words, such as `at least 0 and below 1`; empty without bounds."""
        limits = (("at least", self.least), ("above", self.above), ("below", self.below), ("at most", self.most))
        return " and ".join(f"{what} {_limit_text(limit)}" for what, limit in limits if limit is not None)

    def names(self) -> tuple[str, ...]:
        """Return the allowed texts: the declared choices, or the names in their mapping now, and the default."""
        choices = self.choices
        if isinstance(choices, str):
            module, _, name = choices.partition(":")
            source = getattr(importlib.import_module(f"vlmprune_jax.{module}"), name)
            choices = source if isinstance(source, Collection) else source()
        return (self.default, *choices) if choices and self.default not in (None, *choices) else tuple(choices)


def setting(
    default: Any,
    sentence: str,
    *,
    affects: Sequence[str] = (),
    unit: str = "",
    choices: Collection[str] | str = (),
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    by_content: bool = False,
    offered: bool = True,
) -> Any:
    """Declare a dataclass field as a setting; checks, ledger, help and the settings page derive from the declaration.

    Args:
      sentence: what the setting does, shown in help and docs.
      affects: stages whose results the setting changes (`experiment.spec.STAGES`); empty if it may change at any time.
      choices: the allowed texts, or "module:NAME" of a mapping, a tuple or a function that returns one; looked up when
        a command starts, since a user's file may add names.
      least, above, below, most: bounds of a number, or of each number in a tuple; all numbers must be finite.
      by_content: the setting names a file or folder; results depend on its content, not on its name.
      offered: available in configs; False for arguments of the Python library alone.
    """
    declared = Setting(
        default,
        sentence,
        tuple(affects),
        unit,
        choices,
        least,
        above,
        below,
        most,
        by_content=by_content,
        offered=offered,
    )
    metadata = {"setting": declared}
    if isinstance(default, dict):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


def settings_of(section: Any) -> dict[str, Setting]:
    """Return name -> declaration for the settings of a dataclass or an instance, without nested sections."""
    return {f.name: f.metadata["setting"] for f in dataclasses.fields(section) if "setting" in f.metadata}


def check_settings(where: str, section: Any, *, elsewhere: bool = False) -> None:
    """Refuse values out of bounds or not among the choices.

    Args:
      where: name of the section, for messages.
      section: an instance of the dataclass.
      elsewhere: also check choices that are names in a mapping of another module.

    Raises:
      UserError: a value is not allowed; the message names `where.name`.
    """
    for name, about in settings_of(section).items():
        value = getattr(section, name)
        place = f"{where}.{name}"
        if isinstance(value, str) and about.choices and (elsewhere or not isinstance(about.choices, str)):
            one_of(place, value, about.names())
        for number in _numbers(value):
            outside = (
                (not math.isfinite(number) if isinstance(number, float) else abs(number) >= 2**63)
                or (about.least is not None and number < about.least)
                or (about.above is not None and number <= about.above)
                or (about.below is not None and number >= about.below)
                or (about.most is not None and number > about.most)
            )
            if outside:
                raise UserError(f"{place}={value} must be {about.bounds or 'a finite number'}")


def _numbers(value: Any) -> list[float]:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else [value]
    return [item for item in items if isinstance(item, int | float) and not isinstance(item, bool)]


def _limit_text(limit: float) -> str:
    return "2**32" if limit == 2**32 else f"{limit:g}" if isinstance(limit, float) else str(limit)


def file_of_users(function: Any) -> Path | None:
    """Return the source file of a user's function, or None for functions of this package."""
    code = getattr(function, "__code__", None)
    path = Path("" if code is None else code.co_filename)
    return path if path.is_file() and Path(__file__).parents[1] not in path.parents else None
