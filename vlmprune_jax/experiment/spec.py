"""An experiment: one section of settings per room, as configs and overrides fill them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vlmprune_jax.core.sections import MeshSpec, ModelSpec
from vlmprune_jax.core.settings import (
    MAX_ROWS,
    STAGES,
    prune_setting,
    reconstruct_setting,
    recover_setting,
    score_setting,
    setting,
    settings_of,
    speed_setting,
)
from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.evaluation.config import EvaluateSpec
from vlmprune_jax.evaluation.speed.clock import SpeedConfig
from vlmprune_jax.export.config import ExportSpec
from vlmprune_jax.prune.config import PlanConfig, ReconstructConfig, ScoreConfig
from vlmprune_jax.recovery.config import RecoverConfig

RECONSTRUCTIONS = ("none", "least_squares", "layerwise")
RECOVERIES = ("train", "none")


@dataclass(frozen=True)
class ScoreSpec(ScoreConfig):
    """Settings of the importance scores of layers, heads and neurons, computed on calibration records."""

    SECTION: ClassVar[str] = "score"

    depth: str = score_setting(
        "block_influence",
        'Criterion that scores layers, for methods "depth" and "hybrid".',
        choices="prune.criteria:CRITERIA",
    )
    width: str = score_setting(
        "taylor",
        'Criterion that scores heads, neurons or experts, for methods "width", "hybrid" and "experts".',
        choices="prune.criteria:CRITERIA",
    )
    samples: int = score_setting(50, "Number of calibration records for scoring.", unit="records", least=1)
    batch_size: int = score_setting(1, "Number of calibration records per batch.", unit="rows", least=1, most=MAX_ROWS)
    longest_text: int | None = score_setting(
        None,
        "Maximum length of calibration records, with 1 token per image; longer ones are not drawn (None = any).",
        unit="tokens",
        least=1,
    )


@dataclass(frozen=True)
class PruneSpec(PlanConfig):
    """Settings of pruning, such as the method, the amount to remove, and the parts of the model to prune."""

    stack: str = prune_setting(
        "text",
        'Part of the model to prune: decoder ("text"), vision tower ("vision"), or both with the same share removed.',
        choices=("text", "vision", "both"),
    )
    steps: int = prune_setting(
        1, "Number of rounds of width pruning; scores are computed again before each round.", unit="rounds", least=1
    )


@dataclass(frozen=True)
class ReconstructSpec(ReconstructConfig):
    """Settings of reconstruction, the least-squares repair of pruned weights before any training."""

    SECTION: ClassVar[str] = "reconstruct"

    method: str = reconstruct_setting(
        "none",
        'Repair of the pruned weights: none ("none"), least squares ("least_squares"), or least squares and then '
        "training of each layer alone to match the unpruned model's hidden states "
        '("layerwise", for plans that remove layers).',
        choices=RECONSTRUCTIONS,
    )
    samples: int = reconstruct_setting(512, "Number of calibration records for the fit.", unit="records", least=2)
    batch_size: int = reconstruct_setting(
        8, "Number of calibration records per batch.", unit="rows", least=1, most=MAX_ROWS
    )
    longest_text: int | None = reconstruct_setting(
        None,
        "Maximum length of calibration records, with 1 token per image; longer ones are not drawn (None = any).",
        unit="tokens",
        least=1,
    )
    seed: int = reconstruct_setting(42, "Random seed for drawing the calibration records.", least=0, below=2**32)


@dataclass(frozen=True)
class RecoverSpec(RecoverConfig):
    """Settings of recovery, the training after pruning (recipe "llava" has the paper's settings)."""

    method: str = setting(
        "train",
        '"train" trains the pruned model (after its reconstruction, if there is one); "none" leaves it untrained.',
        choices=RECOVERIES,
    )
    name: str = setting("recovered", "Name of this recovery setup in tables and reports.")
    control: bool = setting(
        True,
        "If the loss uses labels, also train the unpruned model in the same way, and report retention relative to "
        "this control, which excludes gains from training on the task. Costs one more training, shared by all prune "
        "variants and all runs of a sweep.",
    )
    save_adapter: bool = recover_setting(
        False,
        "Also write the LoRA adapters in the format of `peft`, as adapter/, for use with pruned/ (recovered/ has them "
        "merged).",
    )
    teacher_cache: str | None = setting(
        None,
        "Folder for a cache of the teacher's top-k logits at all positions in the loss; vlmprune computes missing "
        "logits, then trains without the teacher. Several runs may share the folder. Needs "
        '`losses.teacher_inputs="own"`, and no loss `l2` or `cosine`.',
    )
    teacher_top_k: int = setting(
        64,
        "Number of logits per position that `teacher_cache` stores.",
        affects=("recover", "teacher_cache"),
        unit="tokens",
        least=1,
    )


@dataclass(frozen=True)
class SpeedSpec(SpeedConfig):
    """Settings of the speed measurement, in which unpruned and pruned models take turns on this machine.

    The report's FLOPs are for the same prompt.
    """

    rounds: int = speed_setting(
        0, "Number of speed measurements of each model (0 = do not measure speed).", least=0, most=1000
    )


@dataclass(frozen=True)
class Experiment:
    """All settings of an experiment: one pruned, recovered, evaluated and exported model, or several as variants.

    Each variant works in a folder of its name. Without variants there is one model, in the workdir itself.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSpec = field(default_factory=DataSpec)
    score: ScoreSpec = field(default_factory=ScoreSpec)
    prune: PruneSpec = field(default_factory=PruneSpec)
    reconstruct: ReconstructSpec = field(default_factory=ReconstructSpec)
    recover: RecoverSpec = field(default_factory=RecoverSpec)
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    export: ExportSpec = field(default_factory=ExportSpec)
    speed: SpeedSpec = field(default_factory=SpeedSpec)
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
        """Sections of the config, by name."""
        return {name: value for name, value in vars(self).items() if dataclasses.is_dataclass(value)}


def affecting(stage: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return {`section.name`: value} of the settings in these sections that change a stage's result.

    Sections in a section are mappings. Files and folders are left out: their content counts, as the stage's inputs; so
    are empty mappings. A stage of the user's own depends on every setting that changes any result.
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
