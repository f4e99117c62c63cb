"""The answers of one model to an evaluation set -> `eval/<name>.answers.jsonl`, and their scores -> `eval/<name>.json`.

Also the speed of the unpruned model and of one pruned model per layer shape, measured in turns -> `speed.json`.

Every set is a separate ledger task, so that adding one does not repeat the others. Scores are computed from the stored
answers each time, which takes seconds: after a change of metric, no model runs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax
import msgspec
from jax.sharding import Mesh

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Count, Finite, Positive, read_json_lines, read_text, reading
from vlmprune_jax.base.processes import on_process_zero
from vlmprune_jax.base.settings import settings_of
from vlmprune_jax.base.weight_files import DTYPES
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.machine import processor
from vlmprune_jax.core.mesh.mesh import decoding_mesh, mesh_of, row_ways
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune.cost import speed_limits
from vlmprune_jax.core.sections import MeshSpec
from vlmprune_jax.io.data import inputs
from vlmprune_jax.io.data.batching import PREFETCH
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.exports.formats import ExportSpec
from vlmprune_jax.run.evaluation.config import EvaluateSpec, EvaluationSetSpec, SpeedConfig
from vlmprune_jax.run.evaluation.metrics import METRICS
from vlmprune_jax.run.evaluation.metrics.metric import Scores
from vlmprune_jax.run.evaluation.questions import arranged_questions, evaluation_records
from vlmprune_jax.run.evaluation.runner import Answer, ask, check_answered, log_likelihoods
from vlmprune_jax.run.evaluation.statistics import is_quick, retained_interval
from vlmprune_jax.run.experiment.arguments import QUESTIONS, TEXT, evaluation_sets, export_dtype, image_tokens
from vlmprune_jax.run.experiment.spec import affecting
from vlmprune_jax.run.speed.bench import measure_speed
from vlmprune_jax.run.stages.work import Work, journal_path
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.content import content_key
from vlmprune_jax.run.workdir.evaluation import (
    TEACHER,
    UNPRUNED,
    Evaluated,
    Group,
    MetricInfo,
    evaluation_file,
    find_evaluated,
    read_evaluated,
)
from vlmprune_jax.run.workdir.ledger import StageRecord, Task, run_task, write_text
from vlmprune_jax.run.workdir.result import Run, Workload
from vlmprune_jax.run.workdir.samples import SAMPLES, Samples, make_samples
from vlmprune_jax.run.workdir.speed import SPEED, Measurement, Pair, Speed, SpeedWorkload

Lines = tuple[list[dict[str, Any]], dict[str, Any]]  # rows of the answers file, and fields of `AnswerFacts`


class AnswerFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Counts and times of a model's pass over an evaluation set."""

    parameters: Positive
    model_seconds: Finite
    questions: Count = 0
    tokens: Count = 0
    mean_generated_tokens: Finite | None = None


def evaluation_works(work: Work, start: Path, subject: str) -> list[Work]:
    """Return a `Work` for evaluating the model in folder `start` on each set; `subject`: name of its files."""
    data, spec = work.experiment.data, work.experiment.evaluate
    place: dict[str, Any] = {"stage": "evaluate", "start": start, "subject": subject, "loaded": {**(work.loaded or {})}}
    return [work.replace(part=key, **place) for key in evaluation_sets(data, spec)]


def result_file(work: Work) -> Path:
    """Return the path of the evaluation file of a model and set."""
    return evaluation_file(work.folder, work.subject, work.part)


def answers_file(path: Path) -> Path:
    """Return the path of the answers file that belongs to an evaluation file."""
    return path.with_name(f"{path.stem}.answers.jsonl")


def evaluate_task(task: Task, work: Work, data: DataSpec, spec: EvaluateSpec) -> Task:
    """Complete the ledger task of an evaluation: add the model folder, the set's data files and the settings."""
    key, path = work.part, result_file(work)
    eval_set, section = evaluation_sets(data, spec)[key], "evaluate" if key == QUESTIONS else f"evaluate.sets.{key}"
    names = ("text_window",) if eval_set.text is not None else ("prompt_suffix", "max_new_tokens", "questions")
    shared = affecting("evaluate", {"model": work.model, "data": data, "evaluate": spec})
    kept = shared if eval_set.text is None else ("model.dtype", "evaluate.batch_size")
    return task.add(
        inputs={"model": work.start, **set_files(data, key, eval_set)},
        outputs=[answers_file(path)],
        journals=[journal_path(path)],
        settings={f"{section}.{name}": getattr(eval_set, name) for name in names},
        without=[name for name in shared if name not in kept] + [f"evaluate.{name}" for name in settings_of(eval_set)],
    )


def set_files(data: DataSpec, key: str, eval_set: EvaluationSetSpec) -> dict[str, Path | str]:
    """Return {name: path} of the data files of an evaluation set."""
    if eval_set.text is not None:
        return {f"text of {key}": Path(eval_set.text)}
    return inputs.record_files(dataclasses.replace(data, eval=eval_set.data, eval_images=eval_set.images), "eval")


