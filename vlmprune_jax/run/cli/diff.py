"""vlmprune diff A B: compare the heads and neurons that two plans for one model keep, layer by layer.

A and B are plan.json files or folders with one. Prints Jaccard indices of kept heads and neurons per layer and overall.
"""

from __future__ import annotations

from typing import Any

TAKES_ARGUMENTS = True


def run(flags: Any) -> None:
    """Print one table per stack (decoder, vision tower) that compares two prune plans layer by layer."""
    from vlmprune_jax.base.console import make_reporter
    from vlmprune_jax.base.errors import UserError
    from vlmprune_jax.core.plans.plan import PrunePlan
    from vlmprune_jax.core.prune.tables import compare

    if len(flags.args) != 2:
        raise UserError("diff takes two plans: vlmprune diff A B (plan.json files, or folders that contain one)")
    reporter = make_reporter(True)
    for table in compare(*map(PrunePlan.from_json, flags.args)):
        reporter.table(*table)
