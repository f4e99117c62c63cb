"""Answers of one model folder, and what they are worth -> `eval/<name>.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmprune_jax.errors import UserError
from vlmprune_jax.evaluation.runner import evaluate, perplexity
from vlmprune_jax.experiment.spec import Experiment, affecting
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.stages import inputs
from vlmprune_jax.stages.context import (
    Context,
    journal_of,
    journal_path,
    load_model,
    mesh_of,
    model_inputs,
)
from vlmprune_jax.stages.ledger import Json, write_json, write_text


def evaluate_stage(experiment: Experiment, model_folder: Path, out: Path, name: str, context: Context) -> Json:
    """Accuracy (and perplexity, if a text is named) of one folder -> `eval/<name>.json`, and its answers beside."""
    spec = experiment.evaluate
    path, answers_path = out / "eval" / f"{name}.json", out / "eval" / f"{name}.answers.jsonl"
    text = {} if spec.text is None else {"evaluate.text": Path(spec.text)}
    stage = context.stage(
        "evaluate",
        out,
        f"evaluate {name}",
        settings=affecting("evaluate", experiment),
        inputs=model_inputs(experiment, model=model_folder, **inputs.record_files(experiment.data, "eval"), **text),
        outputs=[path, answers_path],
        journals=[journal_path(path)],
    )

    def body() -> Json:
        model = load_model(experiment, model_folder)
        mesh = mesh_of(experiment)
        ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        plan = inputs.question_plan(experiment, model.cfg, multiple=ways)
        tokenizer = plan.encoder.tokenizer
        batches = plan.batches(threads=experiment.data.threads, prefetch=inputs.PREFETCH)
        journal = journal_of(experiment, journal_path(path), len(plan))
        with context.phase(f"evaluate {name}", len(plan)) as progress:
            result = evaluate(
                model,
                batches,
                tokenizer=tokenizer,
                max_new_tokens=spec.max_new_tokens,
                progress=progress,
                journal=journal,
            )
        facts = result.summary()
        if spec.text is not None:
            facts["perplexity"] = _text_perplexity(experiment, model, tokenizer, context)
        lines = [json.dumps(vars(answer), ensure_ascii=False) + "\n" for answer in result.answers]
        write_text(answers_path, "".join(lines))
        write_json(path, {**facts, "answers": answers_path.name})
        context.reporter.say(
            f"  {name}: {100 * result.accuracy:.2f} % of {result.questions:,} questions right "
            f"({result.parameters:,} parameters, {result.seconds:.1f} s)"
        )
        return {k: v for k, v in facts.items() if k != "seconds"}

    return context.run(stage, body)


def _text_perplexity(experiment: Experiment, model: Model, tokenizer: Any, context: Context) -> float:
    spec = experiment.evaluate
    assert spec.text is not None
    try:
        ids = tokenizer(Path(spec.text).read_text(encoding="utf-8"))["input_ids"]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluate.text={spec.text}: cannot be read as UTF-8 text ({error})") from None
    total = -(-len(ids) // (spec.text_window * spec.batch_size))
    with context.phase("perplexity", total) as progress:
        return perplexity(model, ids, window=spec.text_window, batch_size=spec.batch_size, progress=progress).perplexity
