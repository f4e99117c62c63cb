"""Hardware-friendly widths: multiples of heads and neurons by the name of a target."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from vlmprune_jax.core.config import LayerShape, Stack
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.prune.config import PlanConfig

# What `o_proj` and `down_proj` read (heads * head_dim, neurons) should be a multiple of: lanes of a TPU's registers;
# blocks of llama.cpp's Q8_0 and Q4_0 and of its K-quants, which lie along a row (a row that does not divide is stored
# in another type); groups of int4 weights that share a scale.
BLOCKS = {"tpu": 128, "gguf": 32, "gguf_k": 256, "int4": 128}


def multiples(config: PlanConfig, stack: Stack, gqa: str) -> dict[str, Any]:
    """Return `heads_multiple` and `neurons_multiple` that give every device whole blocks (`snap_for`,
    `tensor_parallel`); multiples set by the user must themselves be multiples of these.

    A multiple of heads is one of key/value heads with their query heads (gqa="groups"), or of query heads ("q_heads").
    Raises UserError for a multiple that does not suit.
    """
    devices = config.tensor_parallel
    block = 1 if config.snap_for is None else BLOCKS[config.snap_for]
    heads = devices * (block // math.gcd(block, stack.head_dim))  # of query heads
    if gqa == "groups":
        groups = {shape.q_heads // shape.kv_heads for shape in stack.layers}
        heads = math.lcm(devices, *(heads // math.gcd(heads, group) for group in groups))
    found = {}
    for name, needed in (("heads_multiple", heads), ("neurons_multiple", devices * block)):
        own = getattr(config, name)
        if own != 1 and own % needed:
            raise UserError(f"{name}={own} is not a multiple of {needed}, as {reason_of(config)} needs: leave it out")
        found[name] = max(own, needed)
    return found


def reason_of(config: PlanConfig) -> str:
    """Return the settings that require the multiples, for messages."""
    values = {name: getattr(config, name) for name in ("snap_for", "tensor_parallel")}
    return " with ".join(f"{name}={value!r}" for name, value in values.items() if value not in (None, 1))


def check_divides(shapes: Iterable[tuple[int, LayerShape]], devices: int) -> None:
    """Refuse layers, (number, shape), that this many devices cannot share, including layers that are kept whole.

    Raises UserError with the layer and the width that does not divide.
    """
    for index, shape in shapes:
        for what, size in zip(("query heads", "key/value heads", "neurons"), shape.widths, strict=True):
            if size % devices:
                raise UserError(
                    f"layer {index} keeps {size} {what}, which tensor_parallel={devices} does not divide: choose one "
                    "that divides the widths of unpruned layers, or prune them too (attn_layers, mlp_layers, heads)"
                )
