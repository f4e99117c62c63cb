"""What metrics read of a record beside its references; what is missing is one line that names record and field."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.datasets import parse_choices
from vlmprune_jax.data.records import Record

_LETTERS = string.ascii_uppercase


def field(record: Record, name: str) -> Any:
    """The field of a record.

    Raises:
      UserError: there is none.
    """
    value = record.fields.get(name)
    if value is None:
        raise UserError(f"record {record.id}: has no field {name!r}, which the metric needs; add it, or use another")
    return value


def name_field(record: Record, name: str) -> str:
    """A field that is a name or a number, as text.

    Raises:
      UserError: there is none, or it is something else.
    """
    value = field(record, name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(f"record {record.id}: field {name!r} must be a text or a whole number, got {value!r}")
    return str(value)


def choices_field(record: Record, name: str) -> list[str]:
    """A field that lists up to 26 choices, as a list or, as MMMU has it, as the text of one.

    Raises:
      UserError: there is none, or it is something else.
    """
    value = parse_choices(field(record, name))
    if value is None or not 0 < len(value) <= len(_LETTERS):
        raise UserError(
            f"record {record.id}: field {name!r} must list 1 to {len(_LETTERS)} texts, got {record.fields[name]!r}"
        )
    return value


def letters(choices: Sequence[str]) -> str:
    """`ABC...`, one for each choice."""
    return _LETTERS[: len(choices)]


def right_letters(record: Record, name: str) -> set[str]:
    """The references as letters of the choices in the field `name`.

    Raises:
      UserError: one is none of them.
    """
    known = letters(choices_field(record, name))
    right = {reference.strip().upper() for reference in record.references}
    odd = sorted(one for one in right if len(one) != 1 or one not in known)
    if odd:
        raise UserError(
            f"record {record.id}: its answer {odd[0]!r} is no letter of its {len(known)} {name} (A to {known[-1]}); "
            "write the letter"
        )
    return right


def right_yes_or_no(record: Record) -> bool:
    """Whether the reference is yes; case and full stops do not count.

    Raises:
      UserError: it is neither yes nor no.
    """
    right = record.references[0].lower().strip().replace(".", "")
    if right not in ("yes", "no"):
        raise UserError(f"record {record.id}: its answer {record.references[0]!r} must be yes or no for this metric")
    return right == "yes"
