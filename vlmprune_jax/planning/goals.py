"""Prune, quantise, fewer image tokens, a smaller vocabulary: what each gains towards a goal, as bounds on TPU chips."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune_jax.core.chips import Chip, slice_of
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.settings import override
from vlmprune_jax.data.preparation import Preparation
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.hf.read import read_config, resolve
from vlmprune_jax.models.params import count_params
from vlmprune_jax.planning.case import predict_plan, preparation_of, typical_vocabulary
from vlmprune_jax.planning.questions import BATCH, BENCHMARKS, WEIGHT_FORMATS, bound, prompt_of, weight_bytes
from vlmprune_jax.prune.config import VocabularyConfig

RATIO = 0.3  # share of the decoder that the compared plans remove, if none is given
VOCABULARY = 32_768  # tokens of the compared smaller vocabulary


@dataclass(frozen=True)
class Goal:
    """Something to make smaller: its unit, and whether it is of one question at a time."""

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
    """One way to make a model cheaper, its value for the goal, and how many times less that is than the model's own.

    `value` is None if the model does not fit on the slice, `gain` if one of the two does not.
    """

    name: str
    value: float | None
    gain: float | None

    @property
    def least(self) -> str:
        """The value as text."""
        return "does not fit" if self.value is None else f"{self.value:.3g}"


@dataclass(frozen=True)
class _Case:
    """A model to compare: config, images, and whether its weights may be quantised in the comparison."""

    name: str
    cfg: ModelConfig
    preparation: Preparation | None


def compare(hf_dir: str, goal: str, topology: str, *, vision_dir: str | None, ratio: float | None) -> list[Choice]:
    """Return what pruning, integers and fewer tokens gain towards a goal on a TPU slice, the best first.

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
    """Return the config of a predicted plan; None if the model has no such plan."""
    try:
        return predict_plan(override(Experiment(), {"prune": settings}), cfg).apply_to(cfg)
    except UserError:
        return None


def _half_the_tokens(data: Any, cfg: ModelConfig, folder: Path, preparation: Preparation | None) -> Preparation | None:
    """Return a preparation of images with half of their largest number of tokens; None if images have one size."""
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
    """Return what a model needs for a goal; None if it does not fit."""
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
