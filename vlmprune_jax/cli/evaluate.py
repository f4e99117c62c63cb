"""vlmprune evaluate --config=FILE.py --workdir=DIR: exact-match accuracy of the unpruned, pruned and recovered models.

Makes eval/*.json with every single answer beside.
Settings: evaluate.batch_size, evaluate.max_new_tokens, evaluate.text (--config.evaluate.batch_size=...).
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
    from vlmprune_jax.stages.run import evaluate_all

    evaluate_all(*prepare(flags))
