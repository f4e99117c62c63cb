"""Decision guide for pruning and recovery: a file of rules and measurements, and the choice among them for a model.

`guide.json` has the rules (the first that fits applies), rows of evidence, and the settings of each recommendation.
`tools/study_guide.py` adds the rows of a sweep. Measurements of a model of the same shape come before the rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from vlmprune_jax.base.checks import fraction, one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Finite, read_json

FILE = Path(__file__).with_name("guide.json")
VERSION, SOLVED = 6, "reconstruct"
COMPUTE = ("none", "projector", "full")
METHODS, RECOVERIES = ("depth", "width", "hybrid"), ("none", "projector", "sft_l2")  # choices of recommendations
NEAR = 0.08  # maximum difference between the removed shares of the decoder of a plan and a quoted measurement
PAPER = "paper"  # source of the recipes for models without similar evidence
LIKE = 10  # models within this factor of the target's size count as similar
TIE = 1.0  # points of retention; lower ends of intervals further apart are no tie
WORK = ("none", "projector", "sft")  # recoveries, cheapest first; recoveries with a teacher cost more
_TODO = "write it again with tools/study.py, or leave --guide out"


@dataclass(frozen=True)
class Source:
    """Source of measurements, such as the paper or our own study.

    `measure`: metric whose retention (in %) was measured, and the data it was measured on. `vision`: True if the
    source's models have a vision tower. `recipe`: partial experiment that made all rows of the source, without the
    settings of methods and recoveries (for the paper, added to the recipe of each family). `task`: data and evaluation
    of the source, which are recommended only for a model of the same shape. `methods`: partial experiments of pruning
    methods, such as {"width": {"prune": {"heads": "keep"}}}.
    """

    title: str
    measure: str
    vision: bool
    recipe: dict[str, Any]
    task: dict[str, Any]
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """Measured retention (%) of one model after one combination of pruning and recovery.

    `recovery`: "none", "projector", "sft", "sft_l2", ...; with the prefix "reconstruct" (or "reconstruct" alone) if
    weights were reconstructed. `decoder_ratio`: removed share of the decoder's parameters (for the paper, its nominal
    ratio, which is close). `parameters`: number of parameters of the unpruned model. `interval`: 95 % interval over
    `seeds` runs and questions; None if unknown. Rows without `counts` are left out, for the reason in
    `note`. `of_control`: retention (%) relative to the unpruned model after the same recovery, if measured.
    """

    source: str
    model: str
    parameters: int
    method: str
    recovery: str
    decoder_ratio: Finite
    data_fraction: Finite | None
    retained: Finite
    interval: tuple[Finite, Finite] | None
    seeds: int | None
    note: str
    counts: bool
    of_control: Finite | None = None

    @property
    def n_seeds(self) -> int:
        """Number of seeds, 1 if unknown."""
        return self.seeds or 1

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval; 0 without an interval."""
        return 0.0 if self.interval is None else (self.interval[1] - self.interval[0]) / 2

    @property
    def lower_end(self) -> float:
        """Lower end of the 95 % interval, around the retention."""
        return self.retained - self.half

    @property
    def trained(self) -> str:
        """Training after pruning, such as "sft", without "reconstruct"; "none" without training."""
        return self.recovery.removeprefix(SOLVED).removeprefix("+") or "none"

    @property
    def way(self) -> str:
        """Pruning method, recovery and share of the data as text."""
        data = f" on {100 * self.data_fraction:.4g} % of the data" if self.data_fraction else ""
        return f"{self.method} + {self.recovery}{data}"

    @property
    def words(self) -> list[str]:
        """Names in `Guide.settings` of the pruning method and recoveries with which the retention was measured."""
        return [self.method, self.trained, *([SOLVED] if self.recovery != self.trained else [])]


