"""Settings: dataclass fields with a default, a sentence, bounds and choices, checked and overridden by name."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from vlmprune_jax.base.checks import one_of, suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.links import is_path

# What a setting may affect: the stages with results of their own, and the cache of the teacher's logits.
STAGES = ("score", "prune", "reconstruct", "recover", "evaluate", "export", "speed", "teacher_cache")
MAX_ROWS = 8192  # maximum size of any batch: above what trains well, and few enough to list and pad
FRACTION = "fraction"  # the unit of a share of something, 0 to 1
_TYPES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a tuple",
    Mapping: "a mapping",
    type(None): "None",
}


@dataclass(frozen=True)
class Setting:
    """Declaration of one setting (default, help text, bounds, choices); checks and docs are derived from it.

    Attributes:
      sentence: what the setting does, shown in help and docs.
      affects: stages whose results the setting changes (see `STAGES`); empty if it may change at any time.
      choices: the allowed strings; a mapping, or a function that returns a mapping, is looked up when a command starts,
        because a user's file may add names.
      least, above, below, most: bounds of a number, or of each number in a tuple; all numbers must be finite.
      by_content: the setting names a file or folder; results depend on its content, not on its name.
      offered: True if available in configs; False for arguments of Python functions only.
    """

    default: Any
    sentence: str
    _: KW_ONLY
    affects: tuple[str, ...] = ()
    unit: str = ""
    choices: Collection[str] | Callable[[], Collection[str]] = ()
    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None
    by_content: bool = False
    offered: bool = True

    @property
    def bounds(self) -> str:
        """Allowed range of the setting as text, such as `at least 0 and below 1`; "" without bounds."""
        limits = (("at least", self.least), ("above", self.above), ("below", self.below), ("at most", self.most))
        return " and ".join(f"{what} {_limit_text(limit)}" for what, limit in limits if limit is not None)

    def names(self) -> tuple[str, ...]:
        """Return the allowed string values: the default and the choices, which may be the names in a registry."""
        choices = self.choices() if callable(self.choices) else self.choices
        alone = choices and isinstance(self.default, str) and self.default not in choices
        return (self.default, *choices) if alone else tuple(choices)


def setting(default: Any, sentence: str, **declared: Any) -> Any:
    """Declare a dataclass field as a setting; keyword arguments are the attributes of `Setting`."""
    metadata = {"setting": Setting(default, sentence, **declared)}
    if isinstance(default, dict):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


# Settings that change the results of one stage.
score_setting, prune_setting, reconstruct_setting, recover_setting, evaluate_setting, export_setting, speed_setting = (
    functools.partial(setting, affects=(stage,)) for stage in STAGES[:-1]
)


def settings_of(section: Any) -> dict[str, Setting]:
    """Return {name: `Setting`} of a dataclass or instance, without the settings of nested sections."""
    return {f.name: f.metadata["setting"] for f in dataclasses.fields(section) if "setting" in f.metadata}


def check_settings(location: str, section: Any, *, elsewhere: bool = False) -> None:
    """Raise UserError if a setting's value is out of bounds or not one of its choices.

    Args:
      location: name of the section, for messages.
      section: an instance of the section's dataclass.
      elsewhere: also check choices to which a user's file may add names.
    """
    for name, about in settings_of(section).items():
        value = getattr(section, name)
        place = f"{location}.{name}"
        if about.choices and (elsewhere or isinstance(about.choices, tuple)):
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, str):
                    one_of(place, item, about.names())
        for number in _numbers(value):
            outside = (
                (not math.isfinite(number) if isinstance(number, float) else abs(number) >= 2**63)
                or (about.least is not None and number < about.least)
                or (about.above is not None and number <= about.above)
                or (about.below is not None and number >= about.below)
                or (about.most is not None and number > about.most)
            )
            if outside:
                hint = " (0.3 is 30 %)" if about.unit == FRACTION else ""
                raise UserError(f"{place}={value} must be {about.bounds or 'a finite number'}{hint}")


def _numbers(value: Any) -> list[float]:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else [value]
    return [item for item in items if isinstance(item, int | float) and not isinstance(item, bool)]


def _limit_text(limit: float) -> str:
    return "2**32" if limit == 2**32 else f"{limit:g}" if isinstance(limit, float) else str(limit)


def hints_of(spec: Any, *, offered: bool = True) -> dict[str, Any]:
    """Return {setting name: type} of a dataclass; `offered=True` omits settings that config files cannot set."""
    hints = typing.get_type_hints(spec if isinstance(spec, type) else type(spec))
    library_only = {name for name, about in settings_of(spec).items() if not about.offered} if offered else ()
    return {f.name: hints[f.name] for f in dataclasses.fields(spec) if f.name not in library_only}


def override(spec: Any, values: Mapping[str, Any], location: str = "config", *, offered: bool = True) -> Any:
    """Return a copy of a settings dataclass with the values of a nested mapping assigned.

    `offered`: accept only settings that configs may contain; False for the keyword arguments of a Python function.
    Raises UserError for an unknown name (the message suggests the most similar one) or a value of the wrong type.
    """
    hints = hints_of(spec, offered=offered)
    changes = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{location} has no setting {name!r}{suggest(name, hints)}")
        current, place = getattr(spec, name), f"{location}.{name}"
        if dataclasses.is_dataclass(current):
            changes[name] = _section(current, value, place, offered=offered)
        else:
            changes[name] = _checked(value, hints[name], place)
    return dataclasses.replace(spec, **changes)


def nested(spec: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert {"a.b.c": value} to the nested mapping {"a": {"b": {"c": value}}} that `override` takes.

    Raises UserError for a setting that a mapping in `values` also sets; `override` refuses unknown names.
    """
    tree: dict[str, Any] = {}
    for name, value in values.items():
        at, current, (*section_names, last) = tree, spec, name.split(".")
        for part in section_names:
            current = current.get(part) if isinstance(current, Mapping) else getattr(current, part, None)
            at = at.setdefault(part, dict(current) if isinstance(current, Mapping) else {})
            if not isinstance(at, dict):
                raise UserError(
                    f"config.{name}: config.{'.'.join(section_names)} is set as well: sweep over only one of the two"
                )
        at[last] = value
    return tree


