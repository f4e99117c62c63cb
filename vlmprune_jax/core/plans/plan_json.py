"""JSON form of prune plans, as `plan.json` stores it, and that of earlier versions (formats 2 and 3)."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Count, Finite, checked

FORMAT, EARLIER = 4, (2, 3)  # format 2 has no vocabulary; 0.1.0 wrote format 3
WHOLE, VOCAB = "", "vocab"  # key of the vocabulary in place of a layer number, and its axis
TODO = "plan again"
_FEW = msgspec.Meta(max_length=10_001)
_Index = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
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


class _EarlierLayer(TypedDict):
    index: _Index
    q_heads: list[_Index]
    kv_heads: list[_Index]
    neurons: list[_Index]


class _EarlierStack(TypedDict):
    kept_layers: NotRequired[list[_Index]]
    layers_before: Annotated[list[tuple[_Size, _Size, _Size]], _FEW]
    layers: Annotated[list[_EarlierLayer], _FEW]


class _EarlierVocabulary(TypedDict):
    rows_before: _Size
    tokenizer: str
    kept: Annotated[list[tuple[_Index, _Size]], msgspec.Meta(min_length=1, max_length=2**22)]


class _Earlier(TypedDict):
    stacks: dict[str, _EarlierStack]
    vocabulary: NotRequired[_EarlierVocabulary | None]


def as_plan(data: Any, location: str) -> PlanJson:
    """Check a plan's JSON data and convert older formats to the present one; raise UserError if invalid."""
    known = checked(data, _Version, location, TODO)["format"]
    if known in EARLIER:
        data = _upgraded(data, location)
    elif known != FORMAT:
        todo = "upgrade vlmprune-jax" if known > FORMAT else TODO
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


def _upgraded(data: Any, location: str) -> dict[str, Any]:
    """Convert a plan's JSON data from an earlier format (2 or 3) to the present one."""
    plan: _Earlier = msgspec.convert(checked(data, _Earlier, location, TODO), _Earlier)
    components = {name: _component(stack) for name, stack in plan["stacks"].items()}
    vocabulary = plan.get("vocabulary")
    if vocabulary is not None and "text" in components:
        kept = ",".join(f"{start}-{stop - 1}" for start, stop in vocabulary["kept"])
        components["text"]["sizes_before"][WHOLE] = {VOCAB: vocabulary["rows_before"]}
        components["text"]["kept"][WHOLE] = {VOCAB: kept}
    rest = {name: value for name, value in data.items() if name not in ("stacks", "vocabulary")}
    tokenizer = None if vocabulary is None else vocabulary["tokenizer"]
    return {**rest, "format": FORMAT, "tokenizer": tokenizer, "components": components}


def _component(stack: _EarlierStack) -> Component:
    """Convert a pruned component of formats 2 and 3: sizes and kept indices by layer and axis."""
    indices = [layer["index"] for layer in stack["layers"]]
    if stack.get("kept_layers", indices) != indices:
        raise UserError(f"prune plan: kept_layers disagree with layers: {TODO}")
    if any(low >= high for low, high in itertools.pairwise(indices)):
        raise UserError(f"prune plan: kept layers {indices[:64]} are not increasing numbers: {TODO}")
    axes = ("q_heads", "kv_heads", "mlp")
    before = {str(i): dict(zip(axes, sizes, strict=True)) for i, sizes in enumerate(stack["layers_before"])}
    kept = {
        str(layer["index"]): {
            axis: ",".join(map(str, units))
            for axis, units in zip(axes, (layer["q_heads"], layer["kv_heads"], layer["neurons"]), strict=True)
        }
        for layer in stack["layers"]
    }
    return {"sizes_before": before, "kept": kept}
