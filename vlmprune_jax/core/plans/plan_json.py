"""JSON form of prune plans, as `plan.json` stores it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Count, Finite, checked

FORMAT = 5
TODO = "plan again"
_MANY = msgspec.Meta(max_length=100_000)
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
# Sizes of all layers together: ranges of any length take a few bytes, their indices 36 bytes each (Qwen3.5's 60 layers
# of 512 experts with 1,024 neurons: 31.5 million).
MAX_UNITS = 2**25


class _Version(TypedDict):
    format: int


class PlanJson(_Version):
    """Fields of `plan.json`; axes are named as "text/3/mlp", "text/layers" or "text/vocab"."""

    fingerprint: str
    method: str
    criterion: str
    asked: Finite | None
    reached: NotRequired[Finite]
    parameters_before: Count
    parameters_after: Count
    parameters_total: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    options: dict[str, Any]
    tokenizer: str | None  # digest of the tokenizer of the kept tokens
    sizes_before: Annotated[dict[str, _Size], _MANY]  # every axis of the pruned components
    kept: Annotated[dict[str, str], _MANY]  # ranges of original indices such as "0-3,7"; other axes are kept whole


def as_plan(data: Any, location: str) -> PlanJson:
    """Check a plan's JSON data; raise UserError if it is invalid."""
    written = checked(data, _Version, location, TODO)["format"]
    if written != FORMAT:
        todo = "upgrade vlmprune-jax" if written > FORMAT else "make it again with `vlmprune prune`"
        raise UserError(f"this plan has format {written}, but this version of vlmprune reads {FORMAT}: {todo}")
    plan: PlanJson = msgspec.convert(checked(data, PlanJson, location, TODO), PlanJson)
    if unknown := plan["kept"].keys() - plan["sizes_before"].keys():
        raise UserError(f"prune plan: kept axes {', '.join(sorted(unknown))} are missing in sizes_before: {TODO}")
    units = sum(plan["sizes_before"].values())
    if units > MAX_UNITS:
        raise UserError(
            f"prune plan: its model has {units:,} heads, neurons, experts and tokens, more than the maximum of "
            f"{MAX_UNITS:,}: {TODO}"
        )
    return plan


def to_ranges(indices: Sequence[int]) -> str:
    """Return ascending indices as text: "0-3,7" for 0, 1, 2, 3 and 7."""
    edges = [i for i, (low, high) in enumerate(itertools.pairwise(indices), 1) if high != low + 1]
    bounds = itertools.pairwise([0, *edges, len(indices)])
    ends = [(indices[start], indices[stop - 1]) for start, stop in bounds if stop > start]
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ends)


def from_ranges(text: str, size: int, axis: str) -> tuple[int, ...]:
    """Return the indices below `size` that `to_ranges` wrote; raise UserError for other text."""
    indices, edge = list[int](), -1
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", part, re.ASCII)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not edge < low <= high < size:
            raise UserError(
                f"prune plan: {axis} {part[:40]!r} are not ascending ranges of numbers below {size}: {TODO}"
            )
        indices += range(low, high + 1)
        edge = high
    return tuple(indices)
