"""The stages by name, in the order of a run; a user's file adds its own to `vp.stages`."""

from __future__ import annotations

from vlmprune_jax.core.checks import Registry
from vlmprune_jax.stages.stage import Stage

STAGES = Registry(
    "stages",
    Stage,
    {
        "score": Stage(
            "measure the importance of layers, heads and neurons -> scores.npz",
            run="stages.score:score_stage",
            sections=("data", "score", "prune"),
            outputs=("scores*.npz",),
            files="stages.score:score_files",
            per="variant",
            unneeded="stages.score:no_scores",
        ),
        "prune": Stage(
            "plan from the scores and write the pruned model -> plan.json, pruned/",
            run="stages.prune:prune_stage",
            sections=("data", "score", "prune", "export"),
            outputs=("plan.json",),
            model="pruned",
            files="stages.prune:prune_files",
            per="variant",
        ),
        "reconstruct": Stage(
            "repair the pruned weights by least squares, without training -> reconstructed/",
            run="stages.reconstruct:reconstruct_stage",
            sections=("data", "reconstruct"),
            inputs=("start", "data.train"),
            model="reconstructed",
            journals=(".reconstructed.parts",),
            per="variant",
            switch="reconstruct.method",
        ),
        "recover": Stage(
            "train the pruned model -> recovered/",
            run="stages.recover:recover_stage",
            sections=("data", "recover"),
            inputs=("start", "data.train"),
            model="recovered",
            scratch=("training/checkpoints",),
            files="stages.recover:recover_files",
            switch="recover.method",
            version=2,
            details="Metrics are in training/metrics.jsonl.",
        ),
        "evaluate": Stage(
            "run the evaluation sets and compute their metrics -> eval/*.json",
            run="stages.evaluate:evaluate_stage",
            sections=("data", "evaluate"),
            outputs=("eval/*.answers.jsonl",),
            files="stages.evaluate:evaluate_files",
            per="model",
            version=2,
            details="""\
After a change of metric, stored answers are scored again. --tasks=pope,mme runs tasks of lmms-eval.
The command also updates result.json, if the workdir has one.""",
        ),
        "speed": Stage(
            "measure the speed of the unpruned model and of every pruned shape, in turns -> speed.json",
            run="stages.speed:speed_stage",
            sections=("speed",),
            outputs=("speed.json",),
            files="stages.speed:speed_files",
            per="run",
            version=2,
        ),
        "export": Stage(
            "write the best model as a Hugging Face folder or GGUF files, and check it -> export/",
            run="stages.export:export_stage",
            sections=("data", "reconstruct", "export"),
            inputs=("start",),
            outputs=("export*",),
            files="stages.export:export_files",
            per="run",
            details="vlmprune reloads the export and compares its logits with those of the model in memory.",
            beside="write another format or quantisation to export-NAME/ with --format=NAME",
        ),
    },
)
