"""Exceptions whose message is one line for the user: where, what is wrong, what to do."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

_MAX_WORD, _WORD_ENDS = 400, 60  # characters; names in files may have any length
_MAX_LINE = 2000


def printable(text: str) -> str:
    """Return a text as one line that is safe to print: control characters escaped.

    Control and text-direction characters are escaped, so that the text cannot move the cursor or change colours. Very
    long words and lines are shortened in the middle. The function is idempotent.
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return _cut_middle(re.sub(rf"\S{{{_MAX_WORD + 1},}}", lambda word: _cut_middle(word[0], _MAX_WORD), line))


def _cut_middle(text: str, limit: int = _MAX_LINE) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit - 2 * _WORD_ENDS]}[... {len(text):,} characters ...]{text[-_WORD_ENDS:]}"


def reason(error: BaseException) -> str:
    """Return a library exception's message, shortened to 200 characters; its type name if the message is empty."""
    text = printable(str(error))
    return (text if len(text) <= 200 else f"{text[:197]}...") or type(error).__name__


class UserError(Exception):
    """Wrong input, configuration or files; the command line prints only the message and exits with code 2.

    The message is made `printable`, because it may quote names of files and tensors from untrusted sources.
    """

    def __init__(self, message: object):
        super().__init__(printable(str(message)))


@contextlib.contextmanager
def error_context(what: object) -> Iterator[None]:
    """Prefix the message of any UserError with the file or record that is being processed."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


class Stopped(UserError):
    """Raised after SIGTERM or SIGINT (`signal`) once work is saved; running the same command again continues."""

    def __init__(self, message: object, signal: str = "SIGTERM"):
        super().__init__(message)
        self.signal = signal


class SharedError(UserError):
    """Error that every process of a distributed run raises at once, so that no process needs to notify the others."""


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return texts `FIELD was OLD, now NEW` for all fields with different values in two JSON objects."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for key in sorted({*before, *now}):
            lines += differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return lines
    return [] if before == now else [f"{name} was {_short_json(before)}, now {_short_json(now)}"]


def _short_json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
