"""Console output while stages run: lines, progress bars and tables, from process 0 only."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
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
# Limits of a table: characters per column, columns, rows. The report shows all.
WIDEST, MOST_COLUMNS, MOST_ROWS = 48, 16, 400
PIPE_WIDTH = 120  # characters per line in a file or pipe


class Terminal(Console):
    """Console that raises BrokenPipeError, as plain `print` does, if its reader ends (`vlmprune ... | head`)."""

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError (rich would exit the process with status 1)."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@dataclass(frozen=True)
class Reporter:
    """Printer of lines, bars and tables to `console`, if `enabled`.

    Bars vanish once done; without a terminal a line is printed every minute instead. `prefix` begins every line, to
    tell several processes apart.
    """

    console: Console
    enabled: bool = True
    prefix: str = ""

    def say(self, text: str) -> None:
        """Print one line as plain text: no markup, no wrapping."""
        if self.enabled:
            line = self.prefix + text[: len(text) - len(text.lstrip(" "))] + printable(text)
            self.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a progress bar; yield a function that takes the number of items done."""
        if not self.enabled:
            yield lambda done: None
            return
        if not self.console.is_terminal:
            yield self._minute_lines(what, total)
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

    def _minute_lines(self, what: str, total: int) -> Callable[[int], None]:
        last_time = time.monotonic()

        def update(done: int) -> None:
            nonlocal last_time
            if time.monotonic() - last_time >= PAUSE_SECONDS:
                last_time = time.monotonic()
                self.say(f"  {what}: {done:,} of {total:,}")

        return update

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; the first column is text, the others are right-aligned numbers."""
        if not self.enabled:
            return
        table = Table(title=_cell(title, "table.title"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, name in enumerate(header[:MOST_COLUMNS]):
            justify: Any = "right" if number else "left"
            table.add_column(_cell(name), justify=justify, no_wrap=True, max_width=WIDEST)
        for row in rows[:MOST_ROWS]:
            table.add_row(*map(_cell, row[:MOST_COLUMNS]))
        self.console.print(table)
        if len(rows) > MOST_ROWS or len(header) > MOST_COLUMNS:
            self.say(f"  (shortened from {len(rows):,} rows and {len(header):,} columns)")


def _cell(text: str, style: str = "") -> Text:
    """Return text from any source as a table cell without markup."""
    return Text(printable(text), style)


def make_reporter(enabled: bool) -> Reporter:
    """Return a reporter on standard output."""
    console = Terminal()
    return Reporter(console if console.is_terminal else Terminal(width=PIPE_WIDTH), enabled)


@contextlib.contextmanager
def without_output() -> Iterator[None]:
    """Discard stdout and stderr, including output of native code (Rust panics, C++ logs)."""
    if sys.stdout is not None:
        sys.stdout.flush()
    sink = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    with sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        copies = {}
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # the descriptor is closed
                copies[descriptor] = os.dup(descriptor)
        try:
            for descriptor in copies:
                os.dup2(sink.fileno(), descriptor)
            yield
        finally:
            sink.flush()
            for descriptor, copy in copies.items():
                os.dup2(copy, descriptor)
                os.close(copy)
