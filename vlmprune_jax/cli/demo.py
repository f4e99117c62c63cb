"""vlmprune demo --workdir=runs/demo: the whole run on bundled real data, on a CPU, in about three minutes.

The same as `vlmprune run --config=demo`: easy-VQA (1,000 test images, 9,673 questions) and a small LLaVA teacher that
comes with the package, pruned by depth and by width by 30 % (56 % of the decoder), recovered with 5 % of the training
questions and hidden-state distillation, evaluated, exported and compared. `--config=demo:full` has more recoveries.
"""

from __future__ import annotations

from typing import Any

from vlmprune_jax.cli.flags import Flags, common

CONFIG = "demo"


def define(values: Flags) -> None:
    """Define the flags of `run`, with the demo's config and a default workdir."""
    common(values)
    values["workdir"].value = "runs/demo"


def run(flags: Any) -> None:
    """Run all stages of the demo's config."""
    from vlmprune_jax.cli.stages import run_command

    run_command("run", flags)
