"""The sections `evaluate` (evaluation sets, and how they are answered) and `speed` (the prompt that is timed)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import MAX_ROWS, check_settings, evaluate_setting, setting, settings_of, speed_setting
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.run.evaluation.metrics import METRICS

_MAX_TOKENS = 2**20  # of a prompt or an answer that is timed


@dataclass(frozen=True)
class EvaluateSpec:
    """Settings of the evaluation of every model by greedy answers to questions and by perplexity of texts.

    `sets`: evaluation sets by name; their settings replace the settings of `evaluate`. Without `sets`, the set
    "questions" is `data.eval`, and the set "text" is the file `evaluate.text`.
    """

    batch_size: int = evaluate_setting(32, "Number of questions per batch.", unit="rows", least=1, most=MAX_ROWS)
    max_length: int | None = evaluate_setting(
        None,
        "Maximum length of a prompt, image tokens included; longer prompts are refused (None = no limit).",
        unit="tokens",
        least=1,
    )
    max_new_tokens: int = evaluate_setting(
        16, "Maximum length of a generated answer; longer answers are cut off.", unit="tokens", least=1
    )
    questions: int | None = evaluate_setting(
        None, "Number of questions to ask, from the start of the set (None = all).", unit="questions", least=1
    )
    unrecovered: bool = setting(True, "Evaluate the pruned model also before reconstruction and before recovery.")
    metric: str = setting(
        "exact_match",
        "Metric that scores the answers; after a change, stored answers are scored again.",
        choices=METRICS,
    )
    prompt_suffix: str = evaluate_setting(
        "",
        "Text appended to the last question of a record, such as "
        '"\\nAnswer the question using a single word or phrase."',
    )
    text: str | None = evaluate_setting(None, "Text file for measuring perplexity.", by_content=True)
    text_window: int = evaluate_setting(512, "Context window for perplexity.", unit="tokens", least=2)
    mesh: tuple[int, ...] = setting(
        (),
        "Numbers of devices along the axes (data, fsdp, tensor) of the device grid for evaluation (() = all devices of "
        "the section `mesh`, arranged for generation: `tensor` alone splits the weights, so that no device gathers "
        "them).",
        unit="devices",
        least=-1,
    )
    sets: Mapping[str, EvaluationSetSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_settings("evaluate", self)
        if self.mesh and len(self.mesh) != 3:
            raise UserError(f"evaluate.mesh={self.mesh}: must be three sizes, (data, fsdp, tensor), or ()")


def _of_set(name: str) -> Any:
    """Declare a setting of one evaluation set that replaces the setting of `evaluate` with this name."""
    shared = settings_of(EvaluateSpec)[name]
    sentence = f"{shared.sentence.partition(' (')[0].rstrip('.')} (None = as in `evaluate`)."
    return field(default=None, metadata={"setting": replace(shared, default=None, sentence=sentence)})


@dataclass(frozen=True)
class EvaluationSetSpec:
    """Settings of one evaluation set (questions, or a text for perplexity); defaults are the settings of `evaluate`."""

    data: str | None = evaluate_setting(
        None, "Evaluation records of this set, in the formats of `data.train` (None = `data.eval`).", by_content=True
    )
    images: str | None = evaluate_setting(
        None, "Folder of this set's images (None = `data.eval_images`).", by_content=True
    )
    text: str | None = evaluate_setting(
        None, "Text file for perplexity, evaluated instead of questions.", by_content=True
    )
    metric: str | None = setting(
        None,
        "Metric that scores the answers (None = `evaluate.metric`, or perplexity if `text` is set).",
        choices=METRICS,
    )
    prompt_suffix: str | None = _of_set("prompt_suffix")
    max_new_tokens: int | None = _of_set("max_new_tokens")
    questions: int | None = _of_set("questions")
    text_window: int | None = _of_set("text_window")

    def __post_init__(self) -> None:
        check_settings("evaluate.sets", self)
        of_questions = (self.data, self.images, self.prompt_suffix, self.questions, self.max_new_tokens)
        if self.text is not None and any(of_questions):
            raise UserError(
                f"evaluate.sets: a set cannot have both a text ({self.text}) and questions: remove text, or data, "
                "images, prompt_suffix, questions and max_new_tokens"
            )
        if self.text is None and self.text_window is not None:
            raise UserError(f"evaluate.sets: text_window={self.text_window} needs a text: set text, or remove it")


@dataclass(frozen=True)
class SpeedConfig:
    """Settings of the speed measurement, in which models take turns on this machine.

    The FLOPs in the report are for the same prompt.
    """

    rounds: int = speed_setting(5, "Number of measurements per model (0 = none).", least=0, most=1000)
    prompt_tokens: int = speed_setting(
        640, "Length of the prompt, including the tokens of its image.", unit="tokens", least=1, most=_MAX_TOKENS
    )
    new_tokens: int = speed_setting(
        64, "Number of tokens to generate after the first one.", unit="tokens", least=1, most=_MAX_TOKENS
    )
    batch_size: int = speed_setting(1, "Number of prompts processed together.", unit="rows", least=1, most=8192)
    image: bool = speed_setting(True, "Put an image at the start of every prompt, if the model takes images.")

    def __post_init__(self) -> None:
        check_settings("speed", self)

    def with_image(self, cfg: ModelConfig) -> bool:
        """Return True if speed prompts for this model begin with an image."""
        return self.image and cfg.vision is not None and cfg.image_token_id is not None

    def check(self, cfg: ModelConfig, named: str = "speed.") -> None:
        """Raise UserError if the model cannot take the workload's prompt; messages prefix settings with `named`."""
        cfg.check_row(f"{named}prompt_tokens + new_tokens + 1", self.prompt_tokens + self.new_tokens + 1)
        if self.with_image(cfg) and cfg.tokens_per_image >= self.prompt_tokens:
            raise UserError(
                f"{named}prompt_tokens={self.prompt_tokens} must be more than the {cfg.tokens_per_image} tokens of an "
                f"image: raise it, or set {named}image=False"
            )
