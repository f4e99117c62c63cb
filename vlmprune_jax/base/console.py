"""Console output while stages run: lines, progress bars and tables, from process 0 only."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vlmprune_jax.base.errors import printable

PAUSE_SECONDS = 60.0
# Limits of a table: characters of a column and of folded names, columns, rows. The report shows all.
WIDEST, NARROWEST, MOST_COLUMNS, MOST_ROWS = 48, 20, 16, 400
PIPE_WIDTH = 120  # characters per line in a file or pipe, unless COLUMNS says otherwise


class Terminal(Console):
    """Console that raises BrokenPipeError, as `print` does, if the program reading its output has ended."""

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError (rich would exit the process with status 1)."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@dataclass(frozen=True)
class Reporter:
    """Printer of lines, progress bars and tables to `console`; prints nothing if `enabled` is False.

    Bars vanish once done; without a terminal, progress is printed as a line every minute instead. `prefix` begins every
    line, to distinguish the processes of a run.
    """

    console: Console
    enabled: bool = True
    prefix: str = ""

    def say(self, text: str) -> None:
        """Print a text as one line, without markup or wrapping."""
        if self.enabled:
            line = self.prefix + text[: len(text) - len(text.lstrip(" "))] + printable(text)
            self.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int, first: int = 0) -> Iterator[Callable[..., None]]:
        """Show a progress bar; yield a function of the number of finished items, at first `first`, and of a remark."""
        if not self.enabled:
            yield lambda done, remark="": None
            return
        if not (self.console.is_terminal or self.console.is_jupyter):
            yield self._minute_lines(what, total)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[remark]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, refresh_per_second=4) as progress:
            task = progress.add_task(printable(what), total=total, completed=first, remark="")
            yield lambda done, remark="": progress.update(task, completed=done, remark=remark)

    def _minute_lines(self, what: str, total: int) -> Callable[..., None]:
        last_time = time.monotonic()

        def update(done: int, remark: str = "") -> None:
            nonlocal last_time
            if time.monotonic() - last_time >= PAUSE_SECONDS:
                last_time = time.monotonic()
                self.say(f"  {what}: {done:,} of {total:,}  {remark}".rstrip())

        return update

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; the first column is text, the others are right-aligned numbers.

        Put important columns first: if the terminal is too narrow, the last columns are left out. Names wrap over
        several lines; numbers are never truncated.
        """
        if not self.enabled:
            return
        cells = [[_cell(text) for text in row[:MOST_COLUMNS]] for row in rows[:MOST_ROWS]]
        heads = [_cell(name) for name in header[:MOST_COLUMNS]]
        columns = [(head, [row[place] for row in cells]) for place, head in enumerate(heads)]
        widths = _fit_widths(columns, self.console.width)
        count = len(widths)
        table = Table(title=_cell(title, "table.title"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, (head, width) in enumerate(zip(heads, widths, strict=False)):
            justify: Any = "right" if number else "left"
            table.add_column(head, justify=justify, width=width, overflow="fold")
        for row in cells:
            table.add_row(*row[:count])
        self.console.print(table)
        if len(rows) > MOST_ROWS or len(header) > MOST_COLUMNS:
            self.say(f"  (shortened from {len(rows):,} rows and {len(header):,} columns)")
        elif count < len(heads):
            self.say(f"  (no room for: {'; '.join(head.plain for head in heads[count:])})")


def _fit_widths(columns: Sequence[tuple[Text, Sequence[Text]]], room: int) -> list[int]:
    """Return column widths that fit the terminal: headers wrap first, then names; then columns are dropped."""
    cells = [max([1, *(cell.cell_len for cell in column)]) for _, column in columns]
    widest = [min(WIDEST, max(head.cell_len, width)) for (head, _), width in zip(columns, cells, strict=True)]
    if sum(widest) + 2 * len(widest) < room:
        return widest
    words = [max(map(cell_len, head.plain.split()), default=1) for head, _ in columns]
    widths = [min(WIDEST, max(pair)) for pair in zip(words, cells, strict=True)]
    names = min(widths[0], NARROWEST)
    count = max((n for n in range(2, len(widths) + 1) if names + sum(widths[1:n]) + 2 * n < room), default=1)
    return [min(widest[0], room - sum(widths[1:count]) - 2 * count - 1), *widths[1:count]]


def _cell(text: str, style: str = "") -> Text:
    """Return any text as a table cell without markup, at most two lines long."""
    line = Text(printable(text), style)
    line.truncate(2 * WIDEST, overflow="ellipsis")
    return line


def make_reporter(enabled: bool) -> Reporter:
    """Return a `Reporter` that prints to standard output."""
    console = Terminal()
    wide = console.is_terminal or "COLUMNS" in os.environ  # rich reads it
    return Reporter(console if wide else Terminal(width=PIPE_WIDTH), enabled)


def wrap_lines(lines: Sequence[str]) -> list[str]:
    """Return lines wrapped to the terminal with a hanging indent; unchanged without a terminal and COLUMNS."""
    console = Terminal()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        return [*lines]
    options: Any = {"width": console.width, "break_long_words": False, "break_on_hyphens": False}
    indents = [" " * (len(line) - len(line.lstrip())) for line in lines]
    filled = [
        textwrap.wrap(line, subsequent_indent=f"{indent}  ", **options) or [""]
        for line, indent in zip(lines, indents, strict=True)
    ]
    return [*itertools.chain.from_iterable(filled)]


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
