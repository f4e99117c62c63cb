"""The declarations of all settings, for `vlmprune help NAME` and the settings page of the docs."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.settings import Setting, hints_of, settings_of
from vlmprune_jax.experiment.spec import Experiment


@dataclass(frozen=True)
class Option:
    """One setting: its place in a config, its type, and what is declared of it."""

    name: str
    kind: str
    about: Setting

    @property
    def section(self) -> str:
        """Where it is, `recover.losses`."""
        return self.name.rpartition(".")[0]

    @property
    def values(self) -> str:
        """What it may be: choices or bounds."""
        return ", ".join(self.about.names()) or self.about.bounds

    @property
    def changes(self) -> str:
        """The stages that it changes."""
        content = " (by what is there)" if self.about.by_content and self.about.affects else ""
        return ", ".join(self.about.affects) + content


def sections() -> dict[str, Any]:
    """Every section of a config by its place; that of any evaluation set is `evaluate.sets.NAME`."""
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
    """Every setting of a config, in order."""
    return [
        Option(f"{place}.{name}", _kind(hint), settings_of(section)[name])
        for place, section in sections().items()
        for name, hint in hints_of(section).items()
        if name in settings_of(section)
    ]


def _kind(hint: Any) -> str:
    """`int or None`, `tuple of int`."""
    if isinstance(hint, types.UnionType):
        return " or ".join(_kind(one) for one in typing.get_args(hint))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"tuple of {_kind(args[0])}" if args[-1] is ... else "(" + ", ".join(map(_kind, args)) + ")"
    if origin is not None:
        return f"mapping of names to {_kind(args[1])}"
    return {type(None): "None", Any: "values"}.get(hint) or hint.__name__


def find(name: str) -> list[Option]:
    """The settings that a name means: a whole one or all of a section, or the end or a part of one (`kl`, `lora`).

    Raises:
      UserError: there is none, with the nearest that exists.
    """
    known = options()
    found = [one for one in known if f"{one.name}.".startswith(f"{name}.")]
    found = found or [one for one in known if one.name.endswith(f".{name}")]
    found = found or [one for one in known if f".{name}." in one.name]
    if not found:
        names = {part for one in known for part in (one.name, *one.name.split("."))}
        near = difflib.get_close_matches(name, sorted(names), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f" (sections are {', '.join(sections())})"
        raise UserError(f"no setting {name!r}{hint}")
    return found


def as_lines(option: Option) -> list[str]:
    """A setting for the command line."""
    about = option.about
    facts = [option.kind, about.unit, option.values]
    return [
        f"{option.name} = {about.default!r}   ({'; '.join(fact for fact in facts if fact)})",
        f"  {about.sentence}",
        f"  changes: {option.changes or 'nothing'}",
    ]
