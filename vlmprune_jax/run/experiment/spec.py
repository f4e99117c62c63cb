"""Class of an experiment: all sections of settings, as configs and overrides set them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmprune_jax.base.settings import STAGES, setting, settings_of
from vlmprune_jax.core.prune.config import PlanConfig, ScoreConfig
from vlmprune_jax.core.prune.reconstruct_config import ReconstructConfig
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.core.sections import MeshSpec, ModelSpec
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.exports.formats import ExportSpec
from vlmprune_jax.run.evaluation.config import EvaluateSpec
from vlmprune_jax.run.evaluation.speed.clock import SpeedConfig


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
