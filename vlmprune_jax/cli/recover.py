"""vlmprune recover --config=FILE.py --workdir=DIR: train what pruning lost.

Makes recovered/ and training/metrics.jsonl; an interrupted run resumes from training/checkpoints.
Settings: recover.trainable, recover.losses.l2, recover.epochs, data.fraction (--config.recover.trainable=...).
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
    from vlmprune_jax.stages.run import recover_all

    recover_all(*prepare(flags))
