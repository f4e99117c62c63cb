"""Evaluation of one model on lmms-eval tasks, in this process and with vlmprune's forward pass.

lmms-eval asks the questions and scores the answers. Its command line is not used, because that exits with code 0 even
after errors. Its cache is not used either, because its keys are paths of models, not their contents.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from vlmprune_jax.base.checks import suggest
from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.base.files import copy_file, read_text
from vlmprune_jax.base.journal import Journal
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.io.data.inputs import Inputs
from vlmprune_jax.run.evaluation.config import EvaluateSpec
from vlmprune_jax.run.evaluation.lmms.scores import sets_of

_DATA = re.compile(r"\$\{data\}/([\w.-]+)")
# Settings that apply to evaluation sets only; lmms-eval tasks define their own.
NOT_OF_TASKS = ("evaluate.max_new_tokens", "evaluate.prompt_suffix", "evaluate.text_window")
# Tags whose content is removed from answers before scoring (default of lmms-eval's command line).
_REASONING = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'


def task_sources(spec: EvaluateSpec, task: str) -> tuple[Path | None, dict[str, Path | str]]:
    """Return the folder of a user's task file (None = built into lmms-eval), and {name: file or data set it reads}.

    Raises UserError if the task's data set does not exist.
    """
    folder = None if spec.tasks_path is None else Path(spec.tasks_path)
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"evaluate.tasks_path={folder}: no such folder: set it to a folder of lmms-eval tasks, or unset it"
        )
    if folder is None or not (folder / f"{task}.yaml").is_file():
        return None, {}
    text = read_text(folder / f"{task}.yaml")
    if "${data}" in text and spec.tasks_data is None:
        raise UserError(
            f"{folder / task}.yaml: the task's data set is in the folder evaluate.tasks_data, which is not set: set it "
            "(--config.evaluate.tasks_data=DIR)"
        )
    root = None if spec.tasks_data is None else Path(spec.tasks_data)
    paths = [] if root is None else [root / part for part in _DATA.findall(text)]
    for place in paths:
        if not place.exists():
            raise UserError(
                f"task {task}: {place} does not exist: save the data set there (docs/how-to/benchmarks.md) "
                "or remove the task"
            )
    # A task group has no data set of its own.
    read = paths or ([] if root is None else [root])
    return folder, {"task files": folder, **{f"data of {task} ({place.name})": place for place in read}}


def write_tasks(folder: Path, data: Path | None, into: Path) -> None:
    """Write lmms-eval task files with their placeholders filled in, and the Python files that they import.

    Args:
      folder: folder with task files NAME.yaml, in which `${data}` and `${lmms_eval}` stand for folders.
      data: folder of the data sets.
      into: output folder, for `python -m lmms_eval --include_path`.
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


def ask_task(
    model: Model,
    inputs: Inputs,
    spec: EvaluateSpec,
    task: str,
    *,
    multiple: int,
    phase: Callable[[int], AbstractContextManager[Callable[[int], None]]],
    journal: Callable[[Mapping[str, Any]], Journal | None],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run an lmms-eval task; return one row per question, and {task: {"values": ..., "higher_is_better": ...}}.

    `multiple`, `phase`, `journal`: see `backend.Answering`.
    """
    _quiet()
    from vlmprune_jax.run.evaluation.lmms.backend import Answering, Backend

    answering = Answering(model, inputs, spec.batch_size, multiple, spec.max_length or 0, phase, journal)
    backend, files = Backend(answering), task_sources(spec, task)[0]
    with tempfile.TemporaryDirectory() as scratch:
        results = _evaluated(spec, task, files, backend, Path(scratch))
    values = {name: _values(metrics) for name, metrics in results["results"].items() if name in results["samples"]}
    lines = []
    for name in values or [task]:
        # Of several filters the first counts; each logs all questions.
        samples = {sample["doc_id"]: sample for sample in reversed(results["samples"].get(name, []))}
        mine = [_line(name, samples[doc], values[name], backend.replies[name, doc]) for doc in sorted(samples)]
        sets_of(name, values.get(name, {}), [line["entries"] for line in mine], {})  # refuses a task that failed
        lines += mine
    return lines, {"values": values, "higher_is_better": {n: results["higher_is_better"].get(n, {}) for n in values}}


def _evaluated(spec: EvaluateSpec, task: str, files: Path | None, backend: Any, scratch: Path) -> dict[str, Any]:
    """Run lmms-eval on one task and return its raw results.

    Raises UserError if it does not know the task, or fails.
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
    except Exception as error:  # tasks, data sets and judges may raise anything
        first: BaseException = error
        while first.__cause__ is not None:  # lmms-eval tries several times, and says that it did
            first = first.__cause__
        raise UserError(
            f"task {task}: lmms-eval fails with {type(first).__name__} ({reason(first)}): --debug shows "
            "more, docs/how-to/benchmarks.md says what the task needs (data, a judge)"
        ) from error


def _nearest(task: str, known: list[str]) -> str:
    near = suggest(task, known)
    return near if "mean" in near else " (docs/how-to/benchmarks.md; `python -m lmms_eval --tasks list` has all)"


def _quiet() -> None:
    """Context that turns lmms-eval's log messages into Python warnings."""
    import lmms_eval.models  # noqa: F401 (which sets its own up)
    from loguru import logger

    logger.remove()
    logger.add(lambda line: logging.getLogger("lmms_eval").warning("%s", line.record["message"]), level="WARNING")


def _values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return {metric: value} from lmms-eval's results, with 0 for None (as MathVista intends)."""
    values: dict[str, float] = {}
    for name, value in metrics.items():
        metric, _, filtered = name.partition(",")
        if filtered and "_stderr" not in metric and isinstance(value, int | float | None):
            values.setdefault(metric, float(value or 0.0))
    return values


def _line(task: str, sample: Mapping[str, Any], values: Mapping[str, float], reply: Any) -> dict[str, Any]:
    """Return one question's answer as a line of the answers file."""
    entries = {metric: sample[metric] for metric in values if metric in sample}
    if "mmmu_acc" in entries:
        from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

        entries["mmmu_acc"] = {**entries["mmmu_acc"], "right": evaluate_mmmu([entries["mmmu_acc"]])[1]["acc"]}
    target = sample["target"]
    references = [str(reference) for reference in target] if isinstance(target, list | tuple) else [str(target)]
    line = {"id": str(sample["doc_id"]), "task": task, "prediction": reply.prediction, "references": references}
    return {**line, "tokens": reply.tokens, "entries": entries}


def as_plain(value: Any) -> Any:
    """Convert a NumPy number to a Python number, and any other value that JSON does not support to text."""
    return value.item() if hasattr(value, "item") else str(value)
