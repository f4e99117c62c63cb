"""Evaluation of the model that a server serves, on the sets of an experiment -> `eval/served-MODEL.json`."""

from __future__ import annotations

import functools
import re
import time

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.processes import process_count
from vlmprune_jax.run.evaluation.config import EvaluateSpec, EvaluationSetSpec
from vlmprune_jax.run.evaluation.questions import evaluation_records
from vlmprune_jax.run.evaluation.server import Server, ask_server
from vlmprune_jax.run.experiment.arguments import evaluation_sets
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.stages.answers import measure_set
from vlmprune_jax.run.stages.evaluate import (
    AnswerFacts,
    answers_file,
    as_lines,
    check_metric,
    result_file,
    set_files,
    write_answers,
)
from vlmprune_jax.run.stages.work import Work, journal_path
from vlmprune_jax.run.workdir.evaluation import Evaluated
from vlmprune_jax.run.workdir.ledger import Task, run_task

UNUSED = (
    *(("data", name) for name in ("template", "system", "min_tiles", "max_tiles", "thumbnail", "max_image_tokens")),
    *(("evaluate", name) for name in ("max_length", "tasks")),
)  # settings of evaluation that a server does not get


def evaluate_server(work: Work, url: str, start: Experiment) -> dict[str, Evaluated]:
    """Evaluate the model behind a server: ask it the questions of all sets, and score its answers.

    `start`: the config from which the user started, see `unused_settings`. Raises UserError if the server cannot be
    used (see `Server`), several processes run, or no evaluation set has questions.
    """
    if process_count() > 1:
        raise UserError("--server works with one process only: run the command without --coordinator")
    data, spec, sections = work.experiment.data, work.experiment.evaluate, work.sections
    server, evaluations = Server.connect(url), dict[str, Evaluated]()
    name = f"served-{re.sub(r'[^A-Za-z0-9_-]+', '-', server.model).strip('-')[-80:]}"
    work.say(f"{server.url} serves {server.model}: its answers go to eval/{name}*.json")
    unused = [
        f"{at}.{name}"
        for at, name in UNUSED
        if getattr(sections[at], name) not in [getattr(given.sections[at], name) for given in (Experiment(), start)]
    ]
    if unused:
        work.say(f"  no effect: {', '.join(unused)}, because the server has its own template and limits")
    for key, eval_set in evaluation_sets(data, spec).items():
        if eval_set.text is not None:
            work.say(f"  {key}: not evaluated, because a server does not return log-likelihoods of a text")
            continue
        part = work.replace(subject=name, part=key)
        path = result_file(part)
        begin = {"add_special_tokens": True} if server.adds_begin else {}
        settings = {setting: getattr(eval_set, setting) for setting in ("prompt_suffix", "max_new_tokens", "questions")}
        task = Task(
            name=f"evaluate {part.label}",
            function=functools.partial(_ask_all, part, spec, eval_set, server),
            workdir=work.workdir,
            settings={**settings, **begin, "server": server.url, "model": server.model},
            inputs=set_files(data, key, eval_set),
            outputs=[answers_file(path)],
            facts=AnswerFacts,
            journals=[journal_path(path)],
        )
        evaluations |= measure_set(part, eval_set, run_task(task, overwrite=work.overwrite, say=work.say))
    if not evaluations:
        raise UserError("evaluate.sets contains no questions for --server: add a set with `data`")
    return evaluations


def _ask_all(work: Work, spec: EvaluateSpec, eval_set: EvaluationSetSpec, server: Server) -> AnswerFacts:
    """Ask a server all questions of a set, and write the answers file."""
    assert eval_set.max_new_tokens is not None
    records, path = evaluation_records(eval_set, image_lead=True), result_file(work)
    check_metric(eval_set, records)
    start, batches = time.perf_counter(), -(-len(records) // spec.batch_size)
    with work.phase(f"evaluate {work.label}", batches) as progress:
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
