"""`result.json`: all models of a run beside the unpruned one; what is computed of them to compare them."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta

from vlmprune_jax.core.errors import UserError, printable
from vlmprune_jax.core.files import Count, Finite
from vlmprune_jax.evaluation.averages import mean_of_ratios, paper_average, retained
from vlmprune_jax.evaluation.metrics.texts import BITS
from vlmprune_jax.workdir.artefact import Artefact, Part, read_artefact
from vlmprune_jax.workdir.evaluation import UNPRUNED, Evaluated, Group, MetricInfo, Values
from vlmprune_jax.workdir.speed import MedianSpeed

RESULT = "result.json"
NOT_TRAINED = ("none", "reconstructed")  # recoveries without training
WITHOUT = "without recovery"
RECOVERIES = {"sft": "SFT", "sft_l2": "SFT + L2", "sft_kl": "SFT + KL"}  # labels of common names of recoveries
MOST_GROUPS = 40  # of a set; more stay in eval/*.json
Evaluations = Mapping[str, Evaluated]  # of one model, by set


class Set(MetricInfo, frozen=True, kw_only=True):
    """Metric and size of one evaluation set."""

    counted: Literal["questions", "tokens"]
    count: Count

    @property
    def size(self) -> str:
        """Size of the set as text, such as "9,673 questions"."""
        return f"{self.count:,} {self.counted}"


Sets = Mapping[str, Set]


class ModelEvaluation(Part, frozen=True, kw_only=True):
    """A model's metric values (unscaled), by set and name; and by set, group and name."""

    scores: dict[str, Values]
    groups: dict[str, dict[str, Group]] = {}

    def main(self, name: str, sets: Sets) -> float | None:
        """Return the main value on a set; None if the model was not evaluated on it."""
        return self.scores.get(name, {}).get(sets[name].main)


class OfControl(Part, frozen=True, kw_only=True):
    """Retention of a recovered model relative to its control, the unpruned model after the same recovery.

    `scores` are the control's metric values by set and name; the others mean the same as in `RunEvaluation`.
    """

    scores: dict[str, Values]
    retained: dict[str, float | None]
    retained_interval: dict[str, tuple[float, float]] = {}
    mean_of_ratios: float | None


class RunEvaluation(ModelEvaluation, frozen=True, kw_only=True):
    """Metric values of a pruned model, and retention relative to the unpruned model and to its control.

    `retained` is 100 * value / the unpruned model's value by set, inverted where lower is better; None where that is 0.
    `retained_interval`: see `Evaluated`; only sets that have one. `mean_of_ratios` is the mean of `retained`, and
    `paper_average` AVG-% of arXiv 2604.24380: 100 * sum of value / full over the same sum of the unpruned model. Both
    are over the sets whose metric has a full score (perplexity only without any such set) and on which the unpruned
    model does not score 0; None over no set. `control` is None without training, or if no control was trained.
    """

    retained: dict[str, float | None]
    retained_interval: dict[str, tuple[float, float]] = {}
    mean_of_ratios: float | None
    paper_average: float | None
    seconds: float
    control: OfControl | None = None

    @property
    def main_retention(self) -> float | None:
        """Mean retention relative to the control, or to the unpruned model if there is no control."""
        return self.mean_of_ratios if self.control is None else self.control.mean_of_ratios


class Costs(Part, frozen=True, kw_only=True):
    """Costs of a model computed from its shapes (`prune.cost.costs_of`)."""

    forward_flops: Finite
    kv_bytes_per_token: Count
    file_bytes: Count


class Workload(Part, frozen=True, kw_only=True):
    """Row for which `Costs` are computed: its tokens and images, and the dtype of cache and file.

    With `image_tokens` each image has that many tokens, and the row is shorter or longer by the difference.
    """

    length: Count
    images: Count
    dtype: str
    image_tokens: Count = 0


class Unpruned(Part, frozen=True, kw_only=True):
    """Entry of the unpruned model: evaluation, costs and speed.

    `parameters` are those that a forward pass uses. `carried` are the others of the checkpoint, such as tower layers
    after the feature layer: `num_parameters()` of transformers counts them too.
    """

    parameters: Annotated[int, Meta(ge=1, le=2**53)]
    carried: Count = 0
    evaluation: ModelEvaluation
    costs: Costs | None = None
    speed: MedianSpeed | None = None


