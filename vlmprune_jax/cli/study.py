"""vlmprune study NAME=SWEEP_DIR ...: what sweeps say of the paper's insights, with numbers, as Markdown.

Each insight holds, does not hold or cannot be said, with the pairs compared, the difference and its interval. NAME is
what the rows are called; --guide adds them to a guide, in place of those it had of that name, for `vlmprune recommend`.
  vlmprune study easyvqa=runs/study_easyvqa --page=docs/explanation/study.md --guide=vlmprune_jax/report/guide.json
"""

from __future__ import annotations

from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.cli.flags import Flags

TAKES_ARGUMENTS = True


def define(values: Flags) -> None:
    """Flags of this command."""
    about = "write the conclusions into this page, between its marks, and figures beside it, instead of printing them"
    absl_flags.DEFINE_string("page", None, about, flag_values=values)
    absl_flags.DEFINE_string("guide", None, "add the rows to this guide, or make it, FILE.json", flag_values=values)


def run(flags: Any) -> None:
    """Print or write what the sweeps say."""
    from pathlib import Path

    from vlmprune_jax.core.console import make_reporter
    from vlmprune_jax.report.study_guide import update_guide
    from vlmprune_jax.report.study_page import as_markdown, read_studies, update_page

    studies = read_studies(flags.args)
    reporter = make_reporter(True)
    if flags.page:
        update_page(Path(flags.page), studies)
        reporter.say(f"{flags.page}: conclusions written")
    if flags.guide:
        update_guide(Path(flags.guide), studies)
        reporter.say(f"{flags.guide}: rows written")
    for name, sweep in {} if flags.page or flags.guide else studies.items():
        for line in as_markdown(name, sweep).splitlines():
            reporter.say(line)
