"""Options and names that a user gives: declared as settings, and checked, with a suggestion for a typo."""

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


@dataclass(frozen=True)
class Setting:
    """What is known of a setting beside its type and default; see `setting`."""

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
        """`at least 0 and below 1`; "" where any number is."""
        limits = (("at least", self.least), ("above", self.above), ("below", self.below), ("at most", self.most))
        return " and ".join(f"{what} {_number(limit)}" for what, limit in limits if limit is not None)

    def names(self) -> tuple[str, ...]:
        """The choices: those declared, or the names in what is elsewhere now (see `setting`); and the default."""
        found = self.choices
        if isinstance(found, str):
            module, _, name = found.partition(":")
            there = getattr(importlib.import_module(f"vlmprune_jax.{module}"), name)
            found = there if isinstance(there, Collection) else there()
        return (self.default, *found) if found and self.default not in (None, *found) else tuple(found)


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
      sentence: what it does, for people.
      affects: stages whose results it changes (`experiment.spec.STAGES`); none for what may be changed at any time.
      choices: the texts it may be, or "module:NAME" of a mapping or tuple of them, or a function that gives one, looked
        up when a command starts: a user's file may have added to it.
      least, above, below, most: bounds of a number, or of each in a tuple; numbers are finite in any case.
      by_content: it names a file or folder, whose content counts and not its name.
      offered: a config has it; False for arguments of the Python library alone.
    """
    about = Setting(
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
    metadata = {"setting": about}
    if isinstance(default, dict):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


def settings_of(section: Any) -> dict[str, Setting]:
    """Name -> what is declared of it, for a dataclass or an instance of one; sections within it are not among them."""
    return {f.name: f.metadata["setting"] for f in dataclasses.fields(section) if "setting" in f.metadata}


def check_settings(where: str, section: Any, *, elsewhere: bool = False) -> None:
    """Refuse values out of bounds or not among the choices; `elsewhere`: also choices that are names in a mapping.

    Raises:
      UserError: `where.name=value` and what it must be.
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


def _number(limit: float) -> str:
    return "2**32" if limit == 2**32 else f"{limit:g}" if isinstance(limit, float) else str(limit)


def file_of_users(function: Any) -> Path | None:
    """The file of a function that is not this package's own: what it gives changes with that file."""
    code = getattr(function, "__code__", None)
    path = Path("" if code is None else code.co_filename)
    return path if path.is_file() and Path(__file__).parents[1] not in path.parents else None
