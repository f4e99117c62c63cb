"""Decision guide for pruning and recovery, as a file: the paper's advice and our measurements.

`guide.json` has the rules (the first that fits applies), rows of evidence, and the settings of each recommendation.
`tools/study_guide.py` adds the rows of a sweep; `rules.py` applies the guide.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Finite, read_json

FILE = Path(__file__).with_name("guide.json")
VERSION, SOLVED = 6, "reconstruct"
COMPUTE = ("none", "projector", "full")
METHODS, RECOVERIES = ("depth", "width", "hybrid"), ("none", "projector", "sft_l2")  # choices of recommendations
NEAR = 0.08  # maximum difference between the removed shares of the decoder of a plan and a quoted measurement
PAPER = "paper"  # source of the recipes for models without similar evidence
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
    def made_by(self) -> list[str]:
        """Names of the pruning method and recoveries with which the retention was measured."""
        return [self.method, *self.recovery.split("+"), *(["none"] if self.recovery == SOLVED else [])]


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
        """Return the pruning method and recoveries under their names in `Guide.settings`."""
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
        for name in itertools.chain(*map(rule.words, rule.methods)):
            if name not in guide.settings:
                yield f"rule {rule.name!r} advises {name!r}, which has no settings"
        if not rule.methods or not {*rule.methods} <= {*METHODS} or rule.recovery not in RECOVERIES:
            yield f"rule {rule.name!r} must advise of {', '.join(METHODS)} and one of {', '.join(RECOVERIES)}"
    if guide.data.steps < 1:
        yield f"data.steps is {guide.data.steps}, but must be at least 1"
