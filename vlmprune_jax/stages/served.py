"""Evaluation of the model that a server serves, on the sets of an experiment -> `eval/served-MODEL.json`."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.distributed.mesh import process_count
from vlmprune_jax.evaluation.config import EvaluateSpec, EvaluationSetSpec
from vlmprune_jax.evaluation.questions import evaluation_records
from vlmprune_jax.evaluation.server import Server, ask_server
from vlmprune_jax.experiment.arguments import QUESTIONS, evaluation_sets
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.stages.answers import measure_set
from vlmprune_jax.stages.evaluate import (
    AnswerFacts,
    answers_file,
    as_lines,
    check_metric,
    set_files,
    write_answers,
)
from vlmprune_jax.stages.work import Work, journal_path
from vlmprune_jax.workdir.evaluation import Evaluated, evaluation_file
from vlmprune_jax.workdir.ledger import Job, run_job

UNUSED = (
    *(("data", name) for name in ("template", "system", "min_tiles", "max_tiles", "thumbnail", "max_image_tokens")),
    *(("evaluate", name) for name in ("max_length", "tasks")),
)  # settings of evaluation that a server does not get


def evaluate_server(work: Work, sections: Mapping[str, Any], url: str, start: Experiment) -> dict[str, Evaluated]:
    """Evaluate the model behind a server: ask it all questions of every set, and score its answers.

    `start`: what the user started from, see `unused_settings`. Raises UserError as `Server` does, or if the run has
    several processes, or there are only texts.
    """
    if process_count() > 1:
        raise UserError("--server works with one process only: run the command without --coordinator")
    spec, server, evaluations = sections["evaluate"], Server.connect(url), dict[str, Evaluated]()
    name = f"served-{re.sub(r'[^A-Za-z0-9_-]+', '-', server.model).strip('-')[-80:]}"
    work.say(f"{server.url} serves {server.model}: its answers go to eval/{name}*.json")
    unused = [
        f"{at}.{name}"
        for at, name in UNUSED
        if getattr(sections[at], name) not in [getattr(given.sections[at], name) for given in (Experiment(), start)]
    ]
    if unused:
        work.say(f"  no effect: {', '.join(unused)}, because the server has its own template and limits")
    for key, eval_set in evaluation_sets(sections["data"], spec).items():
        if eval_set.text is not None:
            work.say(f"  {key}: not evaluated, because a server does not return log-likelihoods of a text")
            continue
        part = dataclasses.replace(work, part=name if key == QUESTIONS else f"{name} {key}")
        path = evaluation_file(work.folder, name, key)
        begin = {"add_special_tokens": True} if server.adds_begin else {}
        settings = {setting: getattr(eval_set, setting) for setting in ("prompt_suffix", "max_new_tokens", "questions")}
        job = Job(
            f"evaluate {part.part}",
            1,
            work.workdir,
            settings={**settings, **begin, "server": server.url, "model": server.model},
            inputs=set_files(sections["data"], key, eval_set),
            outputs=[answers_file(path)],
            facts=AnswerFacts,
            journals=[journal_path(path)],
        )
        body = _body(part, spec, eval_set, server, path)
        evaluations |= measure_set(part, eval_set, run_job(job, body, overwrite=work.overwrite, say=work.say))
    if not evaluations:
        raise UserError("evaluate.sets contains no questions for --server: add a set with `data`")
    return evaluations


def _body(work: Work, spec: EvaluateSpec, eval_set: EvaluationSetSpec, server: Server, path: Any) -> Any:
    """Return the function that asks a server a set's questions and writes the answers file."""

    def ask() -> AnswerFacts:
        assert eval_set.max_new_tokens is not None
        records = evaluation_records(eval_set, image_lead=True)
        check_metric(eval_set, records)
        start = time.perf_counter()
        batches = -(-len(records) // spec.batch_size)
        with work.phase(f"evaluate {work.part}", batches) as progress:
            replies = ask_server(
                server,
                records,
                prompt_suffix=eval_set.prompt_suffix or "",
                max_new_tokens=eval_set.max_new_tokens,
                parallel=spec.batch_size,
                progress=progress,
                journal=work.journal(path, {"batches": batches}),
            )
        lines, facts = as_lines(replies, start)
        write_answers(path, lines)
        return AnswerFacts(parameters=0, **facts)

    return ask
