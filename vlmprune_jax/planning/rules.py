"""Recommendation of a pruning method and recovery for a model, by the rules and the evidence of the decision guide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune_jax.core.checks import fraction, one_of
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.evaluation.statistics import interval_of_mean
from vlmprune_jax.planning.guide import ALWAYS, COMPUTE, PAPER, SOLVED, Evidence, Guide, Rule

LIKE = 10  # models within this factor of the target's size count as similar
TIE = 1.0  # points of retention; lower ends of intervals further apart are no tie
WORK = ("none", "projector", "sft")  # recoveries, cheapest first; recoveries with a teacher cost more


@dataclass(frozen=True)
class Target:
    """Model to give a recommendation for: size, image input, and shares of model and decoder to remove."""

    parameters: int
    vision: bool
    ratio: float
    decoder_ratio: float


@dataclass(frozen=True)
class Expected:
    """Expected retention in %, with its interval (None if unknown) and the measurements behind it.

    `same`: True if the rows are from a model of the same shape; the interval is then for another seed, otherwise for
    another model, task and seed.
    """

    value: float
    interval: tuple[float, float] | None
    same: bool
    rows: tuple[Evidence, ...]

    @property
    def of_control(self) -> float | None:
        """Retention in % relative to the control (an unpruned model with the same training); None if not measured.

        If `same`, this is the value of the first row, otherwise the mean over all rows.
        """
        known = [row.of_control for row in self.rows[: 1 if self.same else None] if row.of_control is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Recommendation:
    """Recommendation for a target model: settings, expected retention and evidence.

    `rule`: the guide's rule that applies. `head`: row of a model of the same shape, which overrules the rule. `rival`:
    row of this shape with the best retention at any cost (`head` if no other is better). `expected`: None without
    evidence from models of similar size. `data_fraction`: share of the training data to train on; 0 without training.
    `beside`: other rows at a similar ratio. `conflicts`: contradictions between the sources. `notes`: remarks for the
    user. `recipe`: partial experiment that made the evidence. `variants`: its part for each recommended method.
    `of_family`: True if `recipe` is added to the recipe of the model's family. `task`: data and evaluation of the
    evidence, empty unless the evidence is from a model of this shape.
    """

    rule: Rule
    target: Target
    data_fraction: float
    head: Evidence | None
    rival: Evidence | None
    expected: Expected | None
    beside: tuple[Evidence, ...]
    conflicts: tuple[str, ...]
    notes: tuple[str, ...]
    of_family: bool
    recipe: dict[str, Any]
    task: dict[str, Any]
    variants: dict[str, dict[str, Any]]


def recommend(target: Target, *, data_fraction: float, compute: str, speed: bool, guide: Guide) -> Recommendation:
    """Return the guide's recommendation for a target model (arXiv 2604.24380 and our own measurements).

    Measurements of a model of the same shape come first (see `_choose`). Otherwise, the matching rule applies, with
    evidence from models of similar size. In both cases, the settings are those of the measured models.

    Args:
      data_fraction: available share of the training data (0 = none).
      compute: "none" (no training), "projector" (only the projector is trained) or "full" (with the teacher).
      speed: True if the pruned model's speed matters as much as its accuracy.

    Raises UserError for an invalid ratio or share, or an unknown `compute`.
    """
    if not fraction("ratio", target.ratio):
        raise UserError("ratio=0 must be above 0: set the share of parameters to remove")
    one_of("compute", compute, COMPUTE)
    if not 0 <= data_fraction <= 1:
        raise UserError(
            f"data={data_fraction:g} must be a share of the training data: between 0 and 1, or for example 5%"
        )
    trains, share = compute if data_fraction else "none", target.decoder_ratio
    rule = next(
        rule
        for rule in guide.rules
        if rule.compute == trains and min(share, 1.0) <= rule.up_to and rule.speed in (None, speed)
    )
    needed = guide.data.least if share < guide.data.suffices_below else 1.0
    used = min(data_fraction, needed) if rule.recovery != "none" else 0.0
    head, rival = _choose(target, trains, data_fraction, speed, guide)
    if head is None:
        expected = _expect_like(target, rule, used, guide)
        methods: dict[str, list[str]] = {method: _words(rule, method) for method in rule.methods}
    else:
        expected, methods = _expect_same(target, head, guide), {head.method: head.made_by}
        used = min(data_fraction, needed) if head.data_fraction is None else head.data_fraction  # the paper's: unknown
    shown = () if expected is None else expected.rows
    shape = [row for row in guide.evidence if row.counts and _same_shape(target, row, guide)]
    row = shown[0] if shown else max(shape, key=lambda row: row.seeds or 1, default=None)
    name = PAPER if row is None else row.source
    notes = [*_notes(target, rule, head, expected, data_fraction, needed, compute, guide)]
    if expected is not None and expected.of_control is None and any(row.is_trained for row in expected.rows):
        notes.append("No unpruned model was trained alike, so a part may be what training adds to any model.")
    return Recommendation(
        rule=rule,
        target=target,
        data_fraction=used,
        head=head,
        rival=rival,
        expected=expected,
        beside=tuple(_beside(target, shown, guide)),
        conflicts=tuple(_conflicts(target, rule, head, used, guide)),
        notes=tuple(notes),
        of_family=name == PAPER,
        recipe=guide.sources[name].recipe,
        task=guide.sources[name].task if row in shape else {},
        variants={method: merge(*(guide.settings[word] for word in words)) for method, words in methods.items()},
    )


def merge(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Merge partial experiments section by section; later ones override earlier ones."""
    merged: dict[str, Any] = {}
    for values in settings:
        for name, value in values.items():
            known = merged.get(name)
            merged[name] = merge(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return merged


def _words(rule: Rule, method: str) -> list[str]:
    """Return a rule's pruning method and recoveries under the names used in measurements."""
    solved = rule.reconstruct and (method == "width" or len(rule.methods) == 1)
    return [method, rule.recovery, *([SOLVED] if solved else [])]


def _same_shape(target: Target, row: Evidence, guide: Guide) -> bool:
    return row.parameters == target.parameters and guide.sources[row.source].vision == target.vision


def _alike(target: Target, row: Evidence, guide: Guide) -> bool:
    """Return True if a measurement is of a model of the same type and similar size (up to a factor of `LIKE`)."""
    ratio = row.parameters / target.parameters
    return guide.sources[row.source].vision == target.vision and 1 / LIKE <= ratio <= LIKE and row.counts


def _choose(
    target: Target, trains: str, data: float, speed: bool, guide: Guide
) -> tuple[Evidence | None, Evidence | None]:
    """Return the measurement of the same model shape to follow, and the best one at any cost; (None, None) without any.

    The row with the most seeds stands for each way to prune and recover; single seeds decide only if there is nothing
    else. Of the rows within the budget that tie with the best of them, the one with the least work is followed.
    """

    def fits(row: Evidence) -> bool:
        known = all(word in guide.settings for word in row.made_by)
        affordable = trains == "full" or _trained(row) in ("none", trains)
        return known and affordable and (row.data_fraction or 0.0) <= data and not (speed and row.method != "depth")

    rows = [row for row in guide.evidence if row.counts and _same_shape(target, row, guide)]
    near = [row for row in rows if abs(row.decoder_ratio - target.decoder_ratio) <= guide.at]
    quoted = dict[tuple[str, str, float | None], Evidence]()
    for row in sorted(near, key=lambda row: (row.seeds or 1, -row.retained)):  # later rows replace earlier ones
        quoted[row.method, row.recovery, row.data_fraction] = row
    rows = [row for row in quoted.values() if (row.seeds or 1) > 1] or [*quoted.values()]
    within = [row for row in rows if fits(row)]
    if not within:
        return None, None
    best, rival = max(within, key=_lower_end), max(rows, key=_lower_end)
    ties = [row for row in within if not is_better(best, row) and _lower_end(row) >= _lower_end(best) - TIE]
    return min(ties, key=lambda row: (*_work(row), -_lower_end(row))), rival


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


def _expect_same(target: Target, head: Evidence, guide: Guide) -> Expected:
    """Predict retention for another seed, from measurements of the same model shape."""
    rows = [
        row
        for row in guide.evidence
        if _same_shape(target, row, guide) and row.made_by == head.made_by and row.data_fraction == head.data_fraction
        if abs(row.decoder_ratio - head.decoder_ratio) <= guide.at and row != head
    ]
    half = _seed_half(head) or max(map(_seed_half, rows), default=0.0)
    if not half:  # one seed only: use the spread between models of similar size
        others = [row for row in guide.evidence if _alike(target, row, guide) and row.made_by == head.made_by]
        half = _spread(list(_by_model(others, target.decoder_ratio, guide.at).values()))
    return Expected(head.retained, _interval(head.retained, half), True, (head, *rows))


def _expect_like(target: Target, rule: Rule, used: float, guide: Guide) -> Expected | None:
    """Predict retention from measurements of models of similar size."""
    like = [row for row in guide.evidence if _alike(target, row, guide) and row.method in rule.methods]
    for recovery in rule.evidence:
        rows = _nearest_data([row for row in like if row.recovery == recovery], used)
        rows = sorted(rows, key=lambda row: _distance(target, row))
        values = _by_model(rows, target.decoder_ratio, guide.at)
        if values:
            mean = sum(values.values()) / len(values)
            shown = [row for row in rows if row.model in values]
            near = [row for row in shown if abs(row.decoder_ratio - target.decoder_ratio) <= guide.at]
            return Expected(mean, _interval(mean, _spread(list(values.values()))), False, tuple(near or shown))
    return None


def _by_model(rows: Sequence[Evidence], share: float, at: float) -> dict[str, float]:
    """Return {model: retention at a ratio}, interpolated between measured ratios (100 % at ratio 0)."""
    retained = {}
    for key in dict.fromkeys(row.model for row in rows):
        points = [(row.decoder_ratio, row.retained) for row in rows if row.model == key]
        near = [value for ratio, value in points if abs(ratio - share) <= at]
        if near:
            retained[key] = sum(near) / len(near)
        elif share < max(ratio for ratio, _ in points):
            ratios, values = zip(*sorted([(0.0, 100.0), *points]), strict=True)
            retained[key] = float(np.interp(share, ratios, values))
    return retained


def _seed_half(row: Evidence) -> float:
    """Return half the 95 % prediction interval for another seed (Student's t); 0 if one seed was measured."""
    if row.interval is None or (row.seeds or 1) < 2:
        return 0.0
    return (row.interval[1] - row.interval[0]) / 2 * math.sqrt((row.seeds or 1) + 1)


def _spread(values: Sequence[float]) -> float:
    """Return half the 95 % prediction interval for another model (Student's t); 0 if one model was measured."""
    mean, _, high = interval_of_mean(values) if values else (0.0, 0.0, 0.0)
    return (high - mean) * math.sqrt(len(values) + 1)


def _interval(value: float, half: float) -> tuple[float, float] | None:
    """Return the interval around an expected retention, cut at 100 %; None if its width is unknown."""
    return (max(0.0, value - half), value + half if value > 100 else min(value + half, 100.0)) if half else None


def _distance(target: Target, row: Evidence) -> float:
    return abs(math.log(row.parameters / target.parameters))


def _nearest_data(rows: Sequence[Evidence], used: float) -> list[Evidence]:
    """Return the measurements whose share of training data is nearest to `used`, and those without training."""
    shares = [row.data_fraction for row in rows if row.data_fraction is not None]
    nearest = min(shares, key=lambda share: abs(share - used), default=None)
    return [row for row in rows if row.data_fraction in (None, nearest)]


def _beside(target: Target, shown: Sequence[Evidence], guide: Guide) -> list[Evidence]:
    """Return further measurements at a similar ratio, models of the same type first."""
    rows = [row for row in guide.evidence if abs(row.decoder_ratio - target.decoder_ratio) <= guide.at]
    kinds = {name: source.vision != target.vision for name, source in guide.sources.items()}
    return sorted(
        (row for row in rows if row not in shown), key=lambda row: (kinds[row.source], _distance(target, row))
    )


def _notes(
    target: Target,
    rule: Rule,
    head: Evidence | None,
    expected: Expected | None,
    available: float,
    needed: float,
    compute: str,
    guide: Guide,
) -> Iterator[str]:
    if expected is None:
        yield f"No model of this kind within {LIKE} times its size was measured with these steps: evaluate first."
    if not target.vision:
        yield "The guide is for models with a vision tower; for decoders there are only measurements on text."
    if head is not None:
        yield f"The guide's rule for other models: {' or '.join(rule.methods)}, {rule.recovery} ({rule.source})."
    if head is not None and head.recovery != "none":
        return
    if rule.recovery == "none":
        if compute != "none":
            yield "Training needs data: this is the recommendation without training."
        yield "Scoring and reconstruction still need about 50 to 500 records of the model's task."
    elif available < guide.data.least:
        yield f"No measurement used less than {100 * guide.data.least:g} % of the training data."
    elif available < needed:
        yield f"At this ratio the guide recommends all training data; {100 * available:g} % are available."
    elif available > needed:
        yield f"By the guide, {100 * needed:g} % of the data suffice; to use more, set --config.data.fraction."


def _conflicts(target: Target, rule: Rule, head: Evidence | None, used: float, guide: Guide) -> Iterator[str]:
    if head is not None:
        return
    nominal, average, five_percent = ALWAYS
    named = [*((nominal, average) if target.vision else ()), *rule.conflicts]
    for name in [*named, *([five_percent] if used and target.vision else [])]:
        yield guide.conflicts[name]
