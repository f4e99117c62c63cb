"""Exceptions whose message is one line for the user: what happened, where, and what to do."""

from __future__ import annotations

import json
from typing import Any


class UserError(Exception):
    """Wrong input, configuration or files; the command line prints the message alone and exits with code 2."""


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
