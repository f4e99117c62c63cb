"""All sections of settings of an experiment, and their declarations for `vlmprune help NAME` and the docs."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import STAGES, Setting, hints_of, setting, settings_of
from vlmprune_jax.core.prune.config import PlanConfig, ScoreConfig
from vlmprune_jax.core.prune.reconstruct_config import ReconstructConfig
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.core.sections import MeshSpec, ModelSpec
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.exports.formats import ExportSpec
from vlmprune_jax.run.evaluation.config import EvaluateSpec, SpeedConfig


@dataclass(frozen=True)
class Experiment:
    """All settings of an experiment: one pruned, recovered, evaluated and exported model, or several as variants.

    Each variant has a subfolder with its name. Without variants, there is one model, in the workdir itself.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSpec = field(default_factory=DataSpec)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    prune: PlanConfig = field(default_factory=PlanConfig)
    reconstruct: ReconstructConfig = field(default_factory=lambda: ReconstructConfig(method="none"))
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    export: ExportSpec = field(default_factory=ExportSpec)
    speed: SpeedConfig = field(default_factory=lambda: SpeedConfig(rounds=0))
    mesh: MeshSpec = field(default_factory=MeshSpec)
    prune_variants: Mapping[str, Mapping[str, Any]] = setting(
        {},
        "Ways to prune, by name: each is a partial config whose settings replace those of the config, for example "
        '{"depth": {"prune": {"method": "depth"}}}. Every prune variant is combined with every recover variant.',
    )
    recover_variants: Mapping[str, Mapping[str, Any]] = setting(
        {},
        "Ways to recover each pruned model, by name: each is a partial config whose settings replace those of the "
        'config, for example {"sft": {"recover": {"losses": {"ce": 1.0}}}}.',
    )

    @property
    def sections(self) -> dict[str, Any]:
        """Sections of settings of the experiment, by name, such as "prune"."""
        return {name: value for name, value in vars(self).items() if dataclasses.is_dataclass(value)}


def affecting(stage: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return {`section.name`: value} of the settings in these sections that change a stage's result.

    Sections inside a section are mappings. Files and folders are left out, because their content is an input of the
    stage; empty mappings are left out as well. A user-defined stage depends on all settings that change any result.
    """
    by_section = {section: _affecting(stage, spec) for section, spec in sections.items()}
    return {f"{section}.{name}": value for section, values in by_section.items() for name, value in values.items()}


def _affecting(stage: str, spec: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, about in settings_of(spec).items():
        value, stages = getattr(spec, name), about.affects if stage in STAGES else (stage,) * bool(about.affects)
        if stage in stages and about.offered and not about.by_content and value != {}:
            values[name] = value
    inner = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    subsections = {name: _affecting(stage, value) for name, value in inner.items() if dataclasses.is_dataclass(value)}
    return values | {name: part for name, part in subsections.items() if part}


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


def sections(of: Any = Experiment(), prefix: str = "") -> dict[str, Any]:
    """Return {section name: dataclass} of a config; `evaluate.sets.NAME` stands for any evaluation set."""
    known: dict[str, Any] = {}
    for name, hint in hints_of(of).items():
        value, place = getattr(of, name), f"{prefix}{name}"
        if isinstance(value, Mapping) and dataclasses.is_dataclass(kind := typing.get_args(hint)[1]):
            value, place = kind(), f"{place}.NAME"  # type: ignore[operator]
        if dataclasses.is_dataclass(value):
            known |= {place: value, **sections(value, f"{place}.")}
    return known


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
    known, places = options(), {place.removesuffix(".NAME"): section for place, section in sections().items()}
    whole = [place for place in places if place == name or place.endswith(f".{name}")]
    inside = tuple(f"{place}." for place in whole)
    matches = [option for option in known if option.name == name or option.name.startswith(inside)]
    matches = matches or [option for option in known if option.name.endswith(f".{name}")]
    if not matches:
        names = {part for option in known for part in (option.name, *option.name.split("."))}
        near = difflib.get_close_matches(name, sorted(names), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f" (sections: {', '.join(places)})"
        raise UserError(f"no setting {name!r}{hint}")
    lines = []
    for place in whole:
        lines += [f"section {place}: {' '.join(str(places[place].__doc__).split())}", ""]
    for option in matches:
        lines += [
            f"{option.name} = {option.default!r}",
            f"  {option.about.sentence}",
            f"  {option.allowed}",
            f"  stages that run again after a change: {', '.join(option.about.affects) or 'none'}",
        ]
    return lines
