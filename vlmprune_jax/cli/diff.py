"""vlmprune diff A B: how much of what two plans keep is the same, layer by layer.

A and B are plans of one model: plan.json files, or workdirs and model folders that hold one. Shares are of what either
keeps of a layer's heads and neurons (Jaccard); the last row is of all layers.
"""

from __future__ import annotations

from typing import Any

from vlmprune_jax.cli.flags import Flags

TAKES_ARGUMENTS = True


def define(values: Flags) -> None:
    """Define no flags: this command only takes positional arguments."""


def run(flags: Any) -> None:
    """Print one table per stack that compares two plans layer by layer."""
    from vlmprune_jax.core.console import make_reporter
    from vlmprune_jax.core.errors import UserError
    from vlmprune_jax.prune.tables import compare, read_plan

    if len(flags.args) != 2:
        raise UserError("diff takes two plans: vlmprune diff A B (plan.json files, or folders that hold one)")
    reporter = make_reporter(True)
    for table in compare(*map(read_plan, flags.args)):
        reporter.table(*table)
