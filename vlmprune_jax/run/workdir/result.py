"""`result.json`: comparison of all models of a run with the unpruned model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from vlmprune_jax.base.errors import printable
from vlmprune_jax.base.files import Count, Finite, Positive
from vlmprune_jax.base.links import is_inside
from vlmprune_jax.run.workdir.artefact import Artefact, Part, read_artefact
from vlmprune_jax.run.workdir.evaluation import UNPRUNED, Evaluated, Group, MetricInfo, Values
from vlmprune_jax.run.workdir.speed import MedianSpeed

RESULT = "result.json"
NOT_TRAINED = ("none", "reconstructed")  # recoveries without training
WITHOUT = "without recovery"
RECOVERIES = {"sft": "SFT", "sft_l2": "SFT + L2", "sft_kl": "SFT + KL"}  # labels of common names of recoveries
Evaluations = Mapping[str, Evaluated]  # set -> evaluation of one model


class Set(MetricInfo, frozen=True, kw_only=True):
    """Metric and size of an evaluation set."""

    counted: Literal["questions", "tokens"]
    count: Count

    @property
    def size(self) -> str:
        """Size of the evaluation set as text, such as "9,673 questions"."""
        return f"{self.count:,} {self.counted}"


Sets = Mapping[str, Set]


class ModelEvaluation(Part, frozen=True, kw_only=True):
    """A model's metric values by evaluation set, and its retention relative to another model; {} or None if unknown."""

    scores: dict[str, Values]
    groups: dict[str, dict[str, Group]] = {}  # values for groups of questions
    # 100 * value / the unpruned model's value, by set (inverted if lower is better; None for a zero divisor).
    retained: dict[str, float | None] = {}
    retained_interval: dict[str, tuple[float, float]] = {}  # see `Evaluated`
    # Averages over sets whose metric has a full score (perplexity only if no set has a full score) and on which the
    # unpruned model does not score 0: the mean of `retained`, and AVG-% of arXiv 2604.24380, which is 100 * sum of
    # value / full over the same sum of the unpruned model.
    mean_of_ratios: float | None = None
    paper_average: float | None = None
    seconds: float = 0.0
    # The unpruned model after the same training: its scores, and the retention of this model relative to these.
    control: ModelEvaluation | None = None

    def main(self, name: str, sets: Sets) -> float | None:
        """Return the model's main metric value on a set; None if it was not evaluated."""
        return self.scores.get(name, {}).get(sets[name].main)


class Costs(Part, frozen=True, kw_only=True):
    """Costs of a model, computed from its layer shapes."""

    forward_flops: Finite
    kv_bytes_per_token: Count = 0  # 0 if unknown
    file_bytes: Count
    active_parameters: Count | None = None  # parameters that one token uses; None in results of earlier versions


class Workload(Part, frozen=True, kw_only=True):
    """Prompt for which costs are computed: tokens, images and tokens per image, and data type of the cache."""

    length: Count
    images: Count
    dtype: str
    image_tokens: Count = 0


class Model(Part, frozen=True, kw_only=True):
    """Entry of an unpruned model in `result.json` and `sweep.json`, and what all entries have."""

    image_tokens: Count | None = None  # in a sweep, setting `data.max_image_tokens` of the evaluation
    parameters: Positive  # number of parameters that a forward pass uses
    # Of an unpruned model, all other parameters in the checkpoint, such as tower layers after the feature layer.
    passthrough: Count = 0
    evaluation: ModelEvaluation
    costs: Costs | None = None
    speed: MedianSpeed | None = None


class Run(Model, frozen=True, kw_only=True):
    """Entry of a model that was pruned (unless `method` is "none") or trained: how it was made."""

    name: str
    model: str = ""  # in a sweep, the unpruned model's folder
    method: str = "none"
    criterion: str = "none"
    target_ratio: Finite | None = None  # share of the whole model's parameters to remove
    actual_ratio: Finite = 0.0  # share that was removed
    decoder_ratio: Finite | None = None  # removed share of the decoder's parameters
    removed_layers: list[Count] = []
    reconstruct: str = "none"
    recovery: str  # name of the recovery ("none" without training)
    data_fraction: Finite = 0.0
    training_records: Count | None = None
    training_steps: Count | None = None
    loss_terms: dict[str, str] = {}  # {loss in `metrics`: title}
    seconds: float | None  # time of scoring, pruning and training
    plan: str = ""  # "" if nothing was pruned
    scores: list[str] = []  # importance files
    metrics: str | None = None  # file of training metrics
    path: str  # the model's folder
    digest: str = ""  # hash of that folder, in a sweep

    @property
    def unpruned(self) -> str:
        """Name (key in `SweepResult.unpruned`) of the unpruned model with which a sweep compares this model."""
        return unpruned_key(self.model, self.image_tokens)

    @property
    def after_pruning(self) -> str:
        """Recovery in words, such as "reconstructed + SFT" or "without recovery"."""
        repaired = self.recovery == "reconstructed" or (self.recovery != "none" and self.reconstruct != "none")
        return recovery_label(self.recovery, reconstructed=repaired)

    @property
    def label(self) -> str:
        """Readable name of the model, such as "width 30 %, reconstructed + SFT"."""
        ratio = self.actual_ratio if self.target_ratio is None else self.target_ratio
        after = "" if self.after_pruning == WITHOUT else f", {self.after_pruning}"
        return f"{UNPRUNED if self.method == 'none' else f'{self.method} {100 * ratio:.3g} %'}{after}"


