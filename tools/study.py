"""python tools/study.py NAME=SWEEP_DIR ...: test the paper's insights on sweeps and write the results as Markdown.

Each insight holds, does not hold or is open, with the compared pairs, their mean difference and its interval. NAME is
the heading of the sweep's section. --guide replaces the rows of that name in a guide, for `vlmprune recommend`.
  python tools/study.py easyvqa=runs/easyvqa --page=docs/explanation/study-tables.md --guide=FILE.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from study_guide import update_guide
from study_page import as_markdown, read_studies, update_page

from vlmprune_jax.base.console import make_reporter
from vlmprune_jax.run.cli.main import main

TAKES_ARGUMENTS = True
FLAGS = {
    "page": "write the results between the marks of this page, with figures beside it, instead of printing them",
    "guide": "add the rows to this guide, FILE.json (created if absent)",
}


def run(flags: Any) -> None:
    """Test the insights on all sweeps, and print the results or write them to a page or guide."""
    studies = read_studies(flags.args)
    reporter = make_reporter(True)
    if flags.page:
        update_page(Path(flags.page), studies)
        reporter.say(f"{flags.page}: conclusions written")
    if flags.guide:
        update_guide(Path(flags.guide), {name: sweep for name, (_, sweep) in studies.items()})
        reporter.say(f"{flags.guide}: rows written")
    for name, (folder, sweep) in () if flags.page or flags.guide else studies.items():
        for line in as_markdown(name, sweep, folder).splitlines():
            reporter.say(line)


if __name__ == "__main__":
    sys.exit(main(script=sys.modules[__name__]))
