"""Which cut, recovered how: the paper's decision guide and what this project measured, as rules over `guide.json`.

That file holds rules (the first that fits decides), rows of evidence, the settings that each word of advice stands for,
and where the guide contradicts itself. `tools/study_guide.py` adds the rows of a sweep to it.
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
    """Where rows are from; `measure`: what of the unpruned model is retained, in %. `vision`: of models that see."""

    title: str
    measure: str
    vision: bool


@dataclass(frozen=True)
class Evidence:
    """What one way to prune and recover retained of a model, in %.

    `recovery`: "none", "projector", "sft", "sft_l2", ...; "reconstruct" before it, or alone, where weights were solved
    for. `decoder_ratio`: share of the decoder's parameters that went; of the paper its nominal ratio, which is nearest
    to that. `interval`: 95 %, over `seeds` runs, or over questions where there is one. What does not `count` is shown
    and left out of ranges, for the reason in `note`.
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
    """Advice for a budget of training (`compute`), and ratios of the decoder up to `up_to` that no rule before it took.

    `speed`: only where speed matters, or None. `evidence`: recoveries whose rows say what to expect; of each source the
    first that it has. `source`: what the advice is from. `supported`: whether anything speaks for it.
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
    """Decoding of a pruned model, in times of the unpruned one's."""

    model: str
    method: str
    removed: Finite
    format: str
    decode: Finite


@dataclass(frozen=True)
class Data:
    """`least`: the smallest share of the training data that was measured, which suffices below a ratio."""

    least: Finite
    suffices_below: Finite


@dataclass(frozen=True)
class Guide:
    """`guide.json`. `at`: ratios this near count as equal. `settings`: a partial experiment for each word of advice."""

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
    """What the rows of one source leave of the unpruned model: from `low` (None: nobody went so far) to `high` %.

    `alike`: they are of models that see, or not, as the one asked about.
    """

    name: str
    source: Source
    alike: bool
    low: float | None
    high: float
    rows: tuple[Evidence, ...]