class Export(Part, frozen=True, kw_only=True):
    """Result of checking the exported folder: largest logit difference after reloading, and tolerance.

    `moved_by_rounding`: largest logit difference between the quantised and the unquantised model.
    """

    path: str
    backend: str
    max_abs_logit_difference: float
    tolerance: float
    moved_by_rounding: float | None = None
    seconds: float


class Result(Artefact, frozen=True, kw_only=True, tag=2):
    """File `result.json`: all models of a run; `best` names the run that is exported.

    `controls`: unpruned models after the same training as pruned ones. `made_from`: in a sweep, a hash of the run's
    settings and inputs.
    """

    HINT: ClassVar[str] = "run `vlmprune run` again, or restore the file"
    MAX_BYTES: ClassVar[int] = 2**25  # thousands of models
    sets: Annotated[dict[str, Set], Meta(min_length=1, max_length=1000)]
    teacher: Model
    runs: Annotated[list[Run], Meta(min_length=1, max_length=10_000)]
    controls: Annotated[list[Run], Meta(max_length=10_000)] = []
    best: str
    export: Export | None = None
    workload: Workload | None = None
    made_from: str = ""

    def problems(self, folder: Path) -> str | None:
        """Return an error message for an unknown name or a path outside the workdir; None if there is none."""
        if all(run.name != self.best for run in self.runs):
            return f"its best run {self.best!r} is not among its runs"
        for name, model in self.models:
            missing = [key for key in self.sets if model.evaluation.main(key, self.sets) is None]
            unknown = [key for key in model.evaluation.groups if key not in self.sets]
            if missing or unknown:
                return f"{name}: set {(missing + unknown)[0]!r} has no score of this model, or is not listed in sets"
        named = [path for entry in self.entries for path in (entry.plan, *entry.scores, entry.path, entry.metrics)]
        named += [] if self.export is None else [self.export.path]
        for path in dict.fromkeys(filter(None, named)):
            if not is_inside(folder / path, folder):
                return f"{path!r} lies outside the workdir"
        return None

    @property
    def entries(self) -> list[Run]:
        """Entries of all controls and pruned models."""
        return [*self.controls, *self.runs]

    @property
    def models(self) -> list[tuple[str, Model]]:
        """Entries of all models by name, including the unpruned one."""
        return [(UNPRUNED, self.teacher), *((entry.name, entry) for entry in self.entries)]

    @property
    def labels(self) -> dict[str, str]:
        """Readable names of all models by name, made unique."""
        return {UNPRUNED: UNPRUNED, **unique_titles({entry.name: entry.label for entry in self.entries})}

    def distinct(self) -> Result:
        """Return the result without duplicate models, such as one pruned model before several recoveries."""
        shown: dict[object, Run] = {}
        for run in sorted(self.runs, key=lambda run: run.name != self.best):
            evaluation = repr(msgspec.structs.replace(run.evaluation, seconds=0.0))
            key = (run.label, run.criterion, run.parameters, tuple(run.removed_layers), run.data_fraction, evaluation)
            shown.setdefault(key, run)
        return msgspec.structs.replace(self, runs=[run for run in self.runs if run in shown.values()])

    @property
    def best_run(self) -> Run:
        """Entry of the run named in `best`."""
        return next(run for run in self.runs if run.name == self.best)


def unique_titles(titles: Mapping[str, str]) -> dict[str, str]:
    """Return printable titles by name; a title that several models share is followed by the name."""
    counts = Counter(titles.values())
    return {name: printable(title + ("" if counts[title] == 1 else f" ({name})")) for name, title in titles.items()}


def unpruned_key(model: str, image_tokens: int | None) -> str:
    """Return the name of an unpruned model in a sweep: its folder, and the limit of tokens per image (if any)."""
    return model if image_tokens is None else f"{model} at {image_tokens} tokens per image"


def recovery_label(recovery: str, *, reconstructed: bool) -> str:
    """Return a recovery in words, such as "reconstructed + SFT"."""
    trained = RECOVERIES.get(recovery, recovery) if recovery not in NOT_TRAINED else ""
    return " + ".join(filter(None, ("reconstructed" if reconstructed else "", trained))) or WITHOUT


def read_result(workdir: Path) -> Result:
    """Read and check the file `result.json` of a workdir.

    Raises UserError if the file cannot be read (see `read_artefact`), or has a path outside the workdir.
    """
    return read_artefact(workdir / RESULT, Result, missing="no such file: run `vlmprune run` first")
