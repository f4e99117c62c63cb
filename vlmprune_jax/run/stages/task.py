"""Conversion of a stage, with its settings and folders, to a ledger task."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmprune_jax.base.checks import file_of_users
from vlmprune_jax.io.data.inputs import record_files
from vlmprune_jax.run.experiment.spec import affecting
from vlmprune_jax.run.stages.registry import STAGES
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.ledger import NoFacts, Task


def make_task(work: Work, run: Callable[..., Any] | None, complete: Callable[..., Any] | None) -> Task:
    """Return the task of `work`: the stage's settings, inputs and outputs for this variant and folder.

    `run` and `complete`: functions of a built-in stage; the functions of a user's stage replace them.
    """
    stage, sections = STAGES[work.stage], work.sections
    run, complete = (run, complete) if stage.run is None else (stage.run, stage.task)
    assert run is not None
    arguments = [sections[section] for section in stage.sections]
    below, title = work.folder.relative_to(work.workdir).as_posix(), f"{work.stage} {work.label}".strip()
    files = [name for name in (*stage.outputs, stage.model) if name and "*" not in name]
    inputs = _inputs(work)
    task = Task(
        name=title if below == "." else f"{below}/{title}",
        function=functools.partial(run, work, *arguments),
        workdir=work.workdir,
        settings=affecting(work.stage, {section: sections[section] for section in ("model", *stage.sections)}),
        inputs=inputs,
        outputs=[work.folder / name for name in files],
        version=stage.version,
        facts=typing.get_type_hints(run).get("return", NoFacts),
        scratch=[work.folder / name for name in stage.scratch],
        journals=[work.folder / name for name in stage.journals],
        kind=work.stage,
        store=work.store,
        beside=stage.beside,
    )
    task = task if complete is None else complete(task, work, *arguments)
    user_file = file_of_users(run)
    task = task if user_file is None else task.add(inputs={f"stage {work.stage}": user_file})
    return dataclasses.replace(task, makers={name: maker for name in task.inputs if (maker := _maker(task, name))})


def _inputs(work: Work) -> dict[str, Path | str]:
    """Return the files that a stage declares: the unpruned model, records, and models or files of earlier stages."""
    inputs: dict[str, Path | str] = {**work.model_files}
    for source in STAGES[work.stage].inputs:
        section, _, which = source.partition(".")
        if section == "data":
            inputs |= record_files(work.experiment.data, which)
        else:
            path = work.start if source == "start" else work.folder / source
            inputs[path.name] = path
    return inputs


def _maker(task: Task, name: str) -> str | None:
    """Return the name of the stage that makes the input `name` of a task; None if no stage makes it."""
    if name in task.outside:
        return None
    for stage, declared in STAGES.items():
        for pattern in (*declared.outputs, declared.model):
            if fnmatch.fnmatchcase(Path(task.inputs[name]).name, pattern):
                return stage
    return None
