"""vlmprune run --config=FILE.py --workdir=DIR: score, prune, recover, evaluate, export and report, in this order.

Whatever is there already and was made from the same inputs is skipped; an interrupted run continues. The workdir ends
up with scores.npz, plan.json, pruned/, recovered/, eval/*.json, export/, result.json, report.html and report.png.
  vlmprune run --config=configs/demo.py --workdir=runs/demo
  vlmprune run --config=configs/llava15_7b.py --workdir=W --config.model.hf_dir=DIR --config.data.train=FILE.json ...
"""

from __future__ import annotations

from typing import Any

from vlmprune_jax.cli.flags import Flags, common


def define(values: Flags) -> None:
    """Flags of this command."""
    common(values)


def run(flags: Any) -> None:
    """Run every stage of every variant."""
    from vlmprune_jax.cli.workdir import prepare
    from vlmprune_jax.stages.run import run_all

    run_all(*prepare(flags))
