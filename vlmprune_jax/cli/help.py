"""vlmprune help SETTING: what a setting or a section does, its default and choices, and the stages that it changes.

As `vlmprune help recover.losses.kl`, or just `kl`; without a name the commands. docs/reference/settings.md lists all.
"""

from __future__ import annotations

from typing import Any

from vlmprune_jax.cli.flags import Flags

TAKES_ARGUMENTS = True


def define(values: Flags) -> None:
    """Flags of this command: none of its own."""


def run(flags: Any) -> None:
    """Print what is declared of each name."""
    from vlmprune_jax.experiment.options import as_lines, find

    for name in flags.args:
        print("\n".join(line for option in find(name) for line in as_lines(option)))
