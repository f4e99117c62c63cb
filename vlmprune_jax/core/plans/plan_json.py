"""JSON form of prune plans, as `plan.json` stores it."""

from __future__ import annotations

import re
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Count, Finite, checked

FORMAT = 4
WHOLE, VOCAB = "", "vocab"  # key of the vocabulary in place of a layer number, and its axis
TODO = "plan again"
_FEW = msgspec.Meta(max_length=10_001)
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
# Sizes of all kept layers together: ranges of any length take a few bytes, their indices 36 bytes each (Qwen3.5's 60
# layers of 512 experts with 1,024 neurons: 31.5 million).
MAX_UNITS = 2**25


class _Version(TypedDict):
    format: int


class Component(TypedDict):
    """Sizes before pruning and kept units of a component, by layer number ("" for the vocabulary) and axis."""

    sizes_before: Annotated[dict[str, dict[str, _Size]], _FEW]
    kept: Annotated[dict[str, dict[str, str]], _FEW]  # ranges of original indices, such as "0-3,7"


class PlanJson(_Version):
    """Fields of `plan.json`."""

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
    components: dict[str, Component]


def as_plan(data: Any, location: str) -> PlanJson:
    """Check a plan's JSON data; raise UserError if it is invalid."""
    known = checked(data, _Version, location, TODO)["format"]
    if known != FORMAT:
        todo = "upgrade vlmprune-jax" if known > FORMAT else "make it again with `vlmprune prune`"
        raise UserError(f"this plan has format {known}, but this version of vlmprune reads {FORMAT}: {todo}")
    plan: PlanJson = msgspec.convert(checked(data, PlanJson, location, TODO), PlanJson)
    unnamed = [name for name in plan["components"] if not re.fullmatch("[a-z][a-z0-9_]{0,63}", name)]
    if unnamed:
        raise UserError(f"prune plan: {unnamed[0][:64]!r} is no name of a component (text, vision): {TODO}")
    if "text" not in plan["components"]:
        raise UserError(f"prune plan: components are {', '.join(plan['components'])}, expected text among them: {TODO}")
    for name, component in plan["components"].items():
        layers = component["sizes_before"].keys() - {WHOLE}
        if layers != {*map(str, range(len(layers)))} or component["kept"].keys() - component["sizes_before"].keys():
            raise UserError(f"prune plan: layers of the {name} stack are not numbered 0, 1, 2, ...: {TODO}")
    units = sum(map(_units, plan["components"].values()))
    if units > MAX_UNITS:
        raise UserError(
            f"prune plan: the kept layers have {units:,} heads, neurons, experts and tokens, more than the maximum of "
            f"{MAX_UNITS:,}: {TODO}"
        )
    return plan


def _units(component: Component) -> int:
    """Return how many indices the ranges of a component can have: the sizes of its kept layers."""
    before = component["sizes_before"]
    return sum(before[layer].get(axis, 0) for layer, axes in component["kept"].items() for axis in axes)
