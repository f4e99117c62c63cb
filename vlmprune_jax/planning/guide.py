"""Recommendation of a pruning method and recovery: the paper's decision guide and our measurements, as rules.

`guide.json` has the rules (the first that fits applies), rows of evidence, the settings of each recommendation, and the
contradictions between sources. `tools/study_guide.py` adds the rows of a sweep.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vlmprune_jax.core.checks import fraction, one_of
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import Finite, read_json
from vlmprune_jax.models.params import count_params

FILE = Path(__file__).with_name("guide.json")
VERSION, SOLVED = 1, "reconstruct"
COMPUTE = ("none", "projector", "full")
METHODS, RECOVERIES = ("depth", "width"), ("none", "projector", "sft_l2")  # what can be advised
ALWAYS = ("nominal", "average", "five_percent")  # conflicts that are not one rule's
_TODO = "write it again with tools/study.py, or leave --guide out"


@dataclass(frozen=True)
class Source:
    """Source of evidence rows; `measure` names the metric retained, in %; `vision`: its models have a vision tower."""

    title: str
    measure: str
    vision: bool


@dataclass(frozen=True)
class Evidence:
    """Measured retention (%) of a model after one way to prune and recover.

    `recovery`: "none", "projector", "sft", "sft_l2", ...; with "reconstruct" in front, or alone, for reconstructed
    weights. `decoder_ratio`: removed share of the decoder's parameters (for the paper, its nominal ratio, which is
    close). `interval`: 95 %, over `seeds` runs, or over questions for a single run. Rows without `counts` are shown but
    left out of ranges, for the reason in `note`.
    """

    source: str
    model: str
    method: str
    recovery: str
    decoder_ratio: Finite
    data_fraction: Finite | None
    retained: Finite
    interval: tuple[Finite, Finite] | None
    seeds: int | None
    note: str
    counts: bool

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval, or the value alone."""
        return self.interval or (self.retained, self.retained)


@dataclass(frozen=True)
class Rule:
    """Advice for a training budget (`compute`) and decoder ratios up to `up_to` that no earlier rule covers.

    `speed`: True if the rule is only for users who need speed, False if only for others, None for all. `evidence`:
    recoveries whose rows predict the outcome; the first that a source has is used. `source`: origin of the advice.
    `supported`: True if any measurement supports it.
    """

    name: str
    label: str
    compute: str
    up_to: Finite
    speed: bool | None
    methods: tuple[str, ...]
    reconstruct: bool
    recovery: str
    evidence: tuple[str, ...]
    supported: bool
    why: str
    source: str
    conflicts: tuple[str, ...]


@dataclass(frozen=True)
class Speed:
    """Decoding speed of a pruned model relative to the unpruned model."""

    model: str
    method: str
    removed: Finite
    format: str
    decode: Finite


@dataclass(frozen=True)
class Data:
    """`least`: smallest measured share of the training data, which suffices below the ratio `suffices_below`."""

    least: Finite
    suffices_below: Finite


@dataclass(frozen=True)
class Guide:
    """Content of `guide.json`.

    Ratios within `at` of each other count as equal. `settings`: partial experiment for each recommendation.
    """

    version: int
    at: Finite
    sources: dict[str, Source]
    rules: tuple[Rule, ...]
    settings: dict[str, dict[str, Any]]
    data: Data
    conflicts: dict[str, str]
    speed: tuple[Speed, ...]
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class Expected:
    """Expected retention from the rows of one source: `low` (None: no row at such a high ratio) to `high`, in %.

    `alike`: the source's models have a vision tower exactly if the user's model has one.
    """

    name: str
    source: Source
    alike: bool
    low: float | None
    high: float
    rows: tuple[Evidence, ...]


@dataclass(frozen=True)
class Recommendation:
    """The rule that applies, its predicted outcome and its evidence.

    `data_fraction`: share of the training data to train on; 0 without training. `beside`: other rows at a similar
    ratio. `conflicts`: contradictions between the sources. `notes`: remarks for the user. `variants`: a partial
    experiment for each recommended method.
    """

    rule: Rule
    ratio: float
    decoder_ratio: float
    data_fraction: float
    expected: tuple[Expected, ...]
    beside: tuple[Evidence, ...]
    speed: tuple[Speed, ...]
    conflicts: tuple[str, ...]
    notes: tuple[str, ...]
    variants: dict[str, dict[str, Any]]