class Control(Part, frozen=True, kw_only=True):
    """Entry of an unpruned model that was trained as pruned ones are; fields are those of `Run`."""

    name: str
    recovery: str
    data_fraction: Finite = 0.0
    training_records: Count | None = None
    training_steps: Count | None = None
    loss_terms: dict[str, str] = {}
    seconds: float | None
    metrics: str | None = None
    path: str
    evaluation: RunEvaluation

    @property
    def label(self) -> str:
        """Readable name of the model, such as "unpruned, SFT"."""
        return f"{UNPRUNED}, {recovery_label(self.recovery, reconstructed=False)}"


class Run(Part, frozen=True, kw_only=True):
    """Entry of one model: how it was made, and its scores. Paths are relative to the workdir.

    `ratio_asked`, `ratio_reached` and `decoder_ratio` are shares of parameters to remove, removed of the whole model,
    and removed of the decoder. `plan`, `scores`, `metrics` and `path` are the plan, the importance files, the training
    curve and the model's folder. `recovery` is the recovery's name, "none" without training. `loss_terms` maps the
    losses in `metrics` to their titles. `seconds` are of scoring, pruning and training.
    """

    name: str
    method: str
    criterion: str
    ratio_asked: Finite | None
    ratio_reached: Finite
    decoder_ratio: Finite | None = None
    parameters: Count
    removed_layers: list[Count] = []
    reconstruct: str = "none"
    recovery: str
    data_fraction: Finite = 0.0
    training_records: Count | None = None
    training_steps: Count | None = None
    loss_terms: dict[str, str] = {}
    seconds: float | None
    plan: str
    scores: list[str]
    metrics: str | None = None
    path: str
    evaluation: RunEvaluation
    costs: Costs | None = None
    speed: MedianSpeed | None = None

    @property
    def after_pruning(self) -> str:
        """Recovery in words, such as "reconstructed + SFT", or "without recovery"."""
        repaired = self.recovery == "reconstructed" or (self.recovery != "none" and self.reconstruct != "none")
        return recovery_label(self.recovery, reconstructed=repaired)

    @property
    def label(self) -> str:
        """Readable name of the model, such as "width 30 %, reconstructed + SFT"."""
        ratio = self.ratio_reached if self.ratio_asked is None else self.ratio_asked
        after = "" if self.after_pruning == WITHOUT else f", {self.after_pruning}"
        return f"{self.method} {100 * ratio:.3g} %{after}"


_Entry = TypeVar("_Entry", Control, Run)


class Export(Part, frozen=True, kw_only=True):
    """Check of the exported folder, reloaded by `backend`: the largest logit difference, and its limit."""

    path: str
    backend: str
    max_abs_logit_difference: float
    tolerance: float
    seconds: float


class Result(Artefact, frozen=True, kw_only=True, tag=1):
    """File `result.json`. `best` names the run that is exported; a sweep's runs export nothing."""

    HINT: ClassVar[str] = "run `vlmprune run` again, or restore the file"
    MAX_BYTES: ClassVar[int] = 2**25  # thousands of models
    sets: Annotated[dict[str, Set], Meta(min_length=1, max_length=1000)]
    teacher: Unpruned
    runs: Annotated[list[Run], Meta(min_length=1, max_length=10_000)]
    controls: Annotated[list[Control], Meta(max_length=10_000)] = []
    best: str
    export: Export | None = None
    workload: Workload | None = None

    def problems(self, folder: Path) -> str | None:
        """Return an error that types cannot express: an unknown name, or a path outside the workdir; None if valid."""
        if all(run.name != self.best for run in self.runs):
            return f"its best run {self.best!r} is none of its runs"
        for name, model in self.models:
            missing = [key for key in self.sets if model.evaluation.main(key, self.sets) is None]
            unknown = [key for key in model.evaluation.groups if key not in self.sets]
            if missing or unknown:
                return f"{name}: set {(missing + unknown)[0]!r} is not in its scores, or not in sets"
        home = os.path.realpath(folder)
        named = [path for run in self.runs for path in (run.plan, *run.scores)]
        named += [path for one in self.entries for path in (one.path, one.metrics) if path is not None]
        for path in dict.fromkeys(named):
            if "\0" in path or not Path(os.path.realpath(folder / path)).is_relative_to(home):
                return f"{path!r} lies outside the workdir"
        return None

    @property
    def entries(self) -> list[Control | Run]:
        """All models but the unpruned one: controls, then pruned models."""
        return [*self.controls, *self.runs]

    @property
    def models(self) -> list[tuple[str, Unpruned | Control | Run]]:
        """All models by name: the unpruned one, controls, and pruned ones."""
        return [(UNPRUNED, self.teacher), *((one.name, one) for one in self.entries)]

    @property
    def labels(self) -> dict[str, str]:
        """Readable names of all models, by name; models with equal labels get their names appended."""
        counts = Counter(one.label for one in self.entries)
        labels = {one.name: one.label + ("" if counts[one.label] == 1 else f" ({one.name})") for one in self.entries}
        return {UNPRUNED: UNPRUNED, **{name: printable(label) for name, label in labels.items()}}

    def distinct(self) -> Result:
        """Return the result without duplicates of models, such as one plan's model before several recoveries."""
        shown: dict[object, Run] = {}
        for run in sorted(self.runs, key=lambda run: run.name != self.best):
            evaluation = repr(msgspec.structs.replace(run.evaluation, seconds=0.0))
            key = (run.label, run.criterion, run.parameters, tuple(run.removed_layers), run.data_fraction, evaluation)
            shown.setdefault(key, run)
        return msgspec.structs.replace(self, runs=[run for run in self.runs if run in shown.values()])

    @property
    def best_run(self) -> Run:
        """Entry of the run that `best` names."""
        return next(run for run in self.runs if run.name == self.best)


