"""vlmprune score --config=FILE.py --workdir=DIR: importances of the unpruned model's layers, heads or neurons.

Makes scores.npz.
Settings: score.depth (or score.width), score.samples, score.variant (--config.score.depth=...).
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
    from vlmprune_jax.stages.run import score_all

    score_all(*prepare(flags))
