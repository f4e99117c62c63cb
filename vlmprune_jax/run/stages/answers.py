"""The answers of every model on disk -> their scores in `eval/<name>.json`, and sample questions.

Scores are computed from the stored answers each time, which takes seconds: after a change of metric, no model runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Count, read_json_lines, reading
from vlmprune_jax.base.processes import on_process_zero
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.config import EvaluateSpec, EvaluationSetSpec
from vlmprune_jax.run.evaluation.lmms.scores import TaskSet, sets_of
from vlmprune_jax.run.evaluation.metrics import METRICS
from vlmprune_jax.run.evaluation.metrics.metric import Scores
from vlmprune_jax.run.evaluation.questions import evaluation_records
from vlmprune_jax.run.evaluation.statistics import is_quick, retained_interval
from vlmprune_jax.run.experiment.arguments import evaluation_sets
from vlmprune_jax.run.stages.evaluate import AnswerFacts, answers_file, evaluation_task, evaluation_works, result_file
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


class _TaskAnswer(_Answer):
    """One line of an answers file of an lmms-eval task; `entries` is lmms-eval's input for each metric."""

    task: str
    entries: dict[str, Any]


class _Window(TypedDict):
    """One line of a text's answers file: log-likelihoods of one batch of text windows."""

    nll: float
    tokens: Count
    bytes: NotRequired[float]


def evaluate_model(work: Work, start: Path, subject: str) -> dict[str, Evaluated]:
    """Evaluate the model in folder `start` on all evaluation sets and tasks; write `eval/<subject>*.json`.

    Raises UserError if two tasks define sets with the same name, or an evaluation fails (see `run_task`).
    """
    sets = evaluation_sets(work.experiment.data, work.experiment.evaluate)
    evaluations = dict[str, Evaluated]()
    for part in evaluation_works(work, start, subject):
        key, done = part.part, run_task(evaluation_task(part), overwrite=work.overwrite, say=work.say)
        set_evaluations = measure_set(part, sets[key], done) if key in sets else _measured_task(part, done)
        twice = [name for name in set_evaluations if name in evaluations]
        if twice:
            raise UserError(
                f"evaluate.tasks: {key} and another task both define the set {twice[0]!r}: remove one of the two"
            )
        evaluations |= set_evaluations
    return evaluations


def read_predictions(path: Path) -> list[str]:
    """Read a model's answers to all questions from its answers file.

    Raises UserError if the file is missing or damaged.
    """
    return [line["prediction"] for line in read_json_lines(answers_file(path), _Answer)]


def _measured_task(work: Work, done: StageRecord) -> dict[str, Evaluated]:
    """Score a model's answers to an lmms-eval task, and print one line per set."""
    name, task, answers = work.subject, work.part, answers_file(result_file(work))
    facts, kind, compared = done.facts, dict[str, Evaluated], _compared(work, answers, task)
    evaluations: dict[str, Evaluated] = on_process_zero(lambda: _measure_task(answers, compared, done, name), kind)
    if facts.empty_answers:
        work.say(f"  {name} {task}: {facts.empty_answers:,} of {facts.questions:,} answers are empty")
    for key, evaluated in evaluations.items():
        work.say(
            f"  {name} {key}: {evaluated.main_line()} ({evaluated.parameters:,} parameters, "
            f"{facts.model_seconds:.1f} s)"
        )
    return evaluations


def measure_set(work: Work, eval_set: EvaluationSetSpec, done: StageRecord) -> dict[str, Evaluated]:
    """Score a model's answers to an evaluation set, and print one line."""
    path = result_file(work)
    compared = _compared(work, answers_file(path), work.part)
    evaluated: Evaluated = on_process_zero(lambda: _measure(eval_set, path, compared, done), Evaluated)
    size = f"{evaluated.parameters:,} parameters, " * bool(evaluated.parameters)  # of a server's model: unknown
    work.say(f"  {work.label}: {evaluated.main_line()} ({size}{evaluated.model_seconds:.1f} s)")
    if work.subject == TEACHER and evaluated.metric.higher_is_better and not evaluated.values[evaluated.metric.main]:
        work.say(
            "  warning: the unpruned model scores 0: compare its answers with the references in "
            f"{answers_file(path)}; the prompt (data.template, data.system, evaluate.prompt_suffix) or "
            "evaluate.max_new_tokens may be wrong for this model, or it was not trained for these questions"
        )
    return {work.part: evaluated}


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


def _measure_task(answers: Path, compared: Mapping[str, Path], done: StageRecord, name: str) -> dict[str, Evaluated]:
    """Score a model's stored answers to an lmms-eval task, per set -> `eval/<name>.<set>.json`."""
    facts: AnswerFacts = done.facts
    mine = _task_sets(answers, facts)
    others = {interval: _task_sets(original, facts) for interval, original in compared.items()}
    evaluations: dict[str, Evaluated] = {}
    for key, (task, task_set, count) in mine.items():
        values, intervals = facts.values[task], dict[str, Any]()
        for interval, theirs in (
            others.items()
            if task_set.makes(values[task_set.key]) and is_quick(task_set.metric, task_set.scores)
            else ()
        ):
            before = theirs[key][1].scores if key in theirs else ()
            if len(before) == len(task_set.scores):
                intervals[interval] = retained_interval(task_set.metric, task_set.scores, before, task_set.records)
        evaluations[key] = Evaluated(
            **intervals,
            metric=MetricInfo(name=f"lmms-eval {task}", **task_set.describe()),
            values={**values},
            counted="questions",
            count=count,
            parameters=facts.parameters,
            seconds=done.seconds / len(mine),
            model_seconds=facts.model_seconds / len(mine),
            mean_generated_tokens=facts.mean_generated_tokens,
            answers=answers.name,
            scores=as_columns(task_set.scores),
        )
        write_artefact(answers.with_name(f"{name}.{key}.json"), evaluations[key])
    return evaluations


def _task_sets(answers: Path, facts: AnswerFacts) -> dict[str, tuple[str, TaskSet, int]]:
    """Return {set: (task, metric value with scores, number of questions)} of an lmms-eval answers file."""
    lines = read_json_lines(answers, _TaskAnswer)
    task_sets: dict[str, tuple[str, TaskSet, int]] = {}
    with reading(answers, "remove it, and run the same command"):
        for task, values in facts.values.items():
            entries = [line["entries"] for line in lines if line["task"] == task]
            sets = sets_of(task, values, entries, facts.higher_is_better.get(task, {}))
            for task_set in sets:
                task_sets[_set_name(task, task_set.key, len(sets))] = (task, task_set, len(entries))
    return task_sets


def _set_name(task: str, key: str, sets: int) -> str:
    """Return the set name of an lmms-eval metric value: `mme_perception`, or the task's name if it has one value."""
    if sets == 1:
        return task
    return key.removesuffix("_score") if key.startswith(f"{task}_") else f"{task}_{key}"


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