def _section(current: Any, value: Any, location: str, *, offered: bool = True) -> Any:
    """Return a nested section: `value` if it is an instance, else `current` with the settings in mapping `value`."""
    if isinstance(value, type(current)):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{location}={value!r}: is a section of settings: set each of its settings by name")
    return override(current, value, location, offered=offered)


def _checked(value: Any, kind: Any, location: str) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    for option in options:
        plain = typing.get_origin(option) or option
        if option is Any:
            return value
        if plain is tuple and isinstance(value, Sequence) and not isinstance(value, str):
            first, *rest = typing.get_args(option)
            kinds = [first] * len(value) if rest[-1:] == [...] else [first, *rest]
            if len(kinds) == len(value):
                items = enumerate(zip(value, kinds, strict=True))
                return tuple(_checked(item, inner, f"{location}[{i}]") for i, (item, inner) in items)
        if plain is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
            # an int that no float can hold is infinite, which bounds refuse
            return float(value) if not isinstance(value, int) or abs(value) < 2**1023 else math.inf
        if plain is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
        if plain is Mapping and isinstance(value, Mapping):
            inner = typing.get_args(option)[1]
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                return {key: _section(inner(), item, f"{location}.{key}") for key, item in value.items()}
            return {key: _checked(item, inner, f"{location}.{key}") for key, item in value.items()}
        if isinstance(plain, type) and isinstance(value, plain) and (plain is bool or not isinstance(value, bool)):
            if isinstance(value, str) and not is_path(value):
                raise UserError(f"{location}={value!r} contains a NUL character or half of a surrogate pair: remove it")
            return value
    names = [_TYPES.get(typing.get_origin(option) or option) or option.__name__ for option in options]
    raise UserError(f"{location}={value!r} must be {' or '.join(names)}")
