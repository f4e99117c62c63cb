"""The answers of one model to an evaluation set, and their scores -> `eval/<name>.json`.

Asking is a job of its own for every set and every task of lmms-eval: adding one repeats no other. Scores are computed
anew from the answers on disk each time, in moments: another metric, or a corrected one, asks the model nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import msgspec

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import Count, Finite, read_json_lines, read_text, reading
from vlmprune_jax.core.sections import MeshSpec
from vlmprune_jax.core.settings import settings_of
from vlmprune_jax.core.weight_files import DTYPES
from vlmprune_jax.data import inputs
from vlmprune_jax.data.batching import PREFETCH
from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.data.records import Record
from vlmprune_jax.distributed.mesh import decoding_mesh, on_process_zero, process_count, row_ways
from vlmprune_jax.evaluation.config import EvaluateSpec, EvaluationSetSpec
from vlmprune_jax.evaluation.lmms.scores import TaskSet, sets_of
from vlmprune_jax.evaluation.lmms.tasks import NOT_OF_TASKS, as_plain, ask_task, task_sources
from vlmprune_jax.evaluation.metrics import METRICS
from vlmprune_jax.evaluation.metrics.metric import Scores
from vlmprune_jax.evaluation.questions import arranged_questions, evaluation_records
from vlmprune_jax.evaluation.runner import Reply, ask, check_answered, log_likelihoods
from vlmprune_jax.evaluation.speed.energy import EnergyMeter
from vlmprune_jax.evaluation.statistics import is_quick, retained_interval
from vlmprune_jax.experiment.arguments import QUESTIONS, evaluation_sets
from vlmprune_jax.experiment.spec import affecting
from vlmprune_jax.models.params import count_params
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.stages.job import run_stage
from vlmprune_jax.stages.stage import Files
from vlmprune_jax.stages.work import Work, journal_path
from vlmprune_jax.workdir.artefact import write_artefact
from vlmprune_jax.workdir.evaluation import (
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
from vlmprune_jax.workdir.ledger import Finished, write_text
from vlmprune_jax.workdir.result import Run
from vlmprune_jax.workdir.samples import SAMPLES, Samples, make_samples

Lines = tuple[list[dict[str, Any]], dict[str, Any]]  # lines of answers, and the fields of `AnswerFacts` about them


class AnswerFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Counts and times of a model's answers to a set; for a text only its `tokens`.

    `joules`: energy of the whole machine while one process answered all questions, by its `counters`.

    Of lmms-eval: `values` {task: {metric: value}}, of several tasks if a group was asked for, and `higher_is_better`.
    """

    parameters: Count
    model_seconds: Finite
    joules: Finite | None = None
    counters: str = ""
    questions: Count = 0
    tokens: Count = 0
    mean_generated_tokens: Finite | None = None
    empty_answers: Count = 0
    values: dict[str, dict[str, Finite]] = {}
    higher_is_better: dict[str, dict[str, bool]] = {}


class _Answer(TypedDict):
    """One line of an answers file for questions."""

    id: str
    prediction: str
    references: list[str]
    tokens: Count


class _TaskAnswer(_Answer):
    """One line of an answers file for an lmms-eval task; `entries` is lmms-eval's input for each metric."""

    task: str
    entries: dict[str, Any]


class _Window(TypedDict):
    """One line of an answers file for a text: the log-likelihoods of a batch of windows."""

    nll: float
    tokens: Count
    bytes: NotRequired[float]


def evaluate_model(work: Work, sections: Mapping[str, Any]) -> dict[str, Evaluated]:
    """Evaluate the model in folder `work.start`, named `work.part`, on all sets and tasks -> `eval/<name>*.json`.

    Raises UserError if two tasks have a set of one name, and as `run_stage` does.
    """
    sets, found = evaluation_sets(sections["data"], sections["evaluate"]), dict[str, Evaluated]()
    for key, part in parts_of(dataclasses.replace(work, loaded={}), sections).items():
        done = run_stage("evaluate", part, sections)
        made = measure_set(part, sets[key], done) if key in sets else _measured_task(part, key, done)
        twice = [name for name in made if name in found]
        if twice:
            raise UserError(
                f"evaluate.tasks: {key} and another task both have the set {twice[0]!r}: remove one of them"
            )
        found |= made
    return found


