"""vlmprune demo --workdir=runs/demo: run the whole pipeline on a bundled model and real data, in 3 minutes on a CPU.

The same as `vlmprune run --config=demo`: removes 30 % of a small LLaVA (56 % of its decoder) by depth and by width,
trains it on 5 % of easy-VQA with hidden-state distillation, evaluates it on 9,673 questions and exports it.
`--config=demo:full` has more recoveries.
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
