"""Comparison of pruning, quantisation, fewer image tokens and a smaller vocabulary for a goal, such as decode time.

Gains are computed from lower bounds on TPU chips. No model's gains in llama.cpp follow from those of another.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.chips import Chip, slice_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune import PrunePlan
from vlmprune_jax.core.prune.config import VocabularyConfig
from vlmprune_jax.io.data.preparation import Preparation
from vlmprune_jax.io.families.gguf import ENGINE
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.planning.case import preparation_of, typical_vocabulary
from vlmprune_jax.run.planning.guide import METHODS
from vlmprune_jax.run.planning.questions import BATCH, BENCHMARKS, WEIGHT_FORMATS, bound, prompt_of, weight_bytes

LOCAL = ("cpu", "gpu", ENGINE.replace("_", "."))  # machines and engines without estimates
TPU = "v5e:2x4"  # slice of --on=tpu
RATIO = 0.3  # share of the decoder to remove, if none is given
UNCHANGED, UNQUANTISED = "as it is", "bf16"
SAME = 1.05  # gains within this factor of each other count as equal
VOCABULARY = 32_768  # tokens of the compared smaller vocabulary

NOTE = (
    "lower bounds, computed from FLOPs and bytes for questions of nine benchmarks; nothing ran. They do not include "
    "accuracy: the advice has what pruning retains, docs/explanation/study.md has the accuracy of 8 and 4 bits"
)


@dataclass(frozen=True)
class Goal:
    """Cost that the user wants to reduce; `single`: True if questions are answered one at a time."""

    unit: str
    single: bool


GOALS = {
    "memory": Goal("GB of weights", single=True),
    "decode": Goal("ms a token, one stream", single=True),
    "question": Goal("ms a question, one at a time", single=True),
    "throughput": Goal("chip-s for 1,000 questions", single=False),
}


@dataclass(frozen=True)
class Choice:
    """One way to make a model cheaper: its cost, and how many times lower that is than the unchanged model's.

    `method`: its pruning method, None if nothing is pruned. `form`: format of its weights. `cost`: as text. `gain`:
    None if this model or the unchanged one does not fit.
    """

    name: str
    method: str | None
    form: str
    cost: str
    gain: float | None


@dataclass(frozen=True)
class Ranking:
    """Ways to make a model cheaper for a goal, the best first, with a title and a note on where they are from."""

    title: str
    note: str
    choices: tuple[Choice, ...]

    @property
    def gains(self) -> dict[str, float]:
        """Largest gain of each pruning method with unquantised weights."""
        pruned = (choice for choice in reversed(self.choices) if choice.method and choice.form == UNQUANTISED)
        return {choice.method: choice.gain for choice in pruned if choice.method and choice.gain}

    @property
    def methods(self) -> tuple[str, ...]:
        """Pruning methods that gain the most; all if none could be compared."""
        most = max(self.gains.values(), default=0.0)
        return tuple(name for name in METHODS if self.gains.get(name, 0.0) * SAME >= most)

    @property
    def summary(self) -> str:
        """Gains of the best pruning methods, and of quantising alone if that gains more."""
        ways = [(f"{name} pruning", self.gains.get(name, 0.0)) for name in self.methods]
        alone = max((choice for choice in self.choices if not choice.method), key=lambda choice: choice.gain or 0.0)
        if (alone.gain or 0.0) > ways[0][1]:
            ways.append((f"{alone.name} without pruning", alone.gain or 0.0))
        return "; ".join(f"{name}: {gain:.3g} times less" if gain else f"{name}: unknown" for name, gain in ways)


def rank(cfg: ModelConfig, folder: Path, goal: str, on: str, plans: Mapping[str, PrunePlan]) -> Ranking:
    """Return the ways to make a model cheaper for a goal, by lower bounds on a TPU slice.

    Args:
      cfg, folder: the unpruned model, and its folder, which says how images are prepared.
      goal: one of `GOALS`.
      on: "tpu", or a TPU slice such as "v5e:2x4".
      plans: plan of each pruning method.

    Raises UserError if the goal or slice is unknown, or for llama.cpp, CPUs and GPUs.
    """
    one_of("--for", goal, GOALS)
    if on in LOCAL:
        raise UserError(
            f"--on={on}: gains depend on the model's shapes, and this model was not measured there: use a TPU slice "
            f"such as --on={TPU} (estimated), or measure its exports with `vlmprune bench`"
        )
    topology = TPU if on == "tpu" else on
    return Ranking(f"Lowest {GOALS[goal].unit}, on {topology}", NOTE, compare(cfg, folder, goal, topology, plans))


@dataclass(frozen=True)
class _Case:
    """A model to compare: its name, pruning method (None if not pruned), config, and preparation of images."""

    name: str
    method: str | None
    cfg: ModelConfig
    preparation: Preparation | None


def compare(
    cfg: ModelConfig, folder: Path, goal: str, topology: str, plans: Mapping[str, PrunePlan]
) -> tuple[Choice, ...]:
    """Return the estimated cost on a TPU slice after pruning, quantising or with fewer tokens, the cheapest first.

    Bounds: arithmetic at peak, weights and cache read once, mean of nine benchmarks' questions
    (`planning.questions.BENCHMARKS`). Raises UserError if the slice is unknown.
    """
    chip, chips = slice_of(topology)
    forms = [name for name, form in WEIGHT_FORMATS.items() if chip.int8 or not form.int8]
    choices, own = [], None
    for case, form in itertools.product(_cases(cfg, folder, plans), forms):
        name = ", ".join(filter(None, (case.name, "" if form == UNQUANTISED else form))) or UNCHANGED
        value = _value(GOALS[goal], goal, case, chip, chips, form)
        own = value if name == UNCHANGED else own
        gain = None if own is None or value is None else own / value
        cost = "does not fit" if value is None else f"{value:.3g}"
        choices.append((math.inf if value is None else value, Choice(name, case.method, form, cost, gain)))
    return tuple(choice for _, choice in sorted(choices, key=lambda pair: pair[0]))


def _cases(cfg: ModelConfig, folder: Path, plans: Mapping[str, PrunePlan]) -> Iterator[_Case]:
    """Yield the model, pruned models, and models with half the image tokens or a smaller vocabulary."""
    data = Experiment().data
    preparation = preparation_of(data, cfg, folder)
    yield _Case("", None, cfg, preparation)
    for method, plan in plans.items():
        of_decoder = plan.actual_ratio * count_params(cfg) / count_params(cfg, "text")
        name = f"{method} {100 * plan.actual_ratio:.3g} % ({100 * of_decoder:.3g} % of the decoder)"
        yield _Case(name, method, plan.apply_to(cfg), preparation)
    half = _half_the_tokens(data, cfg, folder, preparation)
    if half is not None:
        yield _Case("half the image tokens", None, cfg, half)
    trimmed = typical_vocabulary(VocabularyConfig(size=VOCABULARY), cfg)
    if trimmed is not None and cfg.text.vocab_size > VOCABULARY:
        yield _Case(f"a vocabulary of {VOCABULARY:,}", None, trimmed.apply_to(cfg), preparation)


def _half_the_tokens(data: Any, cfg: ModelConfig, folder: Path, preparation: Preparation | None) -> Preparation | None:
    """Return image preparation with at most half the image tokens; None if the model's images have one size."""
    if preparation is None:
        return None
    most = max(image.positions(cfg.tokens_per_image) for image in _images(preparation))
    try:
        return preparation_of(dataclasses.replace(data, max_image_tokens=most // 2), cfg, folder)
    except UserError:
        return None


def _images(preparation: Preparation) -> Sequence[Any]:
    return [preparation.image_shape(question.width, question.height, 1) for question in BENCHMARKS.values()]


def _value(goal: Goal, name: str, case: _Case, chip: Chip, chips: int, form: str) -> float | None:
    """Return a model's cost in the unit of the goal; None if the model does not fit on the slice."""
    if name == "memory":
        return sum(weight_bytes(case.cfg, form).values()) / 1e9
    total = 0.0
    for question in BENCHMARKS.values():
        length, image = prompt_of(case.cfg, case.preparation, question)
        try:
            least = bound(case.cfg, chip, chips, form, length, image, question.answer, 1 if goal.single else None)
        except UserError:
            return None
        if name == "decode":
            total += 1000 * least.decode / (question.answer - 1)
        elif goal.single:
            total += 1000 * least.seconds
        else:
            total += chips * sum(least.phases(BATCH, chips).values())
    return total / len(BENCHMARKS)