def parts_of(work: Work, sections: Mapping[str, Any]) -> dict[str, Work]:
    """Return {set or task: `Work` for evaluating one model on it}."""
    spec = sections["evaluate"]
    names = {
        key: work.part if key == QUESTIONS else f"{work.part} {key}" for key in evaluation_sets(sections["data"], spec)
    }
    names |= {task: f"{work.part} {task}" for task in spec.tasks}
    return {key: dataclasses.replace(work, part=name) for key, name in names.items()}


def _part(work: Work) -> tuple[str, str]:
    """Return the model's name and the evaluation set or task that `work.part` stands for."""
    name, _, key = work.part.partition(" ")
    return name, key or QUESTIONS


def answers_file(path: Path) -> Path:
    """Return the path of the answers file next to an evaluation file."""
    return path.with_name(f"{path.stem}.answers.jsonl")


def evaluate_files(work: Work, data: DataSpec, spec: EvaluateSpec) -> Files:
    """Return the model's folder and one set's data as inputs, and the set's settings apart from the metric."""
    name, key = _part(work)
    path = evaluation_file(work.folder, name, key)
    answers = answers_file(path)
    if key in spec.tasks:
        sources, without = task_sources(spec, key)[1], NOT_OF_TASKS
        settings = {"task": key, "lmms_eval": importlib.metadata.version("lmms_eval")}
        return Files({"model": work.start, **sources}, [answers], [journal_path(answers)], settings, without)
    of, where = evaluation_sets(data, spec)[key], "evaluate" if key == QUESTIONS else f"evaluate.sets.{key}"
    names = ("text_window",) if of.text is not None else ("prompt_suffix", "max_new_tokens", "questions")
    shared = affecting("evaluate", {"model": work.model, "data": data, "evaluate": spec})
    kept = shared if of.text is None else ("model.dtype", "evaluate.batch_size")
    return Files(
        inputs={"model": work.start, **set_files(data, key, of)},
        outputs=[answers],
        journals=[journal_path(path)],
        settings={f"{where}.{name}": getattr(of, name) for name in names},
        without=[name for name in shared if name not in kept] + [f"evaluate.{name}" for name in settings_of(of)],
    )


def set_files(data: DataSpec, key: str, of: EvaluationSetSpec) -> dict[str, Path | str]:
    """Return {name: path} of the files that an evaluation set is read from."""
    if of.text is not None:
        return {f"text of {key}": Path(of.text)}
    return inputs.record_files(dataclasses.replace(data, eval=of.data, eval_images=of.images), "eval")


def evaluate_stage(work: Work, data: DataSpec, spec: EvaluateSpec) -> AnswerFacts:
    """Ask the model all questions of a set or task, or score a text; write one line per answer or batch."""
    work = dataclasses.replace(work, mesh=_decoding_mesh(work, spec))
    name, key = _part(work)
    path, model = evaluation_file(work.folder, name, key), work.load(work.start)
    of = None if key in spec.tasks else evaluation_sets(data, spec)[key]
    if of is None:
        lines, facts = _ask_task(work, data, spec, key, answers_file(path), model)
    else:
        lines, facts = (_ask if of.text is None else _read_text)(work, data, spec, of, path, model)
    write_answers(path, lines)
    return AnswerFacts(parameters=count_params(model.cfg), **facts)


def _decoding_mesh(work: Work, spec: EvaluateSpec) -> MeshSpec:
    """Return the sizes of the mesh on which the model at `work.start` is evaluated."""
    cfg = work.config(work.start)
    found = decoding_mesh(cfg, work.devices, count_params(cfg) * DTYPES[work.model.dtype].itemsize, spec.mesh)
    return work.mesh if found is None else MeshSpec(**found.shape)


