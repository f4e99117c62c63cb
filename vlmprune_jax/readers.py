"""Files that anybody may have written, checked as they are read: what is wrong with one is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmprune_jax.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder.

    Raises:
      UserError: the file is missing, is not JSON in UTF-8, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing (is {path.parent} a Hugging Face model folder?)") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}): restore it from the model's source") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(f"{path}: holds a JSON {kind}, expected an object: restore it from the model's source")
    return value
