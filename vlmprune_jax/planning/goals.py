"""Comparison of pruning, quantisation, fewer image tokens and a smaller vocabulary for a goal, such as decode time.

Gains are computed from lower bounds on TPU chips, or were measured in llama.cpp.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune_jax.core.checks import one_of
from vlmprune_jax.core.chips import Chip, slice_of
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.settings import override
from vlmprune_jax.data.preparation import Preparation
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.families.gguf import ENGINE
from vlmprune_jax.hf.read import read_config, resolve
from vlmprune_jax.models.params import count_params
from vlmprune_jax.planning.case import predict_plan, preparation_of, typical_vocabulary
from vlmprune_jax.planning.guide import MEASURED, Guide, Speed
from vlmprune_jax.planning.questions import BATCH, BENCHMARKS, WEIGHT_FORMATS, bound, prompt_of, weight_bytes
from vlmprune_jax.prune.config import VocabularyConfig

MEASURED_ON = ENGINE.replace("_", ".")
NEAR = 0.08  # maximum difference between requested and measured removed share of the decoder
TPU = "v5e:2x4"  # slice of --on=tpu
RATIO = 0.3  # share of the decoder that the compared plans remove, if none is given
VOCABULARY = 32_768  # tokens of the compared smaller vocabulary


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
    """One way to make a model cheaper, with the resulting cost, and how many times lower that is than before.

    `value`: cost in the goal's unit; None if the model does not fit on the slice. `gain`: cost of the unchanged model
    divided by `value`; None if either model does not fit.
    """

    name: str
    value: float | None
    gain: float | None

    @property
    def least(self) -> str:
        """Cost as text, or "does not fit"."""
        return "does not fit" if self.value is None else f"{self.value:.3g}"


def check_goal(goal: str, on: str) -> None:
    """Raise UserError if there are neither measurements nor estimates of a goal on the machine `on`."""
    if goal == "energy":
        raise UserError(
            "--for=energy: no machine of our measurements has a readable energy counter (RAPL, NVML), and TPUs have "
            "none: measure joules per question with `vlmprune run` on yours"
        )
    one_of("--for", goal, (*GOALS, "energy"))
    if on in ("gpu", "cpu"):
        raise UserError(
            f"--on={on}: nothing was measured there: use --on={MEASURED_ON} (measured on a CPU) or a TPU slice such as "
            f"{TPU}, or measure on yours with `vlmprune bench --questions`"
        )
    if on == MEASURED_ON and goal not in MEASURED:
        raise UserError(f"--for={goal}: {MEASURED_ON} was measured with single questions only: use --for=question")


def measured(hf_dir: str, *, vision_dir: str | None, ratio: float | None, guide: Guide) -> list[Speed]:
    """Return gains measured in llama.cpp, for the unpruned model and for models with about this share removed.

    Args:
      hf_dir, vision_dir: see `load`.
      ratio: share of all parameters that pruning removes; None: 30 % of the decoder.
      guide: the decision guide, whose `speed` has the measurements.

    Raises UserError if the model is missing, or no share near this one was measured.
    """
    _, cfg = read_config(resolve(hf_dir), None if vision_dir is None else resolve(vision_dir))
    share = RATIO if ratio is None else ratio * count_params(cfg) / count_params(cfg, "text")
    pruned = [row for row in guide.speed if row.method != "none"]
    near = [row for row in pruned if abs(row.removed - share) <= NEAR]
    if not near:
        least, most = (100 * end([row.removed for row in pruned], default=0.0) for end in (min, max))
        raise UserError(
            f"--ratio: {100 * share:.0f} % of the decoder was not measured in {MEASURED_ON}: use {least:.0f} to "
            f"{most:.0f} %"
        )
    return [*(row for row in guide.speed if row.method == "none"), *near]


@dataclass(frozen=True)
class _Case:
    """A model to compare: config, images, and whether its weights may be quantised in the comparison."""

    name: str
    cfg: ModelConfig
    preparation: Preparation | None


def compare(hf_dir: str, goal: str, topology: str, *, vision_dir: str | None, ratio: float | None) -> list[Choice]:
    """Return the estimated cost on a TPU slice after pruning, quantising or with fewer tokens, the cheapest first.

    Bounds: arithmetic at peak, weights and cache read once, mean of nine benchmarks' questions
    (`planning.questions.BENCHMARKS`). Only JSON files of the model are read.

    Args:
      hf_dir, vision_dir: see `load`.
      goal: one of `GOALS`.
      topology: TPU slice, such as "v5e:2x4".
      ratio: share of all parameters that pruning removes; None: 30 % of the decoder.

    Raises UserError if the model is missing or the slice is unknown.
    """
    folder = resolve(hf_dir)
    _, cfg = read_config(folder, None if vision_dir is None else resolve(vision_dir))
    share = RATIO * count_params(cfg, "text") / count_params(cfg) if ratio is None else ratio
    chip, chips = slice_of(topology)
    forms = [name for name, form in WEIGHT_FORMATS.items() if chip.int8 or not form.int8]
    values = dict[str, float | None]()
    for case in _cases(cfg, folder, share):
        for form in forms:
            label = {"bf16": case.name}.get(form, f"{case.name}, {form}" if case.name else form)
            values[label] = _value(GOALS[goal], goal, case, chip, chips, form)
    own = values[""]
    choices = [
        Choice(name or "as it is", value, None if own is None or value is None else own / value)
        for name, value in values.items()
    ]
    return sorted(choices, key=lambda choice: math.inf if choice.value is None else choice.value)


def _cases(cfg: ModelConfig, folder: Path, share: float) -> Iterator[_Case]:
    """Yield the model, pruned models, and models with half the image tokens or a smaller vocabulary."""
    data = Experiment().data
    preparation = preparation_of(data, cfg, folder)
    yield _Case("", cfg, preparation)
    percent = f"{100 * share * count_params(cfg) / count_params(cfg, 'text'):.0f} % of the decoder"
    for name, settings in (("layers", {"method": "depth"}), ("widths", {"method": "width", "align_to": "tpu"})):
        plan = _plan(cfg, {"ratio": share, **settings})
        if plan is not None:
            yield _Case(f"without {percent} by {name}", plan, preparation)
    half = _half_the_tokens(data, cfg, folder, preparation)
    if half is not None:
        yield _Case("half the image tokens", cfg, half)
    trimmed = typical_vocabulary(VocabularyConfig(size=VOCABULARY), cfg)
    if trimmed is not None and cfg.text.vocab_size > VOCABULARY:
        yield _Case(f"a vocabulary of {VOCABULARY:,}", trimmed.apply_to(cfg), preparation)


def _plan(cfg: ModelConfig, settings: Mapping[str, Any]) -> ModelConfig | None:
    """Return the model config after predicted pruning with these settings; None if the model cannot be pruned so."""
    try:
        return predict_plan(override(Experiment(), {"prune": settings}), cfg).apply_to(cfg)
    except UserError:
        return None


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
