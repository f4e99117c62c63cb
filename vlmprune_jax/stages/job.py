"""From the declaration of a stage to a job of the ledger, which runs unless its result is there."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from vlmprune_jax.core.checks import file_of_users
from vlmprune_jax.core.errors import Stopped, UserError
from vlmprune_jax.data.inputs import record_files
from vlmprune_jax.distributed.mesh import start_devices
from vlmprune_jax.distributed.preemption import noticed
from vlmprune_jax.experiment.spec import affecting
from vlmprune_jax.stages.registry import STAGES
from vlmprune_jax.stages.stage import NoFacts
from vlmprune_jax.stages.work import Work, in_memory, teacher_folder
from vlmprune_jax.workdir.ledger import Finished, Job, run_job

Sections = Mapping[str, Any]


def make_job(name: str, work: Work, sections: Sections) -> Job:
    """Return a stage's job in a workdir: settings, inputs and outputs, as the stage declares them."""
    stage = STAGES[name]
    more = stage.more(work, *(sections[section] for section in stage.sections))
    settings = affecting(name, {section: sections[section] for section in ("model", *stage.sections)})
    below = work.folder.relative_to(work.workdir).as_posix()
    title = f"{name} {work.part}".strip()
    files = [name for name in (*stage.outputs, stage.model) if name and "*" not in name]
    return Job(
        title if below == "." else f"{below}/{title}",
        stage.version,
        work.workdir,
        settings={key: value for key, value in settings.items() if key not in more.without} | {**more.settings},
        inputs={**work.model_files, **_inputs(name, work, sections), **more.inputs},
        outputs=[*(work.folder / name for name in files), *more.outputs],
        facts=stage.facts,
        scratch=[work.folder / name for name in stage.scratch],
        journals=[*(work.folder / name for name in stage.journals), *more.journals],
        stage=name,
        store=work.store,
        beside=stage.beside,
    )


def _inputs(name: str, work: Work, sections: Sections) -> dict[str, Path | str]:
    stage, inputs = STAGES[name], dict[str, Path | str]()
    for source in stage.inputs:
        section, _, which = source.partition(".")
        if section == "data":
            inputs |= record_files(sections["data"], which)
        else:
            path = work.start if source == "start" else work.folder / source
            inputs[path.name] = path
    user_file = file_of_users(stage.function)
    return inputs if user_file is None else {**inputs, f"stage {name}": user_file}


def run_stage(name: str, work: Work, sections: Sections) -> Finished:
    """Run a stage unless its result is up to date.

    Raises Stopped if another process of the run got SIGTERM; UserError if an input is missing, memory does not suffice,
    and as `run_job` does.
    """
    teacher_folder(work.model)  # refuses a missing one
    stage, job = STAGES[name], make_job(name, work, sections)
    _check_inputs(job)

    def body() -> msgspec.Struct:
        if noticed():
            raise Stopped(f"stopped on SIGTERM before {job.name}; the same command continues with it")
        work.say(f"{job.name} ...")
        start_devices()
        with in_memory(job.name):
            facts = stage.function(work, *(sections[section] for section in stage.sections)) or NoFacts()
        if not isinstance(facts, msgspec.Struct):
            raise UserError(f"stage {name}: returned a {type(facts).__name__}: it must return a msgspec.Struct or None")
        return facts

    return run_job(job, body, overwrite=work.overwrite, say=work.say)


def _check_inputs(job: Job) -> None:
    """Raise UserError if a stage's input is missing, naming the stage that makes it."""
    for path in job.inputs.values():
        if isinstance(path, Path) and path.is_relative_to(job.workdir) and not path.exists():
            for name, stage in STAGES.items():
                if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in (*stage.outputs, stage.model)):
                    raise UserError(f"{path}: no such file or folder: run `vlmprune {name}` (or `vlmprune run`) first")
