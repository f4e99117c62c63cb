"""The section `evaluate`: evaluation sets, and how they are answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.settings import MAX_ROWS, check_settings, evaluate_setting, setting


@dataclass(frozen=True)
class EvaluationSetSpec:
    """One evaluation set: questions from `data` and `images`, or a `text` file. None means: as in `evaluate`."""

    data: str | None = evaluate_setting(None, "Records of this set (None = `data.eval`).", by_content=True)
    images: str | None = evaluate_setting(
        None, "Folder of the images of this set (None = `data.eval_images`).", by_content=True
    )
    text: str | None = evaluate_setting(None, "Text file for perplexity, instead of records.", by_content=True)
    metric: str | None = setting(
        None,
        "Metric of the answers (None = `evaluate.metric`, or perplexity for a text).",
        choices="evaluation.metrics:METRICS",
    )
    prompt_suffix: str | None = evaluate_setting(None, "Text appended to the last question of a record.")
    max_new_tokens: int | None = evaluate_setting(None, "Maximum length of an answer.", unit="tokens", least=1)
    questions: int | None = evaluate_setting(
        None, "Number of questions to ask, from the start of the set.", unit="questions", least=1
    )
    text_window: int | None = evaluate_setting(
        None, "Length of the context window for perplexity.", unit="tokens", least=2
    )

    def __post_init__(self) -> None:
        check_settings("evaluate.sets", self)
        if self.text is not None and (self.data or self.images or self.prompt_suffix or self.questions):
            raise UserError(
                f"evaluate.sets: a set is either a text ({self.text}) or questions: remove text, or data, images, "
                "prompt_suffix and questions"
            )


@dataclass(frozen=True)
class EvaluateSpec:
    """Evaluation of every model: greedy answers to questions, and perplexity of text.

    `sets` holds evaluation sets by name; a setting of a set replaces the setting of the same name here. Without `sets`,
    the set "questions" is `data.eval`, and the set "text" is the `text` file.
    """

    batch_size: int = evaluate_setting(32, "Number of questions per batch.", unit="rows", least=1, most=MAX_ROWS)
    max_length: int | None = evaluate_setting(
        None,
        "Maximum length of a prompt, image tokens included; longer prompts are refused (None = no limit).",
        unit="tokens",
        least=1,
    )
    max_new_tokens: int = evaluate_setting(16, "Maximum length of an answer.", unit="tokens", least=1)
    questions: int | None = evaluate_setting(
        None, "Number of questions to ask, from the start of the set (None = all).", unit="questions", least=1
    )
    unrecovered: bool = setting(
        True, "Evaluate the pruned model before recovery as well, and before reconstruction if there is one."
    )
    metric: str = setting(
        "exact_match",
        "Metric of the answers; it is recomputed from stored answers each time.",
        choices="evaluation.metrics:METRICS",
    )
    prompt_suffix: str = evaluate_setting(
        "",
        "Text appended to the last question of a record, such as "
        '"\\nAnswer the question using a single word or phrase."',
    )
    text: str | None = evaluate_setting(None, "Text file for perplexity.", by_content=True)
    text_window: int = evaluate_setting(512, "Length of the context window for perplexity.", unit="tokens", least=2)
    tasks: tuple[str, ...] = setting(
        (),
        "lmms-eval tasks to run, each an evaluation set of its own; or on the command line, `vlmprune evaluate "
        "--tasks=pope,mme`.",
    )
    tasks_path: str | None = evaluate_setting(
        None,
        "Folder of lmms-eval task files (NAME.yaml, see configs/lmms), in which ${data} and ${lmms_eval} are replaced. "
        "Other tasks, and all with None, are those of lmms-eval, whose data comes from the hub.",
        by_content=True,
    )
    tasks_data: str | None = evaluate_setting(None, "Folder that ${data} stands for in task files.", by_content=True)
    sets: Mapping[str, EvaluationSetSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_settings("evaluate", self)
