"""vlmprune evaluate --config=FILE.py --workdir=DIR: what metrics say of the unpruned, pruned and recovered models.

Makes eval/*.json with every single answer beside; another metric is worked out from these answers, without the model.
Settings: evaluate.batch_size, evaluate.metric, evaluate.max_new_tokens, evaluate.text, and evaluate.sets.NAME.metric,
.data, .images, .prompt_suffix, ... for several sets (--config.evaluate.metric=...). Benchmarks scored by lmms-eval:
--tasks=pope,mme (docs/how-to/benchmarks.md). Where there is a result.json, it gains what is new.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from vlmprune_jax.cli.flags import Flags, common


def define(values: Flags) -> None:
    """Flags of this command."""
    common(values)
    flags.DEFINE_list("tasks", None, "tasks of lmms-eval, in place of evaluate.tasks", flag_values=values)


def run(values: Any) -> None:
    """Do this stage for every variant of the experiment."""
    from vlmprune_jax.cli.workdir import prepare
    from vlmprune_jax.stages.run import evaluate_all

    if values.tasks is not None and values.config is not None:
        values.config.evaluate.tasks = tuple(values.tasks)
    evaluate_all(*prepare(values))
