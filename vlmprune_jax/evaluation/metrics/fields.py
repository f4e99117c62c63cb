"""Fields of records that metrics read; errors name the record and the field."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.datasets import parse_choices
from vlmprune_jax.data.records import Record

_LETTERS = string.ascii_uppercase


def field(record: Record, name: str) -> Any:
    """Return a field of a record.

    Raises:
      UserError: the field is missing.
    """
    value = record.fields.get(name)
    if value is None:
        raise UserError(
            f"record {record.id}: no field {name!r}, which the metric needs: add it, or choose another metric"
        )
    return value


def name_field(record: Record, name: str) -> str:
    """Return a field that holds a name or a whole number, as text.

    Raises:
      UserError: the field is missing or holds something else.
    """
    value = field(record, name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(f"record {record.id}: field {name!r} must be a text or a whole number, got {value!r}")
    return str(value)


def choices_field(record: Record, name: str) -> list[str]:
    """Return a field with up to 26 choices, given as a list or as the text of a list (MMMU).

    Raises:
      UserError: the field is missing or holds something else.
    """
    value = parse_choices(field(record, name))
    if value is None or not 0 < len(value) <= len(_LETTERS):
        raise UserError(
            f"record {record.id}: field {name!r} must list 1 to {len(_LETTERS)} texts, got {record.fields[name]!r}"
        )
    return value


def letters(choices: Sequence[str]) -> str:
    """Return one capital letter per choice, "ABC..."."""
    return _LETTERS[: len(choices)]


def right_letters(record: Record, name: str) -> set[str]:
    """Return the references as letters of the choices in the field `name`.

    Raises:
      UserError: a reference is not one of the letters.
    """
    known = letters(choices_field(record, name))
    right = {reference.strip().upper() for reference in record.references}
    odd = sorted(letter for letter in right if len(letter) != 1 or letter not in known)
    if odd:
        raise UserError(
            f"record {record.id}: answer {odd[0]!r} must be a letter of its {len(known)} {name} (A to {known[-1]})"
        )
    return right


def right_yes_or_no(record: Record) -> bool:
    """Return True if the reference is yes; case and full stops are ignored.

    Raises:
      UserError: the reference is neither yes nor no.
    """
    right = record.references[0].lower().strip().replace(".", "")
    if right not in ("yes", "no"):
        raise UserError(f"record {record.id}: answer {record.references[0]!r} must be yes or no for this metric")
    return right == "yes"
