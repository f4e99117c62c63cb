"""vlmprune reconstruct --config=FILE.py --workdir=DIR: solve for what the kept weights can make up for.

Makes reconstructed/ from pruned/ and a few calibration records, without training; an interrupted run continues.
Settings: reconstruct.method ("least_squares"), reconstruct.samples (--config.reconstruct.method=...).
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
    from vlmprune_jax.stages.run import reconstruct_all

    reconstruct_all(*prepare(flags))