def read_guide(path: Path = FILE) -> Guide:
    """Return the guide of the package, or one written by `tools/study_guide.py`.

    Raises:
      UserError: the file is missing or damaged.
    """
    guide = msgspec.convert(read_json(path, Guide, missing="no such file", todo=_TODO), Guide)
    problem = next(_problems(guide), None)
    if problem is not None:
        raise UserError(f"{path}: {problem}: {_TODO}")
    return guide


def _problems(guide: Guide) -> Iterator[str]:
    """Yield problems that the schema cannot express: unknown names, and ratios that no rule covers."""
    if guide.version != VERSION:
        yield f"written in format {guide.version}, this version reads {VERSION}"
    for row in guide.evidence:
        if row.source not in guide.sources:
            yield f"a row has the unknown source {row.source!r}"
    for rule in guide.rules:
        for name in (*rule.methods, rule.recovery, *([SOLVED] if rule.reconstruct else [])):
            if name not in guide.settings:
                yield f"rule {rule.name!r} advises {name!r}, which has no settings"
        if not rule.methods or not {*rule.methods} <= {*METHODS} or rule.recovery not in RECOVERIES:
            yield f"rule {rule.name!r} must advise of {', '.join(METHODS)} and one of {', '.join(RECOVERIES)}"
        if any(name not in guide.conflicts for name in rule.conflicts):
            yield f"rule {rule.name!r} names an unknown conflict"
    for compute in COMPUTE:
        if not any(rule.compute == compute and rule.up_to >= 1 and rule.speed is None for rule in guide.rules):
            yield f"no rule for compute {compute!r} covers all ratios"
    if any(name not in guide.conflicts for name in ALWAYS):
        yield f"conflicts must include {', '.join(ALWAYS)}"


def as_json(guide: Guide) -> str:
    """Return the text of `guide.json`, with a line for each rule and row."""
    parts = []
    for name, value in msgspec.to_builtins(guide).items():
        if isinstance(value, dict):
            inner, ends = [f"{json.dumps(key)}: {_json_line(one)}" for key, one in value.items()], "{}"
        elif isinstance(value, list | tuple):
            inner, ends = [_json_line(one) for one in value], "[]"
        else:
            parts.append(f" {json.dumps(name)}: {_json_line(value)}")
            continue
        parts.append(f" {json.dumps(name)}: {ends[0]}\n  " + ",\n  ".join(inner) + f"\n {ends[1]}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def recommend(
    cfg: ModelConfig, *, ratio: float, data_fraction: float, compute: str, speed: bool, guide: Guide
) -> Recommendation:
    """Return the guide's recommendation for a model (decision guide of arXiv 2604.24380, and our measurements).

    Args:
      ratio: share of the whole model's parameters to remove.
      data_fraction: available share of the training data; 0: none.
      compute: "none" (no training), "projector" (the projector alone) or "full" (adapters, with the teacher).
      speed: the pruned model's speed matters as much as its accuracy.

    Raises:
      UserError: an invalid ratio or share, an unknown `compute`, or "projector" for a model without projector.
    """
    if not fraction("ratio", ratio):
        raise UserError("ratio=0 must be above 0: choose the share of parameters to remove")
    if compute == "projector" and cfg.projector is None:
        raise UserError("compute='projector': this model has no projector: use none or full")
    share, sees = ratio * count_params(cfg) / count_params(cfg, "text"), cfg.vision is not None
    return recommend_for(ratio, share, sees, data_fraction=data_fraction, compute=compute, speed=speed, guide=guide)


