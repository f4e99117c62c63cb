"""Collection of the warnings and logs of libraries during a command, each printed once, in one line, at its end.

Only the command line installs this collection; Python programs that import the package are not affected.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmprune_jax.base.errors import printable, reason

MOST = 20  # maximum number of printed messages; --debug prints all immediately
# Messages that users cannot act on: deprecations in libraries, and warnings about images that were decoded anyway.
_NOISE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning, ImportWarning, BytesWarning)
_SILENT = ("PIL",)
_TOLD = {"orbax"}  # libraries that also raise what they log as an error, or solve it themselves
# vlmprune itself truncates or refuses texts that are too long, and names the record.
_KNOWN = ("Token indices sequence length is longer than",)


class Messages(logging.Handler):
    """Log handler that also collects warnings, text written to standard error, and uncaught exceptions of threads."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: dict[str, None] = {}
        self.dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Store a log record as one line: its message and its exception."""
        if _TOLD & set(Path(record.pathname).parts):
            return
        with contextlib.suppress(Exception):  # a record with arguments that do not fit its format
            error = record.exc_info[1] if record.exc_info else None
            self.add(f"{record.getMessage()}{f' ({reason(error)})' if error is not None else ''}")

    def warned(self, message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
        """Store a Python warning, to be printed when the command ends (replaces `warnings.showwarning`)."""
        library = {category.__module__.split(".")[0], *Path(filename).parts}
        if not issubclass(category, _NOISE) and not library.intersection(_SILENT):
            self.add(str(message))

    def uncaught(self, raised: Any) -> None:
        """Store an exception that a thread or destructor did not catch (replaces Python's hooks for them)."""
        error = raised.exc_value
        self.add(raised.exc_type.__name__ if error is None else f"{raised.exc_type.__name__}: {error}")

    def add(self, text: str) -> None:
        """Store a warning text as one line, unless an equal line is already stored."""
        line = printable(text)
        if not line or line.startswith(_KNOWN) or line in self.lines:
            return
        if len(self.lines) < MOST:
            self.lines[line] = None
        else:
            self.dropped += 1

    def tell(self) -> None:
        """Print the stored warnings to standard error."""
        for line in self.lines:
            print(f"vlmprune: warning: {line}", file=sys.stderr)
        if self.dropped:
            print(f"vlmprune: warning: and {self.dropped:,} more warnings (--debug shows all)", file=sys.stderr)


class _Written(io.TextIOBase):
    """Replacement for standard error that stores complete lines in `Messages`."""

    def __init__(self, messages: Messages, outside: Any):
        self._messages, self._outside, self._begun = messages, outside, ""

    def write(self, text: str) -> int:
        if "\r" in text:  # a progress bar, such as that of a download
            return self._outside.write(text) if self.isatty() else len(text)
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if not line.startswith((" ", "Traceback (most recent call last)")):
                self._messages.add(line)
        return len(text)

    def isatty(self) -> bool:
        return self._outside.isatty()

    def fileno(self) -> int:
        return self._outside.fileno()

    @property
    def encoding(self) -> Any:  # type: ignore[override]
        return self._outside.encoding


@contextlib.contextmanager
def kept() -> Iterator[Messages]:
    """Context that collects warnings, log records and standard error in a `Messages` instead of printing them."""
    messages, root = Messages(), logging.getLogger()
    shown, hooks, handlers = warnings.showwarning, (sys.unraisablehook, threading.excepthook), root.handlers[:]
    try:
        warnings.showwarning = messages.warned  # type: ignore[assignment]
        sys.unraisablehook, threading.excepthook = messages.uncaught, messages.uncaught
        # Handlers of libraries that print hold the original stderr, so they are removed.
        root.handlers = [*(handler for handler in handlers if type(handler) is not logging.StreamHandler), messages]
        with contextlib.redirect_stderr(_Written(messages, sys.stderr)):
            yield messages
    finally:
        warnings.showwarning = shown
        sys.unraisablehook, threading.excepthook = hooks
        root.handlers = handlers


def leave_quietly() -> None:
    """Silence threads and finalizers during the exit of the process."""
    sys.unraisablehook, threading.excepthook = _ignored, _ignored
    logging.disable()  # also the handlers of libraries, which may hold a stream that is closed by then


def _ignored(raised: Any) -> None:
    pass
