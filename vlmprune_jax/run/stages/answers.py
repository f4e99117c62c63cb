"""The answers of every model on disk -> their scores in `eval/<name>.json`, and sample questions.

Scores are computed from the stored answers each time, which takes seconds: after a change of metric, no model runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Count, read_json_lines
from vlmprune_jax.base.processes import on_process_zero
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.config import EvaluateSpec, EvaluationSetSpec
from vlmprune_jax.run.evaluation.metrics import METRICS
from vlmprune_jax.run.evaluation.metrics.metric import Scores
from vlmprune_jax.run.evaluation.questions import evaluation_records
from vlmprune_jax.run.evaluation.statistics import is_quick, retained_interval
from vlmprune_jax.run.experiment.arguments import evaluation_sets
from vlmprune_jax.run.stages.evaluate import answers_file, evaluation_task, evaluation_works, result_file
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.evaluation import (
    TEACHER,
    UNPRUNED,
    Evaluated,
    MetricInfo,
    as_columns,
    as_groups,
    evaluation_file,
    find_evaluated,
    read_evaluated,
)
from vlmprune_jax.run.workdir.ledger import StageRecord, run_task
from vlmprune_jax.run.workdir.result import Run
from vlmprune_jax.run.workdir.samples import SAMPLES, Samples, make_samples


class _Answer(TypedDict):
    """One line of an answers file: a question's answer."""

    id: str
    prediction: str
    references: list[str]
    tokens: Count


class _Window(TypedDict):
    """One line of a text's answers file: log-likelihoods of one batch of text windows."""

    nll: float
    tokens: Count
    bytes: NotRequired[float]


def evaluate_model(work: Work, start: Path, subject: str) -> dict[str, Evaluated]:
    """Evaluate the model in folder `start` on all evaluation sets; write `eval/<subject>*.json`.

    Raises UserError if an evaluation fails (see `run_task`).
    """
    sets, evaluations = evaluation_sets(work.experiment.data, work.experiment.evaluate), dict[str, Evaluated]()
    for part in evaluation_works(work, start, subject):
        done = run_task(evaluation_task(part), overwrite=work.overwrite, say=work.say)
        evaluations[part.part] = _measure_set(part, sets[part.part], done)
    return evaluations


def read_predictions(path: Path) -> list[str]:
    """Read a model's answers to all questions from its answers file.

    Raises UserError if the file is missing or damaged.
    """
    return [line["prediction"] for line in read_json_lines(answers_file(path), _Answer)]


def _measure_set(work: Work, eval_set: EvaluationSetSpec, done: StageRecord) -> Evaluated:
    """Score a model's answers to an evaluation set, and print one line."""
    path = result_file(work)
    compared = _compared(work, answers_file(path), work.part)
    evaluated: Evaluated = on_process_zero(lambda: _measure(eval_set, path, compared, done), Evaluated)
    size, seconds = f"{evaluated.parameters:,} parameters", f"{evaluated.model_seconds:.1f} s"
    work.say(f"  {work.label}: {evaluated.main_line()} ({size}, {seconds})")
    if work.subject == TEACHER and evaluated.metric.higher_is_better and not evaluated.values[evaluated.metric.main]:
        work.say(
            "  warning: the unpruned model scores 0: compare its answers with the references in "
            f"{answers_file(path)}; the prompt (data.template, data.system, evaluate.prompt_suffix) or "
            "evaluate.max_new_tokens may be wrong for this model, or it was not trained for these questions"
        )
    return evaluated


def _compared(work: Work, answers: Path, key: str) -> dict[str, Path]:
    """Return {interval name: answers} of the models to compare with: the unpruned model and the control."""
    files = {"retained_interval": evaluation_file(work.workdir, TEACHER, key)}
    if work.control is not None:
        files["control_interval"] = evaluation_file(work.control.parent, work.control.name, key)
    answer_files = {name: answers_file(path) for name, path in files.items()}
    return {name: path for name, path in answer_files.items() if path != answers and path.exists()}


def _measure(eval_set: EvaluationSetSpec, path: Path, compared: Mapping[str, Path], done: StageRecord) -> Evaluated:
    """Score a model's stored answers, and compare them with other models' answers."""
    assert eval_set.metric is not None
    metric, answers, facts = METRICS[eval_set.metric], answers_file(path), done.facts
    # Whether a lone image's mark may be missing was checked when the records were asked.
    records = () if eval_set.text is not None else evaluation_records(eval_set, image_lead=True)
    scores = _scores(eval_set, answers, records)
    intervals = dict[str, Any]()
    for name, original in compared.items() if is_quick(metric, scores) else ():
        intervals[name] = retained_interval(metric, scores, _scores(eval_set, original, records), records)
    evaluated = Evaluated(
        **intervals,
        metric=MetricInfo(name=eval_set.metric, **metric.describe()),
        values=metric.values(scores, records),
        groups=as_groups(metric.values_of_groups(scores, records)),
        counted="questions" if eval_set.text is None else "tokens",
        count=facts.questions if eval_set.text is None else facts.tokens,
        parameters=facts.parameters,
        seconds=done.seconds,
        model_seconds=facts.model_seconds,
        mean_generated_tokens=facts.mean_generated_tokens,
        answers=answers.name,
        scores=as_columns(scores),
    )
    write_artefact(path, evaluated)
    return evaluated


def _scores(eval_set: EvaluationSetSpec, answers: Path, records: Sequence[Record]) -> Sequence[Scores]:
    """Return the metric's scores of every answer (or text window) in an answers file."""
    assert eval_set.metric is not None
    if eval_set.text is not None:
        return read_json_lines(answers, _Window)
    lines = read_json_lines(answers, _Answer)
    if len(lines) != len(records):
        raise UserError(
            f"{answers}: has {len(lines)} answers to {len(records)} questions: remove the file, and run the command "
            "again"
        )
    return METRICS[eval_set.metric].score_all([line["prediction"] for line in lines], records)


def write_samples(workdir: Path, data: DataSpec, evaluate: EvaluateSpec, runs: Sequence[Run]) -> None:
    """Choose the sample questions of every evaluation set from the stored answers, for the report."""
    sets = {}
    for key, eval_set in evaluation_sets(data, evaluate).items():
        if eval_set.text is not None:
            continue
        records = evaluation_records(eval_set, image_lead=True)
        predictions, scores = dict[str, list[str]](), dict[str, list[float | None]]()
        for name, folder in [(UNPRUNED, None), *((run.name, run.path) for run in runs)]:
            path = find_evaluated(workdir, folder, key)
            if path is None:
                continue
            answers, worth = read_predictions(path), read_evaluated(path).question_scores
            if len(answers) == len(worth) == len(records):  # else an earlier evaluation, on other questions
                predictions[name], scores[name] = answers, worth
        if UNPRUNED in predictions and len(predictions) > 1:
            sets[key] = make_samples(records, runs, predictions, scores, max_pixels=data.max_image_pixels)
    if sets:
        write_artefact(workdir / SAMPLES, Samples(sets=sets))
