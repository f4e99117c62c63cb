"""vlmprune prune --config=FILE.py --workdir=DIR: plan from scores.npz, and the pruned model.

Makes plan.json and pruned/.
Settings: prune.method, prune.ratio, prune.attn_layers, prune.mlp_layers (--config.prune.method=...).
"""

from __future__ import annotations

from typing import Any

from vlmprune_jax.cli.flags import Flags, common


def define(values: Flags) -> None:
    """Flags of this command."""
    common(values)


def run(flags: Any) -> None:
    """Do this stage for every variant of the experiment."""
    from vlmprune_jax.cli.workdir import prepare
    from vlmprune_jax.stages.run import prune_all

    prune_all(*prepare(flags))
