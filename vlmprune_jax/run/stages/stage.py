"""A stage is a declaration: settings, files and function. `STAGES` has all, and users' files add to `vp.stages`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from vlmprune_jax.base.checks import Registry

if TYPE_CHECKING:
    from vlmprune_jax.core.prune.config import PlanConfig
    from vlmprune_jax.run.workdir.ledger import Task


@dataclass(frozen=True)
class Stage:
    """Declaration of a pipeline stage, from which commands, sweeps and the ledger are derived.

    Args:
      help: one line, in the imperative.
      run: function `run(work, *sections)` that makes the outputs and returns facts for the ledger: a `msgspec.Struct`
        (its annotated return type), or None. A built-in stage NAME leaves this field out: its function is NAME_stage in
        `stages.NAME`, or in the module of `stages` named by `module`.
      sections: config sections that `run` receives besides the model, in the order of its arguments.
      inputs: what the stage reads: "data.train" (records), "start" (the input model), or file names in its folder.
      outputs: names of the files that the stage writes besides `model`; a pattern if `task` adds the files.
      model: folder of the model that the stage makes. This model is then evaluated and may be exported.
      scratch: files from which an interrupted run of the stage continues.
      journals: like `scratch`, but deleted when inputs change.
      task: function that adds the files and settings that depend on the experiment: `task(task, work, *sections) ->
        Task`.
      per: what the stage is applied to: every prune variant, every recovery variant, every model, or the whole run.
      switches: settings of which each turns the stage off by the value "none", such as "recover.method".
      unneeded: function that returns why the settings make the stage unnecessary: `unneeded(sections) -> str | None`.
      version: number to raise whenever the code gives different results for the same inputs; then outputs are remade.
      details: more text for `vlmprune NAME --help`.
      beside: advice on how to make a second result, for the error about outputs made from other inputs.
    """

    help: str
    run: Callable[..., msgspec.Struct | None] | None = None
    module: str = ""
    sections: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    model: str = ""
    scratch: tuple[str, ...] = ()
    journals: tuple[str, ...] = ()
    task: Callable[..., Task] | None = None
    per: Literal["variant", "recovery", "model", "run"] = "recovery"
    switches: tuple[str, ...] = ()
    unneeded: Callable[[Mapping[str, Any]], str | None] | None = None
    version: int = 1
    details: str = ""
    beside: str = "use another --workdir"

    def off(self, sections: Mapping[str, Any]) -> str | None:
        """Return why the settings disable this stage, and how to enable it; None if it is enabled."""
        for switch in self.switches:
            section, _, name = switch.partition(".")
            if getattr(sections[section], name) == "none":
                return f'{switch} is "none": choose a method (`vlmprune help {switch}`)'
        return None if self.unneeded is None else self.unneeded(sections)


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


STAGES = Registry(
    "stages",
    Stage,
    {
        "score": Stage(
            "measure the importance of layers, heads and neurons -> scores.npz",
            module="prune",
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
            switches=("prune.method",),
        ),
        "reconstruct": Stage(
            "repair the pruned weights by least squares, without training -> reconstructed/",
            module="recover",
            sections=("data", "reconstruct"),
            inputs=("start", "data.train"),
            model="reconstructed",
            journals=(".reconstructed.parts",),
            per="variant",
            switches=("reconstruct.method", "prune.method"),
        ),
        "recover": Stage(
            "train the pruned model -> recovered/",
            sections=("data", "recover"),
            inputs=("start", "data.train"),
            model="recovered",
            scratch=("training/checkpoints",),
            switches=("recover.method",),
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
            module="evaluate",
            sections=("speed",),
            per="run",
            version=3,
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
