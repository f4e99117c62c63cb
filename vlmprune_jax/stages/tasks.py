"""The tasks of lmms-eval on one model folder -> `eval/<name>.<set>.json`, in this process, on our forward.

lmms-eval asks and scores; its command line is not used, since that ends with exit code 0 whatever happened. A task is a
stage of its own, like an evaluation set; its cache, which knows a model by its path, is never used.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import jax
import msgspec

from vlmprune_jax.core.checks import suggest
from vlmprune_jax.core.errors import UserError, reason
from vlmprune_jax.core.files import Count, Finite, copy_file, read_json_lines, read_text, reading
from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.data.inputs import load_inputs
from vlmprune_jax.distributed.journal import Journal
from vlmprune_jax.distributed.mesh import row_ways
from vlmprune_jax.evaluation.config import EvaluateSpec
from vlmprune_jax.evaluation.lmms.scores import TaskSet, sets_of
from vlmprune_jax.evaluation.statistics import is_quick, retained_interval
from vlmprune_jax.models.params import count_params
from vlmprune_jax.stages.work import Work, journal_path
from vlmprune_jax.workdir.artefact import write_artefact
from vlmprune_jax.workdir.evaluation import Evaluated, as_columns, metric_info
from vlmprune_jax.workdir.ledger import Finished, write_text

_DATA = re.compile(r"\$\{data\}/([\w.-]+)")
# Settings of questions of our own; a task has its own.
NOT_OF_TASKS = ("evaluate.max_new_tokens", "evaluate.prompt_suffix", "evaluate.text_window")
# What is taken out of answers before they are scored: the default of lmms-eval's command line.
_REASONING = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'


class AnswerFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Facts about the answers of a model, or a text's `tokens`.

    Of lmms-eval: `values` {task: {metric: value}}, of several tasks if a group was asked for, and `higher_is_better`.
    """

    parameters: Count
    model_seconds: Finite
    questions: Count = 0
    tokens: Count = 0
    mean_generated_tokens: Finite | None = None
    empty_answers: Count = 0
    values: dict[str, dict[str, Finite]] = {}
    higher_is_better: dict[str, dict[str, bool]] = {}


class _Answer(TypedDict):
    """A line of answers; `entries`: what lmms-eval makes each metric's value of."""

    id: str
    task: str
    prediction: str
    references: list[str]
    tokens: Count
    entries: dict[str, Any]


def task_sources(spec: EvaluateSpec, task: str) -> tuple[Path | None, dict[str, Path | str]]:
    """Return the folder of task files, None if lmms-eval has the task itself; and what the task reads, by name.

    Raises:
      UserError: its data set does not exist.
    """
    folder = None if spec.tasks_path is None else Path(spec.tasks_path)
    if folder is not None and not folder.is_dir():
        raise UserError(f"evaluate.tasks_path={folder}: no such folder")
    if folder is None or not (folder / f"{task}.yaml").is_file():
        return None, {}
    text = read_text(folder / f"{task}.yaml")
    if "${data}" in text and spec.tasks_data is None:
        raise UserError(
            f"{folder / task}.yaml: its data set is below evaluate.tasks_data, which is not set "
            "(--config.evaluate.tasks_data=DIR)"
        )
    root = None if spec.tasks_data is None else Path(spec.tasks_data)
    parts = [] if root is None else [root / part for part in _DATA.findall(text)]
    for place in parts:
        if not place.exists():
            raise UserError(
                f"task {task}: {place} does not exist: save the data set there (docs/how-to/benchmarks.md) "
                "or remove the task"
            )
    # A group names no data set itself.
    read = parts or ([] if root is None else [root])
    return folder, {"task files": folder, **{f"data of {task} ({place.name})": place for place in read}}


