"""vlmprune help NAME: print meaning, default and allowed values of a setting, or of all settings of a section.

NAME is a full name (`vlmprune help recover.losses.kl`) or its last part (`vlmprune help kl`). Without NAME,
`vlmprune help` lists the commands.
"""

from __future__ import annotations

from typing import Any

TAKES_ARGUMENTS = True


def run(flags: Any) -> None:
    """Print the declaration (type, default, help) of every setting named on the command line."""
    from vlmprune_jax.base.console import wrap_lines
    from vlmprune_jax.run.experiment.options import describe

    for name in flags.args:
        print("\n".join(wrap_lines(describe(name))))
