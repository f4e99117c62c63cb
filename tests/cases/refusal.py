"""What a user is refused: one line, with the fact that tells what to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vlmprune_jax.base.errors import UserError


def refused(fact: str, call: Callable[..., Any], /, *args: Any, **options: Any) -> str:
    """Return the message of a call that must be refused in one line with this fact (a regular expression)."""
    with pytest.raises(UserError, match=fact) as error:
        call(*args, **options)
    assert str(error.value).isprintable()
    return str(error.value)
