"""Choice of a pruning method and recovery for a model: by measurements of the same shape, else by the guide's rule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.base.checks import fraction, one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.planning.guide import COMPUTE, METHODS, NEAR, PAPER, Evidence, Guide, Rule

LIKE = 10  # models within this factor of the target's size count as similar
TIE = 1.0  # points of retention; lower ends of intervals further apart are no tie
WORK = ("none", "projector", "sft")  # recoveries, cheapest first; recoveries with a teacher cost more


@dataclass(frozen=True)
class Target:
    """Model to give a recommendation for: size, image input, and shares of model and decoder to remove.

    `removed`: share of the decoder that each pruning method removes for this target (methods that cannot are left out).
    """

    parameters: int
    vision: bool
    ratio: float
    decoder_ratio: float
    removed: Mapping[str, float]


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


def recommend(
    target: Target, *, data_fraction: float, compute: str, methods: Sequence[str] = METHODS, guide: Guide
) -> Recommendation:
    """Return the guide's recommendation for a target model (arXiv 2604.24380 and our own measurements).

    Measurements of a model of the same shape come first (see `_choose`). Otherwise, the matching rule applies, with
    evidence from models of similar size. In both cases, the settings are those of the measured models.

    Args:
      data_fraction: available share of the training data (0 = none).
      compute: "none" (no training), "projector" (only the projector is trained) or "full" (with the teacher).
      methods: pruning methods to choose from, the first one instead of a rule's if that is not among them.

    Raises UserError for an invalid ratio or share, an unknown `compute`, or a ratio that no measurement supports.
    """
    if not fraction("ratio", target.ratio):
        raise UserError("ratio=0 must be above 0: set the share of parameters to remove")
    one_of("compute", compute, COMPUTE)
    if not 0 <= data_fraction <= 1:
        raise UserError(
            f"data={data_fraction:g} must be a share of the training data: between 0 and 1, or for example 5%"
        )
    trains, share = compute if data_fraction else "none", target.decoder_ratio
    needed = guide.data.least if share < guide.data.suffices_below else 1.0
    used = min(data_fraction, needed) if trains != "none" else 0.0
    rule = next((rule for rule in guide.rules if rule.compute == trains and min(share, 1.0) <= rule.up_to), None)
    of_kind = [row for row in guide.evidence if row.counts and guide.sources[row.source].vision == target.vision]
    shape = [row for row in of_kind if row.parameters == target.parameters]
    head, because = _choose(target, shape, trains, data_fraction, methods, guide)
    if head is not None:
        rows, words = [head], {head.method: head.made_by}
        used = min(data_fraction, needed) if head.data_fraction is None else head.data_fraction  # the paper's: unknown
    elif rule is not None:
        because = f"the guide's rule ({rule.source})"
        advised = [method for method in rule.methods if method in methods] or [*methods[:1]]
        rows = _of_similar_models(target, [row for row in of_kind if row.method in advised], rule, used)
        words = {method: rule.words(method) for method in advised}
    else:
        most = 100 * max((rule.up_to for rule in guide.rules if rule.compute == trains), default=0.0)
        todo = "remove less" if trains == "full" else "remove less, or train more (--compute=full --data=5%)"
        raise UserError(
            f"no measurement supports removing {100 * share:.3g} % of the decoder with compute={trains!r} (at most "
            f"{most:.3g} %): {todo}"
        )
    row = rows[0] if rows else max(shape, key=lambda row: row.n_seeds, default=None)
    name = PAPER if row is None else row.source
    source, settings = guide.sources[name], guide.settings
    variants = {
        method: merge(*(settings[word] for word in words[method]), source.methods.get(method, {})) for method in words
    }
    trained = (trains if head is None else head.trained) != "none"
    needed = needed if head is None else 0.0
    warnings = tuple(_warnings(target, rows, trained, compute, data_fraction, needed, guide))
    task = source.task if row in shape else {}
    return Recommendation(
        rule, target, used, head, tuple(rows), because, warnings, name == PAPER, source.recipe, task, variants
    )


def _warnings(
    target: Target,
    rows: Sequence[Evidence],
    trained: bool,
    compute: str,
    available: float,
    needed: float,
    guide: Guide,
) -> Iterator[str]:
    """Yield the limits of a recommendation; `available` and `needed` (by the rule) are shares of the training data."""
    least = guide.data.least
    if not rows:
        yield f"no model of this kind within {LIKE} times its size was measured with these steps: evaluate first"
    if not target.vision:
        yield "the guide is for models with a vision tower; for decoders, only text was measured"
    if trained and all(row.of_control is None for row in rows):
        yield "no unpruned model was trained alike, so a part may be what training adds to any model"
    if not available and compute != "none":
        yield "training needs data: this is the recommendation without training"
    if not available or compute == "none":
        yield "scoring and reconstruction still need 50 to 500 records of the model's task"
    if trained and available < least:
        yield f"no measurement used less than {100 * least:g} % of the training data"
    if trained and least <= available < needed:
        yield f"at this ratio the guide recommends all training data; {100 * available:g} % are available"


def merge(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Merge partial experiments section by section; later ones override earlier ones."""
    merged: dict[str, Any] = {}
    for values in settings:
        for name, value in values.items():
            known = merged.get(name)
            merged[name] = merge(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return merged


def _distance(target: Target, row: Evidence) -> float:
    """Return the difference (a share of the decoder) between what a row and the target's plan removed."""
    return abs(row.decoder_ratio - target.removed.get(row.method, math.inf))


def _choose(
    target: Target, shape: Sequence[Evidence], trains: str, data: float, methods: Sequence[str], guide: Guide
) -> tuple[Evidence | None, str]:
    """Return the measurement in `shape`, rows of the same model shape, to follow (None to follow the rule), and why.

    The row with the most seeds stands for each way to prune and recover; single seeds decide only if there is nothing
    else. Of the rows within the budget that tie with the best of them, the one with the least work is followed.
    """

    def fits(row: Evidence) -> bool:
        known = all(word in guide.settings for word in row.made_by)
        affordable = trains == "full" or row.trained in ("none", trains)
        return known and affordable and (row.data_fraction or 0.0) <= data and row.method in methods

    def work(row: Evidence) -> tuple[int, bool, float, float]:
        rank = WORK.index(row.trained) if row.trained in WORK else len(WORK)
        return rank, row.recovery != row.trained, row.data_fraction or 0.0, -row.lower_end

    near = [row for row in shape if _distance(target, row) <= guide.at]
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
        return _distance(target, row), abs((row.data_fraction or 0.0) - used), -row.n_seeds

    like = [row for row in rows if size_difference(row) <= math.log(LIKE) and _distance(target, row) <= NEAR]
    for recovery in rule.recoveries:
        nearest: dict[str, Evidence] = {}
        for row in sorted((row for row in like if row.recovery == recovery), key=nearness):
            nearest.setdefault(row.model, row)
        if nearest:
            return sorted(nearest.values(), key=size_difference)
    return []
