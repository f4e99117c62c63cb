"""vlmprune prune --config=FILE.py --workdir=DIR: plan from scores.npz, and the pruned model.

Makes plan.json and pruned/. --explain prints what each layer lost and why, also of what is there already.
Settings: prune.method, prune.ratio, prune.attn_layers, prune.mlp_layers (--config.prune.method=...).
"""

from __future__ import annotations

from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.cli.flags import Flags, common


def define(values: Flags) -> None:
    """Flags of this command."""
    common(values)
    absl_flags.DEFINE_bool("explain", False, "print what each layer lost and why", flag_values=values)


def run(flags: Any) -> None:
    """Do this stage for every variant of the experiment."""
    from vlmprune_jax.cli.workdir import prepare
    from vlmprune_jax.stages.run import prune_all

    prune_all(*prepare(flags), explained=flags.explain)