@dataclass(frozen=True)
class Recommendation:
    """The rule that fits, what it leads to and what speaks for it.

    `data_fraction`: of the training data, to train on; 0 without training. `beside`: other rows at a like ratio.
    `conflicts`: what in the sources speaks against each other here. `notes`: what the asker should know.
    `variants`: a partial experiment for each method advised.
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
    """The guide, of the package or one that `tools/study_guide.py` wrote.

    Raises:
      UserError: it is missing or damaged.
    """
    found = read_json(path, Guide, missing="no such file", todo=_TODO)
    guide = msgspec.convert(found, Guide)
    problem = next(_problems(guide), None)
    if problem is not None:
        raise UserError(f"{path}: {problem}: {_TODO}")
    return guide


def _problems(guide: Guide) -> Iterator[str]:
    """What a schema cannot say: which names must be known, and that some rule fits whatever is asked."""
    if guide.version != VERSION:
        yield f"is of version {guide.version}, this is {VERSION}"
    for row in guide.evidence:
        if row.source not in guide.sources:
            yield f"a row is from {row.source!r}, which is none of its sources"
    for rule in guide.rules:
        for name in (*rule.methods, rule.recovery, *([SOLVED] if rule.reconstruct else [])):
            if name not in guide.settings:
                yield f"rule {rule.name!r} advises {name!r}, which has no settings"
        if not rule.methods or not {*rule.methods} <= {*METHODS} or rule.recovery not in RECOVERIES:
            yield f"rule {rule.name!r} must advise of {', '.join(METHODS)} and one of {', '.join(RECOVERIES)}"
        if any(name not in guide.conflicts for name in rule.conflicts):
            yield f"rule {rule.name!r} names a conflict that is not there"
    for compute in COMPUTE:
        if not any(rule.compute == compute and rule.up_to >= 1 and rule.speed is None for rule in guide.rules):
            yield f"no rule of {compute!r} fits every ratio"
    if any(name not in guide.conflicts for name in ALWAYS):
        yield f"{', '.join(ALWAYS)} must be among its conflicts"


def as_json(guide: Guide) -> str:
    """The text of `guide.json`, a line for each rule and row."""
    parts = []
    for name, value in msgspec.to_builtins(guide).items():
        if isinstance(value, dict):
            inner, ends = [f"{json.dumps(key)}: {_line(one)}" for key, one in value.items()], "{}"
        elif isinstance(value, list | tuple):
            inner, ends = [_line(one) for one in value], "[]"
        else:
            parts.append(f" {json.dumps(name)}: {_line(value)}")
            continue
        parts.append(f" {json.dumps(name)}: {ends[0]}\n  " + ",\n  ".join(inner) + f"\n {ends[1]}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def recommend(
    cfg: ModelConfig, *, ratio: float, data_fraction: float, compute: str, speed: bool, guide: Guide
) -> Recommendation:
    """What the guide advises for a model (arXiv 2604.24380, decision guide, with this project's numbers beside it).

    Args:
      ratio: share of the whole model's parameters to remove.
      data_fraction: share of the training data that is there; 0: none.
      compute: "none" (no training), "projector" (the projector alone) or "full" (adapters, with the teacher).
      speed: whether the pruned model's speed matters as much as its accuracy.

    Raises:
      UserError: a ratio or share that cannot be, an unknown word, or a projector to train where there is none.
    """
    if not fraction("ratio", ratio):
        raise UserError("ratio=0 must be above 0: nothing would go")
    if compute == "projector" and cfg.projector is None:
        raise UserError("compute='projector': this model has no projector: use none or full")
    share, sees = ratio * count_params(cfg) / count_params(cfg, "text"), cfg.vision is not None
    return recommend_for(ratio, share, sees, data_fraction=data_fraction, compute=compute, speed=speed, guide=guide)


def recommend_for(
    ratio: float, share: float, sees: bool, *, data_fraction: float, compute: str, speed: bool, guide: Guide
) -> Recommendation:
    """`recommend` without the model: `share` is that of the decoder, `sees` whether there is a vision tower.

    Raises:
      UserError: a share of the data that cannot be, or an unknown word.
    """
    one_of("compute", compute, COMPUTE)
    if not 0 <= data_fraction <= 1:
        raise UserError(f"data={data_fraction:g} must be a share of the training data: 0 to 1, or 5%")
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
        notes.append("The guide is of models with a vision tower; of a decoder alone only this project's texts tell.")
    if not any(one.alike for one in expected):
        notes.append("Nothing measured says what to expect here: evaluate before you rely on it.")
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
    """The partial experiment of a rule; widths alone are reconstructed where both methods are tried."""
    words = [method, rule.recovery]
    if rule.reconstruct and (method == "width" or len(rule.methods) == 1):
        words.append(SOLVED)
    settings: dict[str, Any] = {}
    for word in words:
        settings |= guide.settings[word]
    return settings


def _data_notes(given: float, needed: float, compute: str, rule: Rule, guide: Guide) -> Iterable[str]:
    if rule.recovery == "none":
        if compute != "none":
            yield "Without data nothing can be trained: this is the advice without training."
        yield "Scores and reconstruction still take some 50 to 500 records of the kind that the model is for."
    elif given < guide.data.least:
        yield f"Nothing was measured with less than {100 * guide.data.least:g} % of the training data."
    elif given < needed:
        yield f"At such a ratio the guide asks for all of the training data; there are {100 * given:g} %."
    elif given > needed:
        yield f"{100 * needed:g} % of the data should do by the guide; more can be tried with --config.data.fraction."


def _expected(rule: Rule, sees: bool, share: float, used: float, guide: Guide) -> list[Expected]:
    """What each source says of the advice; sources of models like this one (seeing or not) come first."""
    found = []
    for name, source in sorted(guide.sources.items(), key=lambda item: item[1].vision != sees):
        rows = [row for row in guide.evidence if row.source == name and row.method in rule.methods]
        kind = next((kind for kind in rule.evidence if any(row.recovery == kind for row in rows)), None)
        of_kind = _nearest_data([row for row in rows if row.recovery == kind], used)
        near = _near(of_kind, share, guide.at)
        if near is not None:
            found.append(Expected(name, source, source.vision == sees, *near))
    return found


def _nearest_data(rows: Sequence[Evidence], used: float) -> list[Evidence]:
    """Rows of the share of the data nearest to what is used, and those that do not tell theirs."""
    told = [row.data_fraction for row in rows if row.data_fraction is not None]
    nearest = min(told, key=lambda one: abs(one - used), default=None)
    return [row for row in rows if row.data_fraction in (None, nearest)]


def _near(rows: Sequence[Evidence], share: float, at: float) -> tuple[float | None, float, tuple[Evidence, ...]] | None:
    """The range of what rows at a ratio retained; of a model that has none, from its rows around it.

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