def recovery_label(recovery: str, *, reconstructed: bool) -> str:
    """Return a recovery in words, such as "reconstructed + SFT"."""
    trained = RECOVERIES.get(recovery, recovery) if recovery not in NOT_TRAINED else ""
    return " + ".join(filter(None, ("reconstructed" if reconstructed else "", trained))) or WITHOUT


def read_result(workdir: Path) -> Result:
    """Return the content of `result.json`.

    Raises:
      UserError: see `read_artefact`; or the file names something outside the workdir.
    """
    return read_artefact(workdir / RESULT, Result, missing="no such file: run `vlmprune run` first")


def describe_sets(teacher: Evaluations, others: Iterable[Evaluations] = ()) -> dict[str, Set]:
    """Return the evaluation sets (metric and size), from the unpruned model's evaluations and those of other models.

    Texts that another model's vocabulary splits into another number of tokens are compared by bits per byte.
    """
    sets = {
        name: Set(**msgspec.structs.asdict(of.metric), counted=of.counted, count=of.count)
        for name, of in teacher.items()
    }
    for other in others:
        for name, of in sets.items():
            if of.counted == "tokens" and other[name].count != of.count and BITS in other[name].values:
                sets[name] = msgspec.structs.replace(of, main=BITS)
    return sets


def unpruned_of(
    evaluations: Evaluations, costs: Costs | None = None, speed: MedianSpeed | None = None, carried: int = 0
) -> Unpruned:
    """Return the unpruned model's entry in `result.json`."""
    evaluation = ModelEvaluation(scores=_values(evaluations), groups=_groups(evaluations))
    parameters = next(iter(evaluations.values())).parameters
    return Unpruned(parameters=parameters, carried=carried, evaluation=evaluation, costs=costs, speed=speed)


def compare(evaluations: Evaluations, teacher: Evaluations, control: Evaluations | None = None) -> RunEvaluation:
    """Compare a model with the unpruned one, and with its control if it was evaluated on the same sets."""
    sets, scores = describe_sets(teacher, [evaluations]), _values(evaluations)
    intervals = {name: of.retained_interval for name, of in evaluations.items() if of.retained_interval is not None}
    return RunEvaluation(
        scores=scores,
        groups=_groups(evaluations),
        retained_interval=intervals,
        seconds=round(sum(of.seconds for of in evaluations.values()), 2),
        **_compared(scores, _values(teacher), sets),
        control=None if control is None or control.keys() != teacher.keys() else _of_control(evaluations, control),
    )


def _of_control(evaluations: Evaluations, control: Evaluations) -> OfControl:
    found = compare(evaluations, control)
    intervals = {name: of.control_interval for name, of in evaluations.items() if of.control_interval is not None}
    return OfControl(
        scores=_values(control),
        retained=found.retained,
        retained_interval=intervals,
        mean_of_ratios=found.mean_of_ratios,
    )


def compare_again(model: RunEvaluation, unpruned: ModelEvaluation, sets: Sets) -> RunEvaluation:
    """Return the evaluation of a model with its retention computed anew, for sets with other main values."""
    control = model.control
    if control is not None:
        anew = _compared(model.scores, control.scores, sets)
        control = msgspec.structs.replace(control, retained=anew["retained"], mean_of_ratios=anew["mean_of_ratios"])
    return msgspec.structs.replace(model, **_compared(model.scores, unpruned.scores, sets), control=control)


