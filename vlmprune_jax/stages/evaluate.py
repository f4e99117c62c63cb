"""What one model folder says to every evaluation set, and what that is worth -> `eval/<name>.json`.

Asking is a stage of its own for every set: adding one repeats no other. What the answers are worth is worked out anew
from the answers on disk each time, in moments: another metric, or a mended one, asks the model nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import Count, Finite, read_json_lines, read_text, reading
from vlmprune_jax.core.settings import settings_of
from vlmprune_jax.data import inputs
from vlmprune_jax.data.records import Record
from vlmprune_jax.distributed.mesh import on_process_zero, row_ways
from vlmprune_jax.evaluation.config import EvaluationSetSpec
from vlmprune_jax.evaluation.inputs import arranged_questions, evaluation_records
from vlmprune_jax.evaluation.metrics import METRICS
from vlmprune_jax.evaluation.metrics.metric import Scores
from vlmprune_jax.evaluation.runner import ask, check_answered, log_likelihoods
from vlmprune_jax.evaluation.statistics import is_quick, retained_interval
from vlmprune_jax.experiment.arguments import QUESTIONS, evaluation_sets
from vlmprune_jax.experiment.spec import Experiment, affecting
from vlmprune_jax.models.params import count_params
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.stages.context import (
    Context,
    journal_of,
    journal_path,
    load_model,
    mesh_of,
    model_inputs,
)
from vlmprune_jax.stages.tasks import evaluate_tasks
from vlmprune_jax.workdir.artefact import write_artefact
from vlmprune_jax.workdir.evaluation import TEACHER, Evaluated, as_columns, as_groups, evaluation_file, metric_info
from vlmprune_jax.workdir.ledger import Json, write_text


class _Facts(TypedDict):
    parameters: Count
    model_seconds: Finite


class _QuestionFacts(_Facts):
    questions: Count
    mean_generated_tokens: Finite


class _TextFacts(_Facts):
    tokens: Count


class _Answer(TypedDict):
    """A line of answers to questions."""

    id: str
    prediction: str
    references: list[str]
    tokens: Count


class _Window(TypedDict):
    """A line of a text."""

    nll: float
    tokens: Count


def evaluate_stage(
    experiment: Experiment, model_folder: Path, out: Path, name: str, context: Context
) -> dict[str, Evaluated]:
    """Evaluations of one folder by set -> `eval/<name>.json`, of other sets than "questions"
    `eval/<name>.<set>.json`; the answers beside. The tasks of lmms-eval are sets like any other.
    """
    model = functools.cache(
        lambda: load_model(experiment.model, experiment.mesh, model_folder)
    )  # for the first set that needs it
    found = {
        key: _evaluate_set(experiment, key, of, model_folder, model, out, name, context)
        for key, of in evaluation_sets(experiment).items()
    }
    return found | evaluate_tasks(experiment, model_folder, model, out, name, context)


def _evaluate_set(
    experiment: Experiment,
    key: str,
    of: EvaluationSetSpec,
    model_folder: Path,
    model: Callable[[], Model],
    out: Path,
    name: str,
    context: Context,
) -> Evaluated:
    title = name if key == QUESTIONS else f"{name} {key}"
    path = evaluation_file(out, name, key)
    answers = answers_file(path)
    stage = context.stage(
        "evaluate",
        out,
        f"evaluate {title}",
        settings=_settings(experiment, key, of),
        inputs=model_inputs(experiment.model, model=model_folder, **set_files(experiment, key, of)),
        outputs=[answers],
        journals=[journal_path(path)],
        facts=_QuestionFacts if of.text is None else _TextFacts,
    )

    def body() -> Json:
        run = _ask if of.text is None else _read_text
        lines, facts = run(experiment, of, model(), f"evaluate {title}", journal_path(path), context)
        write_text(answers, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return {**facts, "parameters": count_params(model().cfg)}

    facts = context.run(stage, body)
    original = answers_file(evaluation_file(context.workdir, TEACHER, key))
    compared = original if original != answers else None
    found: Evaluated = on_process_zero(lambda: _measure(of, answers, compared, path, facts), Evaluated)
    context.reporter.say(
        f"  {title}: {found.main_line()} ({found.parameters:,} parameters, {found.model_seconds:.1f} s)"
    )
    return found


def answers_file(path: Path) -> Path:
    """Where the answers lie beside an evaluation."""
    return path.with_name(f"{path.stem}.answers.jsonl")


def read_predictions(path: Path) -> list[str]:
    """What a model said to every question, from the answers beside an evaluation.

    Raises:
      UserError: they are not there, or damaged.
    """
    return [line["prediction"] for line in read_json_lines(answers_file(path), _Answer)]


def _settings(experiment: Experiment, key: str, of: EvaluationSetSpec) -> Json:
    """What the answers depend on, the metric not among it."""
    where = "evaluate" if key == QUESTIONS else f"evaluate.sets.{key}"
    shared = affecting("evaluate", experiment)
    if of.text is not None:
        return {f"{where}.text_window": of.text_window} | {
            name: shared[name] for name in ("model.dtype", "evaluate.batch_size")
        }
    for field in settings_of(of):  # the set's own, with those of the experiment in place of what it does not set
        shared.pop(f"evaluate.{field}", None)
    return shared | {
        f"{where}.{field}": getattr(of, field) for field in ("prompt_suffix", "max_new_tokens", "questions")
    }


def set_files(experiment: Experiment, key: str, of: EvaluationSetSpec) -> dict[str, Path | str]:
    """What the set is read from, by name."""
    if of.text is not None:
        return {f"text of {key}": Path(of.text)}
    return inputs.record_files(dataclasses.replace(experiment.data, eval=of.data, eval_images=of.images), "eval")


def _ask(
    experiment: Experiment, of: EvaluationSetSpec, model: Model, title: str, journal: Path, context: Context
) -> tuple[list[Json], Json]:
    """The model's answers to questions, one line each, and facts about them."""
    assert of.max_new_tokens is not None
    model.cfg.check_row("evaluate's max_new_tokens", of.max_new_tokens)
    ways = row_ways(mesh_of(experiment.mesh))
    questions = arranged_questions(experiment.model, experiment.data, experiment.evaluate, of, model.cfg, multiple=ways)
    _check_metric(of, questions.records)  # the last one now, not after hours
    start = time.perf_counter()
    with context.phase(title, len(questions)) as progress:
        replies = ask(
            model,
            questions.batches(threads=experiment.data.threads, prefetch=inputs.PREFETCH),
            tokenizer=questions.encoder.tokenizer,
            max_new_tokens=of.max_new_tokens,
            progress=progress,
            journal=journal_of(experiment.mesh, journal, len(questions)),
        )
    lines = [
        {
            "id": said.record.id,
            "prediction": said.prediction,
            "references": said.record.references,
            "tokens": said.tokens,
        }
        for said in replies
    ]
    mean, seconds = sum(said.tokens for said in replies) / len(replies), round(time.perf_counter() - start, 3)
    return lines, {"questions": len(replies), "mean_generated_tokens": mean, "model_seconds": seconds}


