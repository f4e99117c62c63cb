"""The declarations of all settings, for `vlmprune help NAME` and the settings page of the docs."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import Setting, hints_of, settings_of
from vlmprune_jax.run.experiment.spec import Experiment


@dataclass(frozen=True)
class Option:
    """One setting of a config: full name, type and declaration."""

    name: str
    kind: str
    about: Setting
    default: Any

    @property
    def section(self) -> str:
        """Name of the config section that contains the setting, such as `recover.losses`."""
        return self.name.rpartition(".")[0]

    @property
    def allowed(self) -> str:
        """Type, unit and allowed values of the setting, as text."""
        unit = f" ({self.about.unit})" if self.about.unit else ""
        choices = f"one of {', '.join(self.about.names())}" if self.about.choices else ""
        return ", ".join(part for part in (f"{self.kind}{unit}", choices or self.about.bounds) if part)


def sections() -> dict[str, Any]:
    """Return {section name: dataclass} of a config; `evaluate.sets.NAME` stands for any evaluation set."""
    return dict(_sections(Experiment(), ""))


def _sections(spec: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, hint in hints_of(spec).items():
        value, place = getattr(spec, name), f"{prefix}{name}"
        if isinstance(value, Mapping) and dataclasses.is_dataclass(kind := typing.get_args(hint)[1]):
            value, place = kind(), f"{place}.NAME"  # type: ignore[operator]
        if dataclasses.is_dataclass(value):
            yield place, value
            yield from _sections(value, f"{place}.")


def options() -> list[Option]:
    """Return all settings of a config in order, variants last."""
    return [
        Option(f"{place}.{name}".lstrip("."), _kind(hint), settings_of(section)[name], getattr(section, name))
        for place, section in (*sections().items(), ("", Experiment()))
        for name, hint in hints_of(section).items()
        if name in settings_of(section)
    ]


def _kind(hint: Any) -> str:
    """Return a type in words, such as `whole number or None` or `tuple of texts`."""
    if isinstance(hint, types.UnionType):
        return " or ".join(filter(None, map(_kind, typing.get_args(hint))))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"tuple of {_kind(args[0])}s" if args[-1] is ... else "(" + ", ".join(map(_kind, args)) + ")"
    if origin is not None:
        return "mapping by name"
    plain = {bool: "True or False", int: "whole number", float: "number", str: "text", type(None): "None"}
    return plain.get(hint, "")  # objects that only Python functions take have no name here


def describe(name: str) -> list[str]:
    """Return the lines that `vlmprune help NAME` prints: descriptions of sections and their settings.

    `name`: full name of a section or setting (`recover.losses.kl`), or the last parts of a name (`losses.kl`, `kl`).
    """
    known, places = options(), [place.removesuffix(".NAME") for place in sections()]
    whole = [place for place in places if place == name or place.endswith(f".{name}")]
    matches = [option for option in known if option.name == name]
    if not matches and not whole:
        matches = [option for option in known if option.name.endswith(f".{name}")]
    for place in whole:
        matches += [option for option in known if option.name.startswith(f"{place}.")]
    if not matches:
        names = {part for option in known for part in (option.name, *option.name.split("."))}
        near = difflib.get_close_matches(name, sorted(names), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f" (sections: {', '.join(places)})"
        raise UserError(f"no setting {name!r}{hint}")
    docs = {place.removesuffix(".NAME"): section.__doc__ or "" for place, section in sections().items()}
    lines = []
    for place in whole:
        lines += [f"section {place}: {' '.join(docs[place].split())}", ""]
    for option in matches:
        lines += [
            f"{option.name} = {option.default!r}",
            f"  {option.about.sentence}",
            f"  {option.allowed}",
            f"  stages that run again after a change: {', '.join(option.about.affects) or 'none'}",
        ]
    return lines
