"""vlmprune report --workdir=DIR: the table on the terminal, report.html and report.png from what is in DIR.

The page is one file without external resources: tables, scores against size, sample questions with every model's
answer, cost and speed, what was removed and why, training curves, and where it all comes from. Of a run that is not
finished it shows what is there, and names the command that makes what is missing.
"""

from __future__ import annotations

from typing import Any

from vlmprune_jax.cli.flags import Flags, common


def define(values: Flags) -> None:
    """Flags of this command."""
    common(values)


def run(flags: Any) -> None:
    """Build the report."""
    from vlmprune_jax.cli.config_files import to_workdir
    from vlmprune_jax.core.console import make_reporter
    from vlmprune_jax.core.errors import UserError
    from vlmprune_jax.stages.context import Context
    from vlmprune_jax.stages.run import finish

    if not flags.workdir:
        raise UserError("no workdir given: --workdir=DIR of `vlmprune run`, finished or not")
    finish(Context(to_workdir(flags.workdir), make_reporter(True), flags.overwrite))