def evaluate_stage(work: Work, data: DataSpec, spec: EvaluateSpec) -> AnswerFacts:
    """Generate a model's answers to a set, or score a text; write the answers file."""
    path, eval_set = result_file(work), evaluation_sets(data, spec)[work.part]

    def choose_mesh(cfg: ModelConfig) -> Mesh | None:
        return decoding_mesh(cfg, work.devices, count_params(cfg) * DTYPES[work.model.dtype].itemsize, spec.mesh)

    model = work.load(work.start, choose_mesh=choose_mesh)
    if (mesh := mesh_of(model.params)) is not None:  # the journal's
        work = work.replace(experiment=dataclasses.replace(work.experiment, mesh=MeshSpec(**mesh.shape)))
    lines, facts = (_ask if eval_set.text is None else _read_text)(work, model, eval_set)
    write_text(answers_file(path), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return AnswerFacts(parameters=sum(leaf.size for leaf in jax.tree.leaves(model.params)), **facts)


def _ask(work: Work, model: Model, eval_set: EvaluationSetSpec) -> Lines:
    """Generate answers to all questions; return rows for the answers file, and the counts and times of the pass."""
    assert eval_set.max_new_tokens is not None
    assert eval_set.metric is not None
    data, spec, mesh = work.experiment.data, work.experiment.evaluate, mesh_of(model.params)
    model.cfg.check_row("evaluate's max_new_tokens", eval_set.max_new_tokens)
    questions = arranged_questions(work.tokens, data, spec, eval_set, model.cfg, multiple=row_ways(mesh))
    check_answered(questions.records)
    metric = METRICS[eval_set.metric]  # it must score the correct answers: fail now, not after hours of generation
    correct = [record.references[0].strip() for record in questions.records]
    metric.values(metric.score_all(correct, questions.records), questions.records)
    start, journal = time.perf_counter(), work.journal(result_file(work), {"batches": len(questions)})
    with work.phase(f"evaluate {work.label}", len(questions)) as progress:
        answers = ask(
            model,
            questions.batches(threads=data.threads, prefetch=PREFETCH, mesh=mesh),
            tokenizer=questions.encoder.tokenizer,
            max_new_tokens=eval_set.max_new_tokens,
            progress=progress,
            journal=journal,
        )
    tokens, seconds = sum(answer.tokens for answer in answers), round(time.perf_counter() - start, 3)
    facts = {"model_seconds": seconds, "questions": len(answers), "mean_generated_tokens": tokens / len(answers)}
    return msgspec.to_builtins(answers), facts


def _read_text(work: Work, model: Model, eval_set: EvaluationSetSpec) -> Lines:
    """Compute a text's log-likelihood in windows; return one row per batch of windows, the token count and seconds."""
    assert eval_set.text is not None
    assert eval_set.text_window is not None
    file, size, window = Path(eval_set.text), work.experiment.evaluate.batch_size, eval_set.text_window
    model.cfg.check_row("evaluate's text_window", window)
    tokenizer = inputs.load_inputs(work.tokens, work.experiment.data, model.cfg).tokenizer
    text = read_text(file, missing="no such file (set in evaluate.text)")
    with reading(file, "give another text"):
        ids = tokenizer(text.replace("\r\n", "\n").replace("\r", "\n"))["input_ids"]
    total, start = -(-len(ids) // (window * size)), time.perf_counter()
    with work.phase(f"evaluate {work.label}", total) as progress:
        journal = work.journal(result_file(work), {"batches": total})
        lines = log_likelihoods(model, ids, window=window, batch_size=size, progress=progress, journal=journal)
    seconds, tokens = round(time.perf_counter() - start, 3), int(sum(line["tokens"] for line in lines))
    per_token = len(text.encode()) / len(ids)
    lines = [{**line, "bytes": per_token * line["tokens"]} for line in lines]
    return lines, {"model_seconds": seconds, "tokens": tokens}


def names_of_sets(data: DataSpec, spec: EvaluateSpec) -> str:
    """Return text with the names of up to three evaluation sets; sets without a name have the name of their data."""
    names = list[str]()
    for name, chosen in evaluation_sets(data, spec).items():
        if name not in (QUESTIONS, TEXT):
            names.append(name)
        elif chosen.text is None and data.source != "files":
            names.append(data.source)
        else:
            names.append(inputs.name_of_records(chosen.data or chosen.text or ""))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
        done, path = run_task(part.task, overwrite=work.overwrite, say=work.say), result_file(part)
        others = {"retained_interval": evaluation_file(work.workdir, TEACHER, part.part)}
        if work.record.compared_with:
            control = work.workdir / work.record.compared_with
            others["control_interval"] = evaluation_file(control.parent, control.name, part.part)
        compared = {name: answers_file(it) for name, it in others.items() if it != path and answers_file(it).exists()}
        measure = functools.partial(_measure, sets[part.part], path, compared, done)
        evaluated: Evaluated = on_process_zero(measure, Evaluated)
        evaluations[part.part], metric = evaluated, evaluated.metric
        size, seconds = f"{evaluated.parameters:,} parameters", f"{evaluated.model_seconds:.1f} s"
        work.say(f"  {part.label}: {evaluated.main_line()} ({size}, {seconds})")
        if subject == TEACHER and metric.higher_is_better and not evaluated.values[metric.main]:
            work.say(
                "  warning: the unpruned model scores 0: compare its answers with the references in "
                f"{answers_file(path)}; the prompt (data.template, data.system, evaluate.prompt_suffix) "
                "or evaluate.max_new_tokens may be wrong for this model, or it was not trained for these questions"
            )
    return evaluations


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
    names, groups = dict.fromkeys(name for score in scores for name in score), dict[str, Group]()
    for name, values in metric.values_of_groups(scores, records).items():
        groups[name] = Group(questions=int(values.pop("questions")), values=values)
    evaluated = Evaluated(
        **intervals,
        metric=MetricInfo(name=eval_set.metric, **metric.describe()),
        values=metric.values(scores, records),
        groups=groups,
        counted="questions" if eval_set.text is None else "tokens",
        count=facts.questions if eval_set.text is None else facts.tokens,
        parameters=facts.parameters,
        seconds=done.seconds,
        model_seconds=facts.model_seconds,
        mean_generated_tokens=facts.mean_generated_tokens,
        answers=answers.name,
        scores={name: [score.get(name) for score in scores] for name in names},
    )
    write_artefact(path, evaluated)
    return evaluated


def _scores(eval_set: EvaluationSetSpec, answers: Path, records: Sequence[Record]) -> Sequence[Scores]:
    """Return the metric's scores of every answer (or text window) in an answers file."""
    assert eval_set.metric is not None
    if eval_set.text is not None:
        return read_json_lines(answers, _Window)
    lines = read_json_lines(answers, Answer)
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
            answers, worth = read_json_lines(answers_file(path), Answer), read_evaluated(path).question_scores
            if len(answers) == len(worth) == len(records):  # else an earlier evaluation, on other questions
                predictions[name], scores[name] = [line["prediction"] for line in answers], worth
        if UNPRUNED in predictions and len(predictions) > 1:
            sets[key] = make_samples(records, runs, predictions, scores, max_pixels=data.max_image_pixels)
    if sets:
        write_artefact(workdir / SAMPLES, Samples(sets=sets))


def workload_of(work: Work, data: DataSpec, spec: SpeedConfig, export: ExportSpec) -> Workload:
    """Return the prompt for which costs are computed, from the settings of `speed` and `export`."""
    images, tokens = int(spec.with_image(work.config(work.teacher))), image_tokens(data, export) or 0
    dtype = export_dtype(work.model, export)
    return Workload(length=spec.prompt_tokens, images=images, dtype=dtype, image_tokens=tokens if images else 0)


class ShapeSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Measured speed of one layer shape, and of the unpruned model in the same repetitions, on which machine."""

    processor: str
    load: float  # load average of the machine before the measurement
    unpruned: Measurement
    pruned: Measurement


def speed_task(task: Task, work: Work, spec: SpeedConfig) -> Task:
    """Complete the task of one layer shape: speed depends on shapes, not on weights."""
    shapes = [content_key(dataclasses.asdict(work.config(path))) for path in (work.teacher, work.start)]
    # Machines that share a sweep's results measure for themselves.
    machine = {} if work.store is None else {"mesh": vars(work.experiment.mesh), "processor": processor()}
    return dataclasses.replace(task, inputs={}, settings={**task.settings, "shapes": shapes, **machine})


def speed_stage(work: Work, spec: SpeedConfig) -> ShapeSpeed:
    """Measure the model in `work.start` in turns with the unpruned model."""
    load = round(os.getloadavg()[0], 1)
    measured = measure_speed({"unpruned": work.load(work.teacher), "pruned": work.load(work.start)}, spec)
    return ShapeSpeed(processor=processor(), load=load, **measured)


def measure_shapes(root: Work, models: Mapping[str, Path]) -> Speed:
    """Measure one of {name: model folder} for each layer shape; write `speed.json`."""
    spec, before, shapes = root.experiment.speed, root.config(root.teacher), dict[ModelConfig, list[str]]()
    for name, folder in models.items():
        shapes.setdefault(root.config(folder), []).append(name)
    image, measured, pairs = spec.with_image(before), list[ShapeSpeed](), list[Pair]()
    row = {"length": spec.prompt_tokens, "images": int(image), "batch": spec.batch_size}
    for shape, names in shapes.items():
        task = root.replace(stage="speed", subject=names[0], start=models[names[0]]).task
        speed: ShapeSpeed = run_task(task, overwrite=True, say=root.say).facts
        limits = dict(zip(("prefill_limit", "decode_limit"), speed_limits(before, shape, **row), strict=True))
        pairs.append(Pair(models=names, unpruned=speed.unpruned, pruned=speed.pruned, **limits))
        measured.append(speed)
    workload = SpeedWorkload(**{**vars(spec), "image": image}, dtype=root.model.dtype)
    speeds = Speed(processor=measured[0].processor, load=measured[0].load, workload=workload, pairs=pairs)
    write_artefact(root.workdir / SPEED, speeds)
    return speeds