@dataclass(frozen=True)
class Rule:
    """Recommendation for training budget `compute`, valid for decoder ratios up to `up_to`, and where it is from.

    The pruned weights are reconstructed if the method is width or nothing is trained.
    """

    name: str
    compute: str
    up_to: Finite
    methods: tuple[str, ...]
    recovery: str
    source: str

    def words(self, method: str) -> list[str]:
        """Return the names in `Guide.settings` of a pruning method of this rule and of its recoveries."""
        return [method, self.recovery, *([SOLVED] if method == "width" or self.recovery == "none" else [])]

    @property
    def recoveries(self) -> list[str]:
        """Names of measured recoveries that predict the outcome, the most alike first."""
        if self.recovery == "none":
            return [SOLVED, "none"]
        return [f"{SOLVED}+{self.recovery}"] * ("width" in self.methods) + [self.recovery]


@dataclass(frozen=True)
class Data:
    """Advice on training data: the smallest measured share, `least`, is enough for ratios below `suffices_below`.

    `steps`: the fewest optimizer steps of a measured training.
    """

    least: Finite
    suffices_below: Finite
    steps: int


@dataclass(frozen=True)
class Guide:
    """Content of `guide.json`: rules and measured retentions.

    Ratios within `at` of each other count as equal. `settings`: partial experiment for each recommendation.
    """

    version: int
    at: Finite
    sources: dict[str, Source]
    rules: tuple[Rule, ...]
    settings: dict[str, dict[str, Any]]
    data: Data
    evidence: tuple[Evidence, ...]


def read_guide(path: Path = FILE) -> Guide:
    """Return the rules and measurements of `vlmprune recommend`: bundled ones, or a file of `tools/study_guide.py`.

    Raises UserError if the file is missing or damaged.
    """
    guide = msgspec.convert(read_json(path, Guide, missing="no such file", todo=_TODO), Guide)
    problem = next(_problems(guide), None)
    if problem is not None:
        raise UserError(f"{path}: {problem}: {_TODO}")
    return guide


def _problems(guide: Guide) -> Iterator[str]:
    """Yield errors in a guide's content, such as unknown names."""
    if guide.version != VERSION:
        yield f"written in format {guide.version}, this version reads {VERSION}"
    if PAPER not in guide.sources:
        yield f"there must be a source {PAPER!r}"
    for row in guide.evidence:
        if row.parameters < 1:
            yield f"a row of {row.model!r} has {row.parameters} parameters"
        if row.source not in guide.sources:
            yield f"a row has the unknown source {row.source!r}"
    if not {*METHODS} <= {*guide.settings}:
        yield f"settings must include {', '.join(METHODS)}"
    for rule in guide.rules:
        for name in (name for method in rule.methods for name in rule.words(method) if name not in guide.settings):
            yield f"rule {rule.name!r} advises {name!r}, which has no settings"
        if not rule.methods or not {*rule.methods} <= {*METHODS} or rule.recovery not in RECOVERIES:
            yield f"rule {rule.name!r} must advise of {', '.join(METHODS)} and one of {', '.join(RECOVERIES)}"
    if guide.data.steps < 1:
        yield f"data.steps is {guide.data.steps}, but must be at least 1"


@dataclass(frozen=True)
class Target:
    """Model to give a recommendation for, shares of model and decoder to remove, and means of pruning and training.

    Attributes:
      removed: share of the decoder that each pruning method removes for this target; methods that cannot are left out.
      data: available share of the training data (0 = none).
      compute: "none" (no training), "projector" (only the projector is trained) or "full" (with the teacher).
      methods: pruning methods to choose from, the first one instead of a rule's if that is not among them.
    """

    parameters: int
    vision: bool
    ratio: float
    decoder_ratio: float
    removed: Mapping[str, float]
    data: float
    compute: str
    methods: Sequence[str] = METHODS

    def distance(self, row: Evidence) -> float:
        """Return the difference (a share of the decoder) between what a row and the target's plan removed."""
        return abs(row.decoder_ratio - self.removed.get(row.method, math.inf))