def compare_alike(models: Sequence[_Entry], unpruned: ModelEvaluation, sets: Sets) -> list[_Entry]:
    """Return the entries of models, compared by the same main values (see `describe_sets`)."""
    return [msgspec.structs.replace(one, evaluation=compare_again(one.evaluation, unpruned, sets)) for one in models]


def _compared(scores: Mapping[str, Values], original: Mapping[str, Values], sets: Sets) -> dict[str, Any]:
    """Return the fields of `RunEvaluation` with a model's retention by set and on average."""
    ours, theirs = _averaged(scores, sets), _averaged(original, sets)
    theirs = {name: value for name, value in theirs.items() if value and math.isfinite(value)}
    ours = {name: ours[name] for name in theirs}
    full = {name: of for name in theirs if (of := sets[name].full) is not None}
    return {
        "retained": {name: _retained(scores[name], original[name], of) for name, of in sets.items()},
        "mean_of_ratios": mean_of_ratios(ours, theirs) if theirs else None,
        "paper_average": paper_average(ours, theirs, full) if theirs and len(full) == len(theirs) else None,
    }


def best_run(runs: Sequence[Run], sets: Sets) -> Run:
    """Return the run with the highest mean_of_ratios (or highest scores without it); of equals the smallest."""
    if not runs:
        raise UserError("no model was evaluated: set evaluate.unrecovered, or add a recovery")

    def rank(run: Run) -> tuple[float, float, int]:
        scores = _averaged(run.evaluation.scores, sets).values()
        return -(run.evaluation.mean_of_ratios or 0.0), -sum(scores), run.parameters

    return min(runs, key=rank)


def averaged_sets(sets: Sets) -> list[str]:
    """Return the sets that averages include: those with a full score, or all if none has one."""
    return [name for name, of in sets.items() if of.full is not None] or list(sets)


def _values(evaluations: Evaluations) -> dict[str, Values]:
    return {name: dict(of.values) for name, of in evaluations.items()}


def _groups(evaluations: Evaluations) -> dict[str, dict[str, Group]]:
    return {name: of.groups for name, of in evaluations.items() if 0 < len(of.groups) <= MOST_GROUPS}


def _retained(values: Values, original: Values, metric: MetricInfo) -> float | None:
    ours, theirs = values[metric.main], original[metric.main]
    if not metric.higher_is_better:
        ours, theirs = theirs, ours
    return retained(ours, theirs) if theirs else None  # JSON has no NaN


def _averaged(scores: Mapping[str, Values], sets: Sets) -> dict[str, float]:
    """Return {set: main value} for averages, inverted if lower is better."""
    mains = {name: scores[name][sets[name].main] for name in averaged_sets(sets)}
    inverses = {name: 1 / value if value else math.inf for name, value in mains.items()}
    return {name: value if sets[name].higher_is_better else inverses[name] for name, value in mains.items()}


def benchmark_rows(run: Run, teacher: Unpruned, sets: Sets) -> list[tuple[str, str, str, str, str]]:
    """Return rows of the model card: set, both models' scores, retained %, interval; then rows of speeds.

    After a recovery with a control, each set has a second row, in which the unpruned model was trained as well.
    """
    rows, control = list[tuple[str, str, str, str, str]](), run.evaluation.control
    for name, of in sets.items():
        title, ours = f"{name} ({of.name}): {of.label}, {of.size}", of.show(run.evaluation.main(name, sets), unit=False)
        before = of.show(teacher.evaluation.main(name, sets), unit=False)
        rows.append((title, before, ours, percent(run.evaluation.retained.get(name)), interval(run.evaluation, name)))
        if control is not None:
            alike = of.show(control.scores[name].get(of.main), unit=False)
            kept = percent(control.retained.get(name)), interval(control, name)
            rows.append((f"{name}, unpruned model after the same recovery", alike, ours, *kept))
    if run.speed is not None and teacher.speed is not None:
        for what, slow, fast in (
            ("prompt", teacher.speed.prefill, run.speed.prefill),
            ("generated", teacher.speed.decode, run.speed.decode),
        ):
            label = f"{what} tokens per second, our forward on the machine of the run"
            rows.append((label, f"{slow:,.0f}", f"{fast:,.0f}", percent(100 * fast / slow), ""))
    return rows


def percent(value: float | None) -> str:
    """Return a percentage as text without its sign; "" for None."""
    return "" if value is None else f"{value:.2f}"


def interval(evaluation: RunEvaluation | OfControl, name: str) -> str:
    """Return the retention interval on a set as text, such as "95.1 to 97.3"; "" if unknown."""
    ends = evaluation.retained_interval.get(name)
    return "" if ends is None else f"{ends[0]:.1f} to {ends[1]:.1f}"
