"""The stages by name, in the order of a run; a user's file adds its own to `vp.stages`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlmprune_jax.base.checks import Registry
from vlmprune_jax.run.stages.stage import Stage

if TYPE_CHECKING:
    from vlmprune_jax.core.prune.config import PlanConfig


def no_scores(sections: Mapping[str, Any]) -> str | None:
    """Return why the settings need no scores, with the command to run instead; None if they need scores."""
    if sections["prune"].needs_scores:
        return None
    return f"{without_scores(sections['prune'])}, so no scores are needed: run `vlmprune prune`"


def without_scores(prune: PlanConfig) -> str:
    """Return why settings need no scores."""
    if prune.method == "none":
        return 'prune.method="none" removes nothing'
    return "prune.layers lists the layers to remove" if prune.layers else "only the vocabulary is trimmed"


def nothing_pruned(sections: Mapping[str, Any]) -> str | None:
    """Return why there are no pruned weights to repair; None if there are some."""
    return without_scores(sections["prune"]) if sections["prune"].method == "none" else None


STAGES = Registry(
    "stages",
    Stage,
    {
        "score": Stage(
            "measure the importance of layers, heads and neurons -> scores.npz",
            sections=("data", "score", "prune"),
            outputs=("scores*.npz",),
            per="variant",
            unneeded=no_scores,
        ),
        "prune": Stage(
            "plan from the scores and write the pruned model -> plan.json, pruned/",
            sections=("data", "score", "prune", "export"),
            outputs=("plan.json",),
            model="pruned",
            per="variant",
            switch="prune.method",
        ),
        "reconstruct": Stage(
            "repair the pruned weights by least squares, without training -> reconstructed/",
            sections=("data", "reconstruct"),
            inputs=("start", "data.train"),
            model="reconstructed",
            journals=(".reconstructed.parts",),
            per="variant",
            switch="reconstruct.method",
            unneeded=nothing_pruned,
        ),
        "recover": Stage(
            "train the pruned model -> recovered/",
            sections=("data", "recover"),
            inputs=("start", "data.train"),
            model="recovered",
            scratch=("training/checkpoints",),
            switch="recover.method",
            version=2,
            details="Metrics are in training/metrics.jsonl.",
        ),
        "evaluate": Stage(
            "run the evaluation sets and compute their metrics -> eval/*.json",
            sections=("data", "evaluate"),
            outputs=("eval/*.answers.jsonl",),
            per="model",
            version=2,
            details="""\
After a change of metric, stored answers are scored again.
The command also updates result.json, if the workdir has one.""",
        ),
        "speed": Stage(
            "measure the speed of the unpruned model and of each pruned layer shape, in turns -> speed.json",
            sections=("speed",),
            outputs=("speed.json",),
            per="run",
            version=2,
        ),
        "export": Stage(
            "write the best model as a Hugging Face folder or GGUF files, and check it -> export/",
            sections=("data", "reconstruct", "export"),
            inputs=("start",),
            outputs=("export*",),
            per="run",
            details="vlmprune reloads the export and compares its logits with those of the model in memory.",
            beside="write another format or quantisation to export-NAME/ with --format=NAME",
        ),
    },
)
