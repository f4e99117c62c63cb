"""Exceptions whose message is one line for the user: what happened, where, and what to do."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

_LONGEST_WORD, _WORD_ENDS = 400, 60  # of a text without a space: names in files may have any length
_LONGEST = 2000


def printable(text: str) -> str:
    """A text of anybody's as one line for a terminal: nothing in it moves the cursor, changes colours or fills screens.

    Control characters, and those that turn the direction of writing, are spelled out; very long names and lines are cut
    in the middle. Doing it twice is doing it once.
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return _middle_out(re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: _middle_out(word[0], _LONGEST_WORD), line))


def _middle_out(text: str, longest: int = _LONGEST) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest - 2 * _WORD_ENDS]}[... {len(text):,} characters ...]{text[-_WORD_ENDS:]}"


def reason(error: BaseException) -> str:
    """What an exception of a library says, short enough to be quoted in a line; its type where it says nothing."""
    text = printable(str(error))
    return (text if len(text) <= 200 else f"{text[:197]}...") or type(error).__name__


class UserError(Exception):
    """Wrong input, configuration or files; the command line prints the message alone and exits with code 2.

    The message is `printable` whatever names of files and tensors are quoted in it.
    """

    def __init__(self, message: object):
        super().__init__(printable(str(message)))


@contextlib.contextmanager
def error_context(what: object) -> Iterator[None]:
    """Name what a UserError is about, where code that raises it does not know the file.

    Raises:
      UserError: the same, `what` before it.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


class Stopped(UserError):
    """Work ended on SIGTERM where it could; the same call continues it."""


class SharedError(UserError):
    """Raised on every process of a run at once: none has to tell the others."""


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """`field was a, now b` for every leaf in which two JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*before, *now}):
            found += differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if before == now else [f"{name} was {_short(before)}, now {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
