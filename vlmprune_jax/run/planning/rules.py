"""Choice of a pruning method and recovery for a model: by measurements of the same shape, else by the guide's rule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.base.checks import fraction, one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.planning.guide import COMPUTE, METHODS, NEAR, PAPER, SOLVED, Evidence, Guide, Rule

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
    """Recommendation for a target model: settings, and the measurements behind them.

    `rule`: the guide's rule that applies, None if measurements alone support this. `head`: row of a model of the same
    shape, which overrules the rule. `rows`: the evidence: `head`, or rows of similar models. `because`: why this is
    recommended. `data_fraction`: share of the training data to train on; 0 without training. `warnings`: limits of this
    recommendation. `recipe`: partial experiment that made the evidence. `of_family`: True if `recipe` is added to the
    recipe of the model's family. `task`: data and evaluation of the evidence, empty unless the evidence is from a model
    of this shape. `variants`: settings of each recommended method.
    """

    rule: Rule | None
    target: Target
    data_fraction: float
    head: Evidence | None
    rows: tuple[Evidence, ...]
    because: str
    warnings: tuple[str, ...]
    of_family: bool
    recipe: dict[str, Any]
    task: dict[str, Any]
    variants: dict[str, dict[str, Any]]

    @property
    def promise(self) -> tuple[float, float] | None:
        """95 % interval of the retention (%) for another seed on the data of the evidence; None if unknown.

        Only measurements with several seeds, of a model of this shape, on data that anyone can load, make a promise.
        """
        head = self.head
        if head is None or head.interval is None or (head.seeds or 1) < 2 or "source" not in self.task.get("data", {}):
            return None
        half = _half(head) * math.sqrt((head.seeds or 1) + 1)  # of one seed, from the interval of the mean
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
    rules = [rule for rule in guide.rules if rule.compute == trains]
    rule = next((rule for rule in rules if min(share, 1.0) <= rule.up_to), None)
    head, because = _choose(target, trains, data_fraction, methods, guide)
    if head is None:
        if rule is None:
            most = 100 * max((rule.up_to for rule in rules), default=0.0)
            todo = "remove less" if trains == "full" else "remove less, or train more (--compute=full --data=5%)"
            raise UserError(
                f"no measurement supports removing {100 * share:.3g} % of the decoder with compute={trains!r} (at most "
                f"{most:.3g} %): {todo}"
            )
        because = f"the guide's rule ({rule.source})"
        advised = [method for method in rule.methods if method in methods] or [*methods[:1]]
        rows = _of_similar_models(target, rule, advised, used, guide)
        words = {method: rule.words(method) for method in advised}
    else:
        rows, words = [head], {head.method: head.made_by}
        used = min(data_fraction, needed) if head.data_fraction is None else head.data_fraction  # the paper's: unknown
    shape = [row for row in guide.evidence if row.counts and _same_shape(target, row, guide)]
    row = rows[0] if rows else max(shape, key=lambda row: row.seeds or 1, default=None)
    name = PAPER if row is None else row.source
    source = guide.sources[name]
    return Recommendation(
        rule=rule,
        target=target,
        data_fraction=used,
        head=head,
        rows=tuple(rows),
        because=because,
        warnings=tuple(_warnings(target, head, rows, data_fraction, needed, trains, compute, guide)),
        of_family=name == PAPER,
        recipe=source.recipe,
        task=source.task if row in shape else {},
        variants={
            method: merge(*(guide.settings[word] for word in words[method]), source.methods.get(method, {}))
            for method in words
        },
    )


def _warnings(
    target: Target,
    head: Evidence | None,
    rows: Sequence[Evidence],
    available: float,
    needed: float,
    trains: str,
    compute: str,
    guide: Guide,
) -> Iterator[str]:
    """Yield the limits of a recommendation; `available` and `needed` are shares of the training data."""
    least = guide.data.least
    trained = (trains if head is None else _trained(head)) != "none"
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
    if trained and head is None and least <= available < needed:
        yield f"at this ratio the guide recommends all training data; {100 * available:g} % are available"


def merge(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Merge partial experiments section by section; later ones override earlier ones."""
    merged: dict[str, Any] = {}
    for values in settings:
        for name, value in values.items():
            known = merged.get(name)
            merged[name] = merge(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return merged


def _same_shape(target: Target, row: Evidence, guide: Guide) -> bool:
    return row.parameters == target.parameters and guide.sources[row.source].vision == target.vision


def _distance(target: Target, row: Evidence) -> float:
    """Return the difference (a share of the decoder) between what a row and the target's plan removed."""
    return abs(row.decoder_ratio - target.removed.get(row.method, math.inf))


def _choose(
    target: Target, trains: str, data: float, methods: Sequence[str], guide: Guide
) -> tuple[Evidence | None, str]:
    """Return the measurement of the same model shape to follow (None to follow the rule), and why.

    The row with the most seeds stands for each way to prune and recover; single seeds decide only if there is nothing
    else. Of the rows within the budget that tie with the best of them, the one with the least work is followed.
    """

    def fits(row: Evidence) -> bool:
        known = all(word in guide.settings for word in row.made_by)
        affordable = trains == "full" or _trained(row) in ("none", trains)
        return known and affordable and (row.data_fraction or 0.0) <= data and row.method in methods

    rows = [row for row in guide.evidence if row.counts and _same_shape(target, row, guide)]
    near = [row for row in rows if _distance(target, row) <= guide.at]
    quoted = dict[tuple[str, str, float | None], Evidence]()
    for row in sorted(near, key=lambda row: (row.seeds or 1, -row.retained)):  # later rows replace earlier ones
        quoted[row.method, row.recovery, row.data_fraction] = row
    rows = [row for row in quoted.values() if (row.seeds or 1) > 1] or [*quoted.values()]
    within = sorted(filter(fits, rows), key=_lower_end, reverse=True)
    if not within:
        return None, ""
    best, rival = within[0], max(rows, key=_lower_end)
    ties = [row for row in within if not is_better(best, row) and _lower_end(row) >= _lower_end(best) - TIE]
    head = min(ties, key=lambda row: (*_work(row), -_lower_end(row)))
    if is_better(rival, head):
        return head, f"best within these options; outside them, {rival.way} ({rival.retained:.2f} %) is better"
    if rival != head:
        but = "is more work" if rival in within else "is outside these options"
        return head, f"{rival.way} ({rival.retained:.2f} %) is better by chance at most, and {but}"
    others = f"; next is {within[1].way} ({within[1].retained:.2f} %)" if len(within) > 1 else ""
    return head, f"best of {len(within)} ways measured at what they remove{others}"


def is_better(row: Evidence, other: Evidence) -> bool:
    """Return True if a row retained more than another, and the 95 % interval of the difference excludes 0."""
    return row.retained - other.retained > math.hypot(_half(row), _half(other))


def _half(row: Evidence) -> float:
    """Return half the width of a measurement's 95 % interval; 0 without an interval."""
    return 0.0 if row.interval is None else (row.interval[1] - row.interval[0]) / 2


def _lower_end(row: Evidence) -> float:
    return row.retained - _half(row)


def _trained(row: Evidence) -> str:
    """Return a measurement's training after pruning, such as "sft", without "reconstruct"; "none" without training."""
    return row.recovery.removeprefix(SOLVED).removeprefix("+") or "none"


def _work(row: Evidence) -> tuple[int, bool, float]:
    """Return a sort key for the cost of a measured recovery: training, reconstruction, share of the data."""
    trained = _trained(row)
    rank = WORK.index(trained) if trained in WORK else len(WORK)
    return rank, row.recovery != trained, row.data_fraction or 0.0


def _of_similar_models(target: Target, rule: Rule, methods: Sequence[str], used: float, guide: Guide) -> list[Evidence]:
    """Return the row nearest to the advice of each model of similar size, the most similar model first."""

    def nearness(row: Evidence) -> tuple[float, float, int]:
        return _distance(target, row), abs((row.data_fraction or 0.0) - used), -(row.seeds or 1)

    like = [
        row
        for row in guide.evidence
        if guide.sources[row.source].vision == target.vision and row.counts and row.method in methods
        if _size_difference(target, row) <= math.log(LIKE) and _distance(target, row) <= NEAR
    ]
    for recovery in rule.recoveries:
        nearest: dict[str, Evidence] = {}
        for row in sorted((row for row in like if row.recovery == recovery), key=nearness):
            nearest.setdefault(row.model, row)
        if nearest:
            return sorted(nearest.values(), key=lambda row: _size_difference(target, row))
    return []


def _size_difference(target: Target, row: Evidence) -> float:
    return abs(math.log(row.parameters / target.parameters))
