"""The base of every JSON file of a workdir that is written and read back: one Struct for the writer and all readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec

from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.base.files import MAX_JSON_BYTES, read_json, replacing
from vlmprune_jax.base.processes import is_main_process


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Object inside a JSON file of a workdir; fields at their defaults are not written."""


class Artefact(Part, frozen=True, kw_only=True, omit_defaults=True, tag_field="format", tag=0):
    """JSON file of a workdir; its format number is declared as in `class Result(Artefact, tag=1)`.

    Raise the number whenever an old file would be misread. `HINT` says how to make the file again.
    """

    HINT: ClassVar[str] = "run the same command again"
    MAX_BYTES: ClassVar[int] = MAX_JSON_BYTES
    COMPACT: ClassVar[bool] = False  # one line for each field: files with thousands of numbers

    def problems(self, folder: Path) -> str | None:
        """Return an error message if the content is inconsistent although all types are right; None otherwise."""
        del folder
        return None


_A = TypeVar("_A", bound=Artefact)


def read_artefact(path: Path, kind: type[_A], missing: str = "no such file") -> _A:
    """Read a JSON file of a workdir; fields unknown to `kind` are ignored.

    Args:
      path: the file.
      kind: class of the file's content.
      missing: message if there is no such file.

    Raises UserError if the file is missing, too large, damaged, of another format number, or not of this class.
    """
    value = read_json(path, missing=missing, todo=kind.HINT, most=kind.MAX_BYTES, unicode=False)
    ours, version = kind.__struct_config__.tag, value.get("format")
    if version != ours or isinstance(version, bool):
        if isinstance(version, int) and isinstance(ours, int) and version > ours:
            message = f"written by a newer vlmprune (format {version}, this version reads {ours}): upgrade vlmprune-jax"
        else:
            message = f"has no format that this version reads (format {ours}): {kind.HINT}"
        raise UserError(f"{path}: {message}")
    try:
        read = msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError, UnicodeEncodeError, OverflowError) as error:
        raise UserError(f"{path}: does not have the expected content ({reason(error)}): {kind.HINT}") from None
    problem = read.problems(path.parent)
    if problem is not None:
        raise UserError(f"{path}: {problem}: {kind.HINT}")
    return read


def find_artefact(path: Path, kind: type[_A]) -> _A | None:
    """Read a JSON file of a workdir; return None if it does not exist."""
    return read_artefact(path, kind) if path.is_file() else None


def to_json(value: Any) -> Any:
    """Convert a struct to JSON values, and NumPy numbers to Python numbers."""
    return msgspec.to_builtins(value, enc_hook=lambda scalar: scalar.item())


def write_artefact(path: Path, value: Artefact) -> None:
    """Write a JSON file of a workdir atomically (process 0 only)."""
    plain = to_json(value)
    if value.COMPACT:
        text = (
            "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(field)}" for name, field in plain.items()) + "\n}\n"
        )
    else:
        text = json.dumps(plain, indent=2) + "\n"
    if is_main_process():
        with replacing(path) as file:
            file.write(text.encode())
