"""The section `evaluate`: evaluation sets, and how they are answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import MAX_ROWS, check_settings, evaluate_setting, setting, settings_of
from vlmprune_jax.run.evaluation.metrics import METRICS


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