def write_answers(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the answers file next to the evaluation file `path`."""
    text = "".join(json.dumps(line, ensure_ascii=False, default=as_plain) + "\n" for line in lines)
    write_text(answers_file(path), text)


def read_predictions(path: Path) -> list[str]:
    """Return a model's answers to all questions, from the answers file next to an evaluation file.

    Raises UserError if they are missing or damaged.
    """
    return [line["prediction"] for line in read_json_lines(answers_file(path), _Answer)]


def _ask(work: Work, data: DataSpec, spec: EvaluateSpec, of: EvaluationSetSpec, path: Path, model: Model) -> Lines:
    """Ask the model all questions; return one line per answer, and counts and times."""
    assert of.max_new_tokens is not None
    model.cfg.check_row("evaluate's max_new_tokens", of.max_new_tokens)
    questions = arranged_questions(work.tokens, data, spec, of, model.cfg, multiple=row_ways(work.devices))
    check_metric(of, questions.records)  # the last one now, not after hours
    start, journal = time.perf_counter(), work.journal(path, {"batches": len(questions)})
    whole = not journal.entries and process_count() == 1
    with EnergyMeter() as meter, work.phase(f"evaluate {work.part}", len(questions)) as progress:
        replies = ask(
            model,
            questions.batches(threads=data.threads, prefetch=PREFETCH),
            tokenizer=questions.encoder.tokenizer,
            max_new_tokens=of.max_new_tokens,
            progress=progress,
            journal=journal,
        )
    lines, facts = as_lines(replies, start)
    energy = {"joules": meter.joules, "counters": meter.counters} if whole and meter.counters else {}
    return lines, facts | energy


def as_lines(replies: Sequence[Reply], start: float) -> Lines:
    """Return one line per answer, and counts and times; `start` is when the first question was asked."""
    lines = [
        {
            "id": reply.record.id,
            "prediction": reply.prediction,
            "references": reply.record.references,
            "tokens": reply.tokens,
        }
        for reply in replies
    ]
    return lines, _about(lines, start)


def _about(lines: Sequence[Mapping[str, Any]], start: float) -> dict[str, Any]:
    """Return number of questions, mean answer length and seconds since `start`."""
    tokens = sum(line["tokens"] for line in lines)
    seconds = round(time.perf_counter() - start, 3)
    return {"model_seconds": seconds, "questions": len(lines), "mean_generated_tokens": tokens / len(lines)}


def _ask_task(work: Work, data: DataSpec, spec: EvaluateSpec, task: str, answers: Path, model: Model) -> Lines:
    """Run an lmms-eval task; return one line per answer, and counts, times and the task's values."""
    start = time.perf_counter()
    lines, found = ask_task(
        model,
        inputs.load_inputs(work.tokens, data, model.cfg),
        spec,
        task,
        multiple=row_ways(work.devices),
        phase=lambda total: work.phase(f"evaluate {work.part}", total),
        journal=lambda made_from: work.journal(answers, made_from),
    )
    empty = sum(not line["prediction"] for line in lines)
    return lines, {**_about(lines, start), "empty_answers": empty, **found}


def check_metric(of: EvaluationSetSpec, records: Sequence[Record]) -> None:
    """Refuse records without a correct answer, or unusable for the metric, by scoring the correct answers."""
    assert of.metric is not None
    check_answered(records)
    metric = METRICS[of.metric]
    metric.values(metric.score_all([record.references[0].strip() for record in records], records), records)


def _read_text(
    work: Work, data: DataSpec, spec: EvaluateSpec, of: EvaluationSetSpec, path: Path, model: Model
) -> Lines:
    """Compute the log-likelihood of a text; return one line per batch of windows, and counts and times."""
    assert of.text is not None
    assert of.text_window is not None
    file, size, window = Path(of.text), spec.batch_size, of.text_window
    model.cfg.check_row("evaluate's text_window", window)
    tokenizer = inputs.load_inputs(work.tokens, data, model.cfg).tokenizer
    text = read_text(file, missing="no such file: evaluate.text names it")
    with reading(file, "give another text"):
        ids = tokenizer(text.replace("\r\n", "\n").replace("\r", "\n"))["input_ids"]
    total, start = -(-len(ids) // (window * size)), time.perf_counter()
    with work.phase(f"evaluate {work.part}", total) as progress:
        kept = work.journal(path, {"batches": total})
        lines = list(log_likelihoods(model, ids, window=window, batch_size=size, progress=progress, journal=kept))
    seconds, tokens = round(time.perf_counter() - start, 3), int(sum(line["tokens"] for line in lines))
    per_token = len(text.encode()) / len(ids)
    lines = [{**line, "bytes": per_token * line["tokens"]} for line in lines]
    return lines, {"model_seconds": seconds, "tokens": tokens}


def _measured_task(work: Work, task: str, done: Finished) -> dict[str, Evaluated]:
    """Score the answers to a task, per set, and print one line each."""
    name = _part(work)[0]
    answers = answers_file(evaluation_file(work.folder, name, task))
    facts, kind, compared = done.facts, dict[str, Evaluated], _compared(work, answers, task)
    found: dict[str, Evaluated] = on_process_zero(lambda: _measure_task(answers, compared, done, name), kind)
    if facts.empty_answers:
        work.say(f"  {name} {task}: {facts.empty_answers:,} of {facts.questions:,} answers are empty")
    for key, of in found.items():
        work.say(f"  {name} {key}: {of.main_line()} ({of.parameters:,} parameters, {facts.model_seconds:.1f} s)")
    return found


def measure_set(work: Work, of: EvaluationSetSpec, done: Finished) -> dict[str, Evaluated]:
    """Score the answers to a set, and print one line."""
    name, key = _part(work)
    path = evaluation_file(work.folder, name, key)
    compared = _compared(work, answers_file(path), key)
    found: Evaluated = on_process_zero(lambda: _measure(of, path, compared, done), Evaluated)
    size = f"{found.parameters:,} parameters, " * bool(found.parameters)  # of a server's model: unknown
    work.say(f"  {work.part}: {found.main_line()} ({size}{found.model_seconds:.1f} s)")
    return {key: found}


def _compared(work: Work, answers: Path, key: str) -> dict[str, Path]:
    """Return {interval: answers of the model it is relative to}: of the unpruned model, and of the control."""
    files = {"retained_interval": evaluation_file(work.workdir, TEACHER, key)}
    if work.control is not None:
        files["control_interval"] = evaluation_file(work.control.parent, work.control.name, key)
    found = {name: answers_file(path) for name, path in files.items()}
    return {name: path for name, path in found.items() if path != answers and path.exists()}


def _measure(of: EvaluationSetSpec, path: Path, compared: Mapping[str, Path], done: Finished) -> Evaluated:
    """Score the answers next to the file `path`, and compare them with the answers of other models."""
    assert of.metric is not None
    metric, answers, facts = METRICS[of.metric], answers_file(path), done.facts
    # Whether a lone image's mark may be missing was checked when the records were asked.
    records = () if of.text is not None else evaluation_records(of, image_lead=True)
    scores = _scores(of, answers, records)
    intervals = dict[str, Any]()
    for name, original in compared.items() if is_quick(metric, scores) else ():
        intervals[name] = retained_interval(metric, scores, _scores(of, original, records), records)
    found = Evaluated(
        **intervals,
        metric=MetricInfo(name=of.metric, **metric.describe()),
        values=metric.values(scores, records),
        groups=as_groups(metric.values_of_groups(scores, records)),
        counted="questions" if of.text is None else "tokens",
        count=facts.questions if of.text is None else facts.tokens,
        parameters=facts.parameters,
        seconds=done.seconds,
        model_seconds=facts.model_seconds,
        mean_generated_tokens=facts.mean_generated_tokens,
        joules=facts.joules,
        counters=facts.counters,
        answers=answers.name,
        scores=as_columns(scores),
    )
    write_artefact(path, found)
    return found


def _scores(of: EvaluationSetSpec, answers: Path, records: Sequence[Record]) -> Sequence[Scores]:
    """Return the metric's scores of all answers (or windows of a text) in an answers file."""
    assert of.metric is not None
    if of.text is not None:
        return read_json_lines(answers, _Window)
    lines = read_json_lines(answers, _Answer)
    if len(lines) != len(records):
        raise UserError(f"{answers}: holds {len(lines)} answers to {len(records)} questions: remove it, and run again")
    return METRICS[of.metric].score_all([line["prediction"] for line in lines], records)


def _measure_task(answers: Path, compared: Mapping[str, Path], done: Finished, name: str) -> dict[str, Evaluated]:
    """Score a task's answers per set and compare them with those of other models -> `eval/<name>.<set>.json`."""
    facts: AnswerFacts = done.facts
    mine = _task_sets(answers, facts)
    others = {interval: _task_sets(original, facts) for interval, original in compared.items()}
    found: dict[str, Evaluated] = {}
    for key, (task, of, count) in mine.items():
        values, intervals = facts.values[task], dict[str, Any]()
        for interval, theirs in others.items() if of.makes(values[of.key]) and is_quick(of.metric, of.scores) else ():
            before = theirs[key][1].scores if key in theirs else ()
            if len(before) == len(of.scores):
                intervals[interval] = retained_interval(of.metric, of.scores, before, of.records)
        found[key] = Evaluated(
            **intervals,
            metric=MetricInfo(name=f"lmms-eval {task}", **of.describe()),
            values={**values},
            counted="questions",
            count=count,
            parameters=facts.parameters,
            seconds=done.seconds / len(mine),
            model_seconds=facts.model_seconds / len(mine),
            mean_generated_tokens=facts.mean_generated_tokens,
            answers=answers.name,
            scores=as_columns(of.scores),
        )
        write_artefact(answers.with_name(f"{name}.{key}.json"), found[key])
    return found


def _task_sets(answers: Path, facts: AnswerFacts) -> dict[str, tuple[str, TaskSet, int]]:
    """Return {set: (task, value with its scores, number of questions)} for an answers file."""
    lines = read_json_lines(answers, _TaskAnswer)
    found: dict[str, tuple[str, TaskSet, int]] = {}
    with reading(answers, "remove it, and run the same command"):
        for task, values in facts.values.items():
            entries = [line["entries"] for line in lines if line["task"] == task]
            sets = sets_of(task, values, entries, facts.higher_is_better.get(task, {}))
            for of in sets:
                found[_set_name(task, of.key, len(sets))] = (task, of, len(entries))
    return found


def _set_name(task: str, key: str, sets: int) -> str:
    """Return the set's name, `mme_perception` for a value of `mme`; a task with one value gives its own name."""
    if sets == 1:
        return task
    return key.removesuffix("_score") if key.startswith(f"{task}_") else f"{task}_{key}"


def write_samples(workdir: Path, data: DataSpec, evaluate: EvaluateSpec, runs: Sequence[Run]) -> None:
    """Choose sample questions from the answers on disk, for every set."""
    sets = {}
    for key, of in evaluation_sets(data, evaluate).items():
        if of.text is not None:
            continue
        records = evaluation_records(of, image_lead=True)
        said, scores = dict[str, list[str]](), dict[str, list[float | None]]()
        for name, folder in [(UNPRUNED, None), *((run.name, run.path) for run in runs)]:
            path = find_evaluated(workdir, folder, key)
            if path is None:
                continue
            answers, worth = read_predictions(path), read_evaluated(path).question_scores
            if len(answers) == len(worth) == len(records):  # else an earlier evaluation, on other questions
                said[name], scores[name] = answers, worth
        if UNPRUNED in said and len(said) > 1:
            sets[key] = make_samples(records, runs, said, scores, max_pixels=data.max_image_pixels)
    if sets:
        write_artefact(workdir / SAMPLES, Samples(sets=sets))
