"""The answers of one model to an evaluation set -> `eval/<name>.answers.jsonl`, which run/stages/answers.py scores.

Every set is a separate ledger task, so that adding one does not repeat the others.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import msgspec
from jax.sharding import Mesh

from vlmprune_jax.base.files import Count, Finite, Positive, read_text, reading
from vlmprune_jax.base.journal import Journal
from vlmprune_jax.base.settings import settings_of
from vlmprune_jax.base.weight_files import DTYPES
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import decoding_mesh, mesh_of, row_ways
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.sections import MeshSpec, ModelSpec
from vlmprune_jax.io.data import inputs
from vlmprune_jax.io.data.batching import PREFETCH
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.config import EvaluateSpec, EvaluationSetSpec
from vlmprune_jax.run.evaluation.metrics import METRICS
from vlmprune_jax.run.evaluation.questions import arranged_questions
from vlmprune_jax.run.evaluation.runner import ask, check_answered, log_likelihoods
from vlmprune_jax.run.experiment.arguments import QUESTIONS, TEXT, evaluation_sets
from vlmprune_jax.run.experiment.spec import affecting
from vlmprune_jax.run.stages.task import make_task
from vlmprune_jax.run.stages.work import Work, journal_path
from vlmprune_jax.run.workdir.evaluation import evaluation_file
from vlmprune_jax.run.workdir.ledger import Task, write_text

Lines = tuple[list[dict[str, Any]], dict[str, Any]]  # rows of the answers file, and fields of `AnswerFacts`


class AnswerFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Counts and times of a model's pass over an evaluation set."""

    parameters: Positive
    model_seconds: Finite
    questions: Count = 0
    tokens: Count = 0
    mean_generated_tokens: Finite | None = None


@dataclass(frozen=True, eq=False)
class Asking:
    """Loaded model for answering questions, with tokenizer, mesh and settings.

    `tokens`: model settings with the tokenizer's folder. `rows`: number of which the rows of a batch are a multiple, so
    that devices share them evenly. `phase(total)`: shows progress. `journal`: keeps the answers of an interrupted run.
    """

    model: Model
    tokens: ModelSpec
    data: DataSpec
    spec: EvaluateSpec
    rows: int
    phase: Callable[[int], AbstractContextManager[Callable[[int], None]]]
    journal: Callable[[Mapping[str, Any]], Journal]


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
    model = work.load(work.start, choose_mesh=functools.partial(_decoding_mesh, work.devices, work.model.dtype, spec))
    mesh = mesh_of(model.params)
    if mesh is not None:  # the journal's
        work = work.replace(experiment=dataclasses.replace(work.experiment, mesh=MeshSpec(**mesh.shape)))
    asking = Asking(
        model=model,
        tokens=work.tokens,
        data=data,
        spec=spec,
        rows=row_ways(mesh),
        phase=functools.partial(work.phase, f"evaluate {work.label}"),
        journal=functools.partial(work.journal, path),
    )
    lines, facts = (_ask if eval_set.text is None else _read_text)(asking, eval_set)
    write_text(answers_file(path), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return AnswerFacts(parameters=sum(leaf.size for leaf in jax.tree.leaves(model.params)), **facts)


def _decoding_mesh(devices: Mesh | None, dtype: str, spec: EvaluateSpec, cfg: ModelConfig) -> Mesh | None:
    """Return the device mesh for evaluating a model with this config."""
    return decoding_mesh(cfg, devices, count_params(cfg) * DTYPES[dtype].itemsize, spec.mesh)


def _ask(asking: Asking, eval_set: EvaluationSetSpec) -> Lines:
    """Generate answers to all questions; return rows for the answers file, and the counts and times of the pass."""
    assert eval_set.max_new_tokens is not None
    model, data = asking.model, asking.data
    model.cfg.check_row("evaluate's max_new_tokens", eval_set.max_new_tokens)
    questions = arranged_questions(asking.tokens, data, asking.spec, eval_set, model.cfg, multiple=asking.rows)
    _check_metric(eval_set, questions.records)  # fail now, not after hours of generation
    start, journal = time.perf_counter(), asking.journal({"batches": len(questions)})
    with asking.phase(len(questions)) as progress:
        replies = ask(
            model,
            questions.batches(threads=data.threads, prefetch=PREFETCH, mesh=mesh_of(model.params)),
            tokenizer=questions.encoder.tokenizer,
            max_new_tokens=eval_set.max_new_tokens,
            progress=progress,
            journal=journal,
        )
    lines = [
        {
            "id": reply.record.id,
            "prediction": reply.prediction,
            "references": reply.record.references,
            "tokens": reply.tokens,
        }
        for reply in replies
    ]
    tokens, seconds = sum(reply.tokens for reply in replies), round(time.perf_counter() - start, 3)
    facts = {"model_seconds": seconds, "questions": len(lines), "mean_generated_tokens": tokens / len(lines)}
    return lines, facts


def _check_metric(eval_set: EvaluationSetSpec, records: Sequence[Record]) -> None:
    """Raise UserError for records that the metric cannot score, found by scoring their correct answers."""
    assert eval_set.metric is not None
    check_answered(records)
    metric = METRICS[eval_set.metric]
    metric.values(metric.score_all([record.references[0].strip() for record in records], records), records)


def _read_text(asking: Asking, eval_set: EvaluationSetSpec) -> Lines:
    """Compute a text's log-likelihood in windows; return one row per batch of windows, the token count and seconds."""
    assert eval_set.text is not None
    assert eval_set.text_window is not None
    file, size, window, model = Path(eval_set.text), asking.spec.batch_size, eval_set.text_window, asking.model
    model.cfg.check_row("evaluate's text_window", window)
    tokenizer = inputs.load_inputs(asking.tokens, asking.data, model.cfg).tokenizer
    text = read_text(file, missing="no such file (set in evaluate.text)")
    with reading(file, "give another text"):
        ids = tokenizer(text.replace("\r\n", "\n").replace("\r", "\n"))["input_ids"]
    total, start = -(-len(ids) // (window * size)), time.perf_counter()
    with asking.phase(total) as progress:
        journal = asking.journal({"batches": total})
        lines = list(log_likelihoods(model, ids, window=window, batch_size=size, progress=progress, journal=journal))
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


def evaluation_task(work: Work) -> Task:
    """Return the task that evaluates one model on one set."""
    return make_task(work, evaluate_stage, evaluate_task)