def _check_metric(of: EvaluationSetSpec, records: Sequence[Record]) -> None:
    """Refuse records without a right answer, and those that the metric cannot use, by scoring the right answers."""
    assert of.metric is not None
    check_answered(records)
    metric = METRICS[of.metric]
    metric.values(metric.score_all([record.references[0].strip() for record in records], records), records)


def _read_text(
    experiment: Experiment, of: EvaluationSetSpec, model: Model, title: str, journal: Path, context: Context
) -> tuple[list[Json], Json]:
    """The log-likelihood of a text, one line a batch of windows, and facts about them."""
    assert of.text is not None
    assert of.text_window is not None
    path, size, window = Path(of.text), experiment.evaluate.batch_size, of.text_window
    model.cfg.check_row("evaluate's text_window", window)
    tokenizer = inputs.load_inputs(experiment.model, experiment.data, model.cfg).tokenizer
    text = read_text(path, missing="no such file: evaluate.text names it")
    with reading(path, "give another text"):
        ids = tokenizer(text.replace("\r\n", "\n").replace("\r", "\n"))["input_ids"]
    total, start = -(-len(ids) // (window * size)), time.perf_counter()
    with context.phase(title, total) as progress:
        kept = journal_of(experiment.mesh, journal, total)
        lines = log_likelihoods(model, ids, window=window, batch_size=size, progress=progress, journal=kept)
    seconds = round(time.perf_counter() - start, 3)
    return list(lines), {"tokens": int(sum(line["tokens"] for line in lines)), "model_seconds": seconds}


def _measure(of: EvaluationSetSpec, answers: Path, original: Path | None, path: Path, facts: Json) -> Evaluated:
    """Score the answers in a file, and compare them with the unpruned model's in `original` -> `path`."""
    assert of.metric is not None
    metric = METRICS[of.metric]
    # Whether a lone image's mark may be missing was checked when the records were asked.
    records = () if of.text is not None else evaluation_records(of, image_lead=True)
    scores = _scores(of, answers, records)
    interval = None
    if original is not None and original.exists() and is_quick(metric, scores):
        interval = retained_interval(metric, scores, _scores(of, original, records), records)
    found = Evaluated(
        metric=metric_info(of.metric, metric.describe()),
        values=metric.values(scores, records),
        groups=as_groups(metric.values_of_groups(scores, records)),
        counted="questions" if of.text is None else "tokens",
        count=facts["questions" if of.text is None else "tokens"],
        parameters=facts["parameters"],
        seconds=facts["seconds"],
        model_seconds=facts["model_seconds"],
        mean_generated_tokens=facts.get("mean_generated_tokens"),
        retained_interval=interval,
        answers=answers.name,
        scores=as_columns(scores),
    )
    write_artefact(path, found)
    return found


def _scores(of: EvaluationSetSpec, answers: Path, records: Sequence[Record]) -> Sequence[Scores]:
    """The metric's scores of the answers in a file, or of the windows of a text there."""
    assert of.metric is not None
    if of.text is not None:
        return read_json_lines(answers, _Window)
    lines = read_json_lines(answers, _Answer)
    if len(lines) != len(records):
        raise UserError(f"{answers}: holds {len(lines)} answers to {len(records)} questions: remove it, and run again")
    return METRICS[of.metric].score_all([line["prediction"] for line in lines], records)
