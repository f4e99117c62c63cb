"""What a person sees while stages run: lines, progress bars and tables, from process 0 only."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vlmprune_jax.core.errors import printable

PAUSE_SECONDS = 60.0
# Characters of a column, columns and rows of a table: the report has everything.
WIDEST, MOST_COLUMNS, MOST_ROWS = 48, 16, 400
PIPE_WIDTH = 120  # columns of tables that go to a file or pipe, where there is no terminal to ask


class Terminal(Console):
    """A console whose reader may go: `vlmprune ... | head` ends as where plain `print` meets it."""

    def on_broken_pipe(self) -> None:
        """rich would end the process here by SystemExit(1)."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@dataclass(frozen=True)
class Reporter:
    """Prints to `console` if `enabled`; bars on a terminal, where they vanish once done, elsewhere a line a minute.

    `prefix`: what every line begins with, where several processes print.
    """

    console: Console
    enabled: bool = True
    prefix: str = ""

    def say(self, text: str) -> None:
        """One line, perhaps indented, never wrapped by us, never interpreted as markup."""
        if self.enabled:
            line = self.prefix + text[: len(text) - len(text.lstrip(" "))] + printable(text)
            self.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yields a function that takes the number of items done; where no bar can be drawn it says so once a minute."""
        if not self.enabled:
            yield lambda done: None
            return
        if not self.console.is_terminal:
            yield self._lines(what, total)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, refresh_per_second=4) as progress:
            task = progress.add_task(printable(what), total=total)
            yield lambda done: progress.update(task, completed=done)

    def _lines(self, what: str, total: int) -> Callable[[int], None]:
        said = time.monotonic()

        def update(done: int) -> None:
            nonlocal said
            if time.monotonic() - said >= PAUSE_SECONDS:
                said = time.monotonic()
                self.say(f"  {what}: {done:,} of {total:,}")

        return update

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """One table; the first column is text, the others are numbers, aligned to the right."""
        if not self.enabled:
            return
        table = Table(
            title=_cell(title, "table.title"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )  # 78 columns
        for number, name in enumerate(header[:MOST_COLUMNS]):
            justify: Any = "right" if number else "left"
            table.add_column(_cell(name), justify=justify, no_wrap=True, max_width=WIDEST)
        for row in rows[:MOST_ROWS]:
            table.add_row(*map(_cell, row[:MOST_COLUMNS]))
        self.console.print(table)
        if len(rows) > MOST_ROWS or len(header) > MOST_COLUMNS:
            self.say(f"  the first of {len(rows):,} rows and {len(header):,} columns")


def _cell(text: str, style: str = "") -> Text:
    """Text of anybody's, in which nothing is markup."""
    return Text(printable(text), style)


def make_reporter(enabled: bool) -> Reporter:
    """A reporter on standard output."""
    console = Terminal()
    return Reporter(console if console.is_terminal else Terminal(width=PIPE_WIDTH), enabled)