@dataclass(frozen=True)
class Recommendation:
    """Recommendation for a target model: settings, and the measurements behind them."""

    rule: Rule | None  # of the guide; None if measurements alone support this
    target: Target
    data_fraction: float  # share of the training data to train on; 0 without training
    head: Evidence | None  # row of a model of the same shape, which overrules the rule
    rows: tuple[Evidence, ...]  # the evidence: `head`, or rows of similar models
    because: str
    warnings: tuple[str, ...]  # limits of this recommendation
    of_family: bool  # True if `recipe` is added to the recipe of the model's family
    recipe: dict[str, Any]  # partial experiment that made the evidence
    task: dict[str, Any]  # data and evaluation of the evidence; empty unless from a model of this shape
    variants: dict[str, dict[str, Any]]  # settings of each recommended method

    @property
    def promise(self) -> tuple[float, float] | None:
        """95 % interval of the retention (%) for another seed on the data of the evidence; None if unknown.

        Only measurements with several seeds, of a model of this shape, on data that anyone can load, make a promise.
        """
        head = self.head
        if head is None or head.interval is None or head.n_seeds < 2 or "source" not in self.task.get("data", {}):
            return None
        half = head.half * math.sqrt(head.n_seeds + 1)  # of one seed, from the interval of the mean
        high = head.retained + half
        return max(0.0, head.retained - half), high if head.retained > 100 else min(high, 100.0)


def recommend(target: Target, guide: Guide) -> Recommendation:
    """Return the guide's recommendation for a target model (arXiv 2604.24380 and our own measurements).

    Measurements of a model of the same shape come first (see `_choose`). Otherwise, the matching rule applies, with
    evidence from models of similar size. In both cases, the settings are those of the measured models.

    Raises UserError for an invalid ratio or share, an unknown `compute`, or a ratio that no measurement supports.
    """
    if not fraction("ratio", target.ratio):
        raise UserError("ratio=0 must be above 0: set the share of parameters to remove")
    one_of("compute", target.compute, COMPUTE)
    if not 0 <= target.data <= 1:
        raise UserError(
            f"data={target.data:g} must be a share of the training data: between 0 and 1, or for example 5%"
        )
    trains, share = target.compute if target.data else "none", target.decoder_ratio
    needed = guide.data.least if share < guide.data.suffices_below else 1.0
    used = min(target.data, needed) if trains != "none" else 0.0
    rules = [rule for rule in guide.rules if rule.compute == trains]
    rule = next((rule for rule in rules if min(share, 1.0) <= rule.up_to), None)
    of_kind = [row for row in guide.evidence if row.counts and guide.sources[row.source].vision == target.vision]
    shape = [row for row in of_kind if row.parameters == target.parameters]
    head, because = _choose(target, shape, trains, guide)
    if head is not None:
        rows, words = [head], {head.method: head.words}
        trains, needed = head.trained, 0.0
        used = used if head.data_fraction is None else head.data_fraction  # the paper's: unknown
    elif rule is not None:
        because = f"the guide's rule ({rule.source})"
        advised = [method for method in rule.methods if method in target.methods] or [*target.methods[:1]]
        rows = _of_similar_models(target, [row for row in of_kind if row.method in advised], rule, used)
        words = {method: rule.words(method) for method in advised}
    else:
        most = 100 * max((rule.up_to for rule in rules), default=0.0)
        todo = "remove less" if trains == "full" else "remove less, or train more (--compute=full --data=5%)"
        raise UserError(
            f"no measurement supports removing {100 * share:.3g} % of the decoder with compute={trains!r} (at most "
            f"{most:.3g} %): {todo}"
        )
    row = rows[0] if rows else max(shape, key=lambda row: row.n_seeds, default=None)
    name = PAPER if row is None else row.source
    source = guide.sources[name]
    variants = {
        method: merge(*map(guide.settings.__getitem__, words[method]), source.methods.get(method, {}))
        for method in words
    }
    warnings = tuple(_warnings(target, rows, trains != "none", needed, guide.data.least))
    task = source.task if row in shape else {}
    return Recommendation(
        rule, target, used, head, tuple(rows), because, warnings, name == PAPER, source.recipe, task, variants
    )