def write_tasks(folder: Path, data: Path | None, into: Path) -> None:
    """Task files with the places in them filled in, and the Python files that they name.

    Args:
      folder: of NAME.yaml in which `${data}` and `${lmms_eval}` stand for folders.
      data: of the data sets.
      into: a folder that `python -m lmms_eval --include_path` takes.
    """
    spec = importlib.util.find_spec("lmms_eval")
    assert spec is not None
    assert spec.origin is not None
    places = {"${lmms_eval}": Path(spec.origin).parent, "${data}": (data or Path()).absolute()}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".yaml":
            text = read_text(file)
            for mark, place in places.items():
                text = text.replace(mark, str(place).replace("\\", "\\\\").replace('"', '\\"'))
            (into / file.name).write_text(text, encoding="utf-8")
        elif file.suffix == ".py":
            copy_file(file, into / file.name, folder)


def ask_task(work: Work, data: DataSpec, spec: EvaluateSpec, task: str, answers: Path) -> AnswerFacts:
    """Answer a task of lmms-eval: one line each in `answers`, and facts about all."""
    from vlmprune_jax.evaluation.lmms.backend import Answering, Backend

    _quiet()
    start, model, files = time.perf_counter(), work.load(work.start), task_sources(spec, task)[0]
    backend = Backend(
        Answering(
            model=model,
            inputs=load_inputs(work.model, data, model.cfg),
            batch_size=spec.batch_size,
            multiple=row_ways(work.devices),
            max_length=spec.max_length or 0,
            phase=lambda total: work.phase(f"evaluate {work.part}", total),
            journal=lambda made_from: Journal(journal_path(answers), {**made_from, "mesh": vars(work.mesh)}),
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        results = _evaluated(spec, task, files, backend, Path(scratch))
    values = {name: _values(found) for name, found in results["results"].items() if name in results["samples"]}
    lines = []
    for name in values or [task]:
        # Of several filters the first counts; each logs all questions.
        samples = {sample["doc_id"]: sample for sample in reversed(results["samples"].get(name, []))}
        mine = [_line(name, samples[doc], values[name], backend.said[name, doc]) for doc in sorted(samples)]
        sets_of(name, values.get(name, {}), [line["entries"] for line in mine], {})  # refuses a task that failed
        lines += mine
    write_text(answers, "".join(json.dumps(line, ensure_ascii=False, default=_plain) + "\n" for line in lines))
    return AnswerFacts(
        parameters=count_params(model.cfg),
        model_seconds=round(time.perf_counter() - start, 3),
        questions=len(lines),
        empty_answers=sum(not line["prediction"] for line in lines),
        mean_generated_tokens=sum(line["tokens"] for line in lines) / len(lines),
        values=values,
        higher_is_better={name: results["higher_is_better"].get(name, {}) for name in values},
    )


def _evaluated(spec: EvaluateSpec, task: str, files: Path | None, backend: Any, scratch: Path) -> dict[str, Any]:
    """Return lmms-eval's evaluation of a task.

    Raises:
      UserError: it does not know the task, or fails.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    if files is not None:
        write_tasks(files, None if spec.tasks_data is None else Path(spec.tasks_data), scratch)
    manager = TaskManager(
        include_path=None if files is None else str(scratch), include_defaults=files is None, model_name="vlmprune_jax"
    )
    if task not in manager.all_tasks:
        local = [] if spec.tasks_path is None else [file.stem for file in Path(spec.tasks_path).glob("*.yaml")]
        raise UserError(f"evaluate.tasks: lmms-eval has no task {task!r}{_nearest(task, [*local, *manager.all_tasks])}")
    try:
        return simple_evaluate(
            model=backend,
            tasks=[task],
            task_manager=manager,
            limit=spec.questions,
            bootstrap_iters=0,
            log_samples=True,
            process_docs_parallel=1,  # MMMU draws letters: in threads another one each time
            cli_args=argparse.Namespace(output_path=str(scratch), process_with_media=False, reasoning_tags=_REASONING),
        )
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # whatever a task, its data set or its judge may raise
        first: BaseException = error
        while first.__cause__ is not None:  # lmms-eval tries several times, and says that it did
            first = first.__cause__
        raise UserError(
            f"task {task}: lmms-eval fails with {type(first).__name__}: {reason(first)}: --debug shows "
            "more, docs/how-to/benchmarks.md says what the task needs (data, a judge)"
        ) from error


def _nearest(task: str, known: list[str]) -> str:
    near = suggest(task, known)
    return near if "mean" in near else " (docs/how-to/benchmarks.md; `python -m lmms_eval --tasks list` has all)"


def _quiet() -> None:
    """Warnings of lmms-eval come with those of other libraries, instead of on standard output."""
    import lmms_eval.models  # noqa: F401 (which sets its own up)
    from loguru import logger

    logger.remove()
    logger.add(lambda line: logging.getLogger("lmms_eval").warning("%s", line.record["message"]), level="WARNING")


def _values(found: Mapping[str, Any]) -> dict[str, float]:
    """{metric: value}; a value that is None is 0, which MathVista means by it."""
    values: dict[str, float] = {}
    for name, value in found.items():
        metric, _, filtered = name.partition(",")
        if filtered and "_stderr" not in metric and isinstance(value, int | float | None):
            values.setdefault(metric, float(value or 0.0))
    return values


def _line(task: str, sample: Mapping[str, Any], values: Mapping[str, float], said: Any) -> dict[str, Any]:
    """A question's answer as it is kept."""
    entries = {metric: sample[metric] for metric in values if metric in sample}
    if "mmmu_acc" in entries:
        from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

        entries["mmmu_acc"] = {**entries["mmmu_acc"], "right": evaluate_mmmu([entries["mmmu_acc"]])[1]["acc"]}
    target = sample["target"]
    references = [str(one) for one in target] if isinstance(target, list | tuple) else [str(target)]
    line = {"id": str(sample["doc_id"]), "task": task, "prediction": said.prediction, "references": references}
    return {**line, "tokens": said.tokens, "entries": entries}


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python; anything else that JSON has not as text."""
    return value.item() if hasattr(value, "item") else str(value)


def measure_task(answers: Path, original: Path, done: Finished, name: str) -> dict[str, Evaluated]:
    """Score the answers in a file by set, and compare them with the unpruned model's -> `eval/<name>.<set>.json`."""
    facts: AnswerFacts = done.facts
    compared = original != answers and original.exists()
    mine, theirs = _sets(answers, facts), _sets(original, facts) if compared else {}
    found: dict[str, Evaluated] = {}
    for key, (task, of, count) in mine.items():
        values, interval = facts.values[task], None
        before = theirs[key][1].scores if key in theirs else ()
        comparable = of.makes(values[of.key]) and len(before) == len(of.scores)
        if comparable and is_quick(of.metric, of.scores):
            interval = retained_interval(of.metric, of.scores, before, of.records)
        found[key] = Evaluated(
            metric=metric_info(f"lmms-eval {task}", of.describe()),
            values={**values},
            counted="questions",
            count=count,
            parameters=facts.parameters,
            seconds=done.seconds / len(mine),
            model_seconds=facts.model_seconds / len(mine),
            mean_generated_tokens=facts.mean_generated_tokens,
            retained_interval=interval,
            answers=answers.name,
            scores=as_columns(of.scores),
        )
        write_artefact(answers.with_name(f"{name}.{key}.json"), found[key])
    return found


def _sets(answers: Path, facts: AnswerFacts) -> dict[str, tuple[str, TaskSet, int]]:
    """{set: (task, what counts, questions)} of a file of answers."""
    lines = read_json_lines(answers, _Answer)
    found: dict[str, tuple[str, TaskSet, int]] = {}
    with reading(answers, "remove it, and run the same command"):
        for task, values in facts.values.items():
            entries = [line["entries"] for line in lines if line["task"] == task]
            sets = sets_of(task, values, entries, facts.higher_is_better.get(task, {}))
            for of in sets:
                found[_set_name(task, of.key, len(sets))] = (task, of, len(entries))
    return found


def _set_name(task: str, key: str, sets: int) -> str:
    """`mme_perception` of `mme`; the task's own name where one value counts."""
    if sets == 1:
        return task
    return key.removesuffix("_score") if key.startswith(f"{task}_") else f"{task}_{key}"