def recommend_for(
    ratio: float, share: float, sees: bool, *, data_fraction: float, compute: str, speed: bool, guide: Guide
) -> Recommendation:
    """Return the recommendation for a decoder ratio `share`; `sees`: the model has a vision tower.

    Raises:
      UserError: an invalid share of the data, or an unknown `compute`.
    """
    one_of("compute", compute, COMPUTE)
    if not 0 <= data_fraction <= 1:
        raise UserError(
            f"data={data_fraction:g} must be a share of the training data: between 0 and 1, or for example 5%"
        )
    trains = compute if data_fraction else "none"
    rule = next(
        rule
        for rule in guide.rules
        if rule.compute == trains and min(share, 1.0) <= rule.up_to and rule.speed in (None, speed)
    )
    needed = guide.data.least if share < guide.data.suffices_below else 1.0
    used = min(data_fraction, needed) if rule.recovery != "none" else 0.0
    expected = _expected(rule, sees, share, used, guide)
    shown = {id(row) for one in expected for row in one.rows}
    beside = [row for row in guide.evidence if abs(row.decoder_ratio - share) <= guide.at and id(row) not in shown]
    notes = list(_data_notes(data_fraction, needed, compute, rule, guide))
    if not sees:
        notes.append(
            "The guide is for models with a vision tower; for decoders there are only this project's text measurements."
        )
    if not any(one.alike for one in expected):
        notes.append("No measurement of a similar model predicts the result: evaluate it before use.")
    nominal, average, five_percent = ALWAYS
    named = [*((nominal, average) if sees else ()), *rule.conflicts]
    named += [five_percent] if used and sees else []
    variants = {method: _settings(rule, method, guide) for method in rule.methods}
    return Recommendation(
        rule=rule,
        ratio=ratio,
        decoder_ratio=share,
        data_fraction=used,
        expected=tuple(expected),
        beside=tuple(beside),
        speed=guide.speed if speed else (),
        conflicts=tuple(guide.conflicts[name] for name in named),
        notes=tuple(notes),
        variants=variants,
    )


def _settings(rule: Rule, method: str, guide: Guide) -> dict[str, Any]:
    """Return the partial experiment of a rule; if both methods are tried, only width is reconstructed."""
    words = [method, rule.recovery]
    if rule.reconstruct and (method == "width" or len(rule.methods) == 1):
        words.append(SOLVED)
    settings: dict[str, Any] = {}
    for word in words:
        settings |= guide.settings[word]
    return settings


def _data_notes(available: float, needed: float, compute: str, rule: Rule, guide: Guide) -> Iterable[str]:
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


def _expected(rule: Rule, sees: bool, share: float, used: float, guide: Guide) -> list[Expected]:
    """Return the expectation from each source; sources of similar models (with or without tower) come first."""
    expected = []
    for name, source in sorted(guide.sources.items(), key=lambda item: item[1].vision != sees):
        rows = [row for row in guide.evidence if row.source == name and row.method in rule.methods]
        kind = next((kind for kind in rule.evidence if any(row.recovery == kind for row in rows)), None)
        of_kind = _nearest_data([row for row in rows if row.recovery == kind], used)
        near = _near(of_kind, share, guide.at)
        if near is not None:
            expected.append(Expected(name, source, source.vision == sees, *near))
    return expected


def _nearest_data(rows: Sequence[Evidence], used: float) -> list[Evidence]:
    """Return the rows with the share of the data nearest to `used`, and those without a share."""
    shares = [row.data_fraction for row in rows if row.data_fraction is not None]
    nearest = min(shares, key=lambda share: abs(share - used), default=None)
    return [row for row in rows if row.data_fraction in (None, nearest)]


def _near(rows: Sequence[Evidence], share: float, at: float) -> tuple[float | None, float, tuple[Evidence, ...]] | None:
    """Return the range that rows at a ratio retained; for models without such rows, from their neighbouring ratios.

    A larger cut leaves less: its rows are the low end, those of the next smaller cut the high end, or the unpruned
    model.
    """
    lows, highs, used = list[float](), list[float](), list[Evidence]()
    for key in dict.fromkeys((row.model, row.method) for row in rows):
        series = [row for row in rows if (row.model, row.method) == key]
        low = high = [row for row in series if abs(row.decoder_ratio - share) <= at]
        if not low:
            up = min((row.decoder_ratio for row in series if row.decoder_ratio > share), default=None)
            down = max((row.decoder_ratio for row in series if row.decoder_ratio < share), default=None)
            low, high = ([row for row in series if row.decoder_ratio == end] for end in (up, down))
        used += [*high, *(row for row in low if row not in high)]
        lows += [row.bounds[0] for row in low if row.counts]
        highs += [row.bounds[1] for row in high if row.counts]
    return (min(lows, default=None), max(highs, default=100.0), tuple(used)) if lows or highs else None