def _warnings(target: Target, rows: Sequence[Evidence], trained: bool, needed: float, least: float) -> Iterator[str]:
    """Yield the limits of a recommendation; `needed` (by the rule) and `least` are shares of the training data."""
    if not rows:
        yield f"no model of this kind within {LIKE} times its size was measured with these steps: evaluate first"
    if not target.vision:
        yield "the guide is for models with a vision tower; for decoders, only text was measured"
    if trained and all(row.of_control is None for row in rows):
        yield "no unpruned model was trained alike, so a part may be what training adds to any model"
    if not target.data and target.compute != "none":
        yield "training needs data: this is the recommendation without training"
    if not target.data or target.compute == "none":
        yield "scoring and reconstruction still need 50 to 500 records of the model's task"
    if trained and target.data < least:
        yield f"no measurement used less than {100 * least:g} % of the training data"
    if trained and least <= target.data < needed:
        yield f"at this ratio the guide recommends all training data; {100 * target.data:g} % are available"


def merge(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Merge partial experiments section by section; later ones override earlier ones."""
    merged: dict[str, Any] = {}
    for values in settings:
        for name, value in values.items():
            known = merged.get(name)
            merged[name] = merge(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return merged


def _choose(target: Target, shape: Sequence[Evidence], trains: str, guide: Guide) -> tuple[Evidence | None, str]:
    """Return the measurement in `shape`, rows of the same model shape, to follow (None to follow the rule), and why.

    The row with the most seeds stands for each way to prune and recover; single seeds decide only if there is nothing
    else. Of the rows within the budget that tie with the best of them, the one with the least work is followed.
    """

    def fits(row: Evidence) -> bool:
        known, affordable = {*row.words} <= {*guide.settings}, trains == "full" or row.trained in ("none", trains)
        return known and affordable and (row.data_fraction or 0.0) <= target.data and row.method in target.methods

    def work(row: Evidence) -> tuple[int, bool, float, float]:
        rank = WORK.index(row.trained) if row.trained in WORK else len(WORK)
        return rank, row.recovery != row.trained, row.data_fraction or 0.0, -row.lower_end

    near = [row for row in shape if target.distance(row) <= guide.at]
    quoted = dict[tuple[str, str, float | None], Evidence]()
    for row in sorted(near, key=lambda row: (row.n_seeds, -row.retained)):  # later rows replace earlier ones
        quoted[row.method, row.recovery, row.data_fraction] = row
    rows = [row for row in quoted.values() if row.n_seeds > 1] or [*quoted.values()]
    within = sorted(filter(fits, rows), key=lambda row: row.lower_end, reverse=True)
    if not within:
        return None, ""
    best, rival = within[0], max(rows, key=lambda row: row.lower_end)
    ties = [row for row in within if not is_better(best, row) and row.lower_end >= best.lower_end - TIE]
    head = min(ties, key=work)
    if is_better(rival, head):
        return head, f"best within these options; outside them, {rival.way} ({rival.retained:.2f} %) is better"
    if rival != head:
        but = "is more work" if rival in within else "is outside these options"
        return head, f"{rival.way} ({rival.retained:.2f} %) is better by chance at most, and {but}"
    others = f"; next is {within[1].way} ({within[1].retained:.2f} %)" if len(within) > 1 else ""
    return head, f"best of {len(within)} ways measured at what they remove{others}"


def is_better(row: Evidence, other: Evidence) -> bool:
    """Return True if a row retained more than another, and the 95 % interval of the difference excludes 0."""
    return row.retained - other.retained > math.hypot(row.half, other.half)


def _of_similar_models(target: Target, rows: Sequence[Evidence], rule: Rule, used: float) -> list[Evidence]:
    """Return, of these rows, the nearest to the advice of each model of similar size, the most similar model first."""

    def size_difference(row: Evidence) -> float:
        return abs(math.log(row.parameters / target.parameters))

    def nearness(row: Evidence) -> tuple[float, float, int]:
        return target.distance(row), abs((row.data_fraction or 0.0) - used), -row.n_seeds

    like = [row for row in rows if size_difference(row) <= math.log(LIKE) and target.distance(row) <= NEAR]
    for recovery in rule.recoveries:
        nearest: dict[str, Evidence] = {}
        for row in sorted((row for row in like if row.recovery == recovery), key=nearness):
            nearest.setdefault(row.model, row)
        if nearest:
            return sorted(nearest.values(), key=size_difference)
    return []
