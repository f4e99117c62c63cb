"""Layers of small models, and stacks with unusual facts: what tests build configs from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import TextConfig, VisionConfig
from vlmprune_jax.core.layer import BlockConfig, Layer
from vlmprune_jax.core.mixers import Attention, RopeConfig

ROPE = RopeConfig(theta=700.0, kind="linear", factor=1.5)
_BIASES = {"bias": True, "out_bias": True}
_BLOCK = {field.name for field in dataclasses.fields(BlockConfig)}
# names of facts in `text_config`, by their part and field
_ATTENTION = {"qkv_bias": "bias"} | {
    n: n for n in ("out_bias", "head_dim", "rope", "qk_norm", "v_norm", "scale", "sees_images")
}
_DENSE = {"mlp_bias": "bias", "activation": "activation", "gated": "gated"}


def decoder_layer(
    q_heads: int, kv_heads: int, mlp: int, window: int | None = None, source: int | None = None, head_dim: int = 6
) -> Layer:
    """A layer of the decoder of `text_config`."""
    attention = Attention(q_heads, kv_heads, window, source, head_dim=head_dim, rope=ROPE, **_BIASES)
    return Layer(attention, Dense(mlp, activation="gelu_new", bias=True))


def tower_layer(q_heads: int, kv_heads: int, mlp: int, window: int | None = None, head_dim: int = 4) -> Layer:
    """A layer of the tower of `tower_config`."""
    attention = Attention(q_heads, kv_heads, window, head_dim=head_dim, **_BIASES)
    return Layer(attention, Dense(mlp, activation="gelu", gated=False, bias=True))


def changed(layer: Layer, changes: dict[str, Any]) -> Layer:
    """The layer with other facts, by the names of `text_config`."""
    attention = {field: changes[name] for name, field in _ATTENTION.items() if name in changes}
    dense = {field: changes[name] for name, field in _DENSE.items() if name in changes}
    return Layer(dataclasses.replace(layer.mixer, **attention), dataclasses.replace(layer.channel, **dense))


def with_facts(stack: Any, **changes: Any) -> Any:
    """A stack with other facts of its layers' parts, and fields of its own."""
    of_parts = {name: value for name, value in changes.items() if name in {*_ATTENTION, *_DENSE}}
    layers = tuple(changed(layer, of_parts) for layer in stack.layers)
    of_block = {name: value for name, value in changes.items() if name in _BLOCK}
    rest = {name: value for name, value in changes.items() if name not in of_parts | of_block}
    return dataclasses.replace(stack, layers=layers, block=dataclasses.replace(stack.block, **of_block), **rest)


def text_config(layers: Sequence[Layer], **changes: Any) -> TextConfig:
    """A decoder whose every hyper-parameter is unusual; `changes` are facts of the stack, its blocks or their parts."""
    of_parts = {name: value for name, value in changes.items() if name in {*_ATTENTION, *_DENSE}}
    of_block = {name: value for name, value in changes.items() if name in _BLOCK}
    values = {
        "hidden_size": 20,
        "vocab_size": 62,
        "tie_embeddings": False,
        "max_positions": 50,
        "decoder": "llama",
        **{name: value for name, value in changes.items() if name not in of_parts | of_block},
    }
    layers = tuple(changed(layer, of_parts) for layer in layers)
    return TextConfig(layers=layers, block=BlockConfig(**{"norm_eps": 3e-4, **of_block}), **values)


def tower_config(layers: Sequence[Layer]) -> VisionConfig:
    """A CLIP of four patches without its last layer."""
    block = BlockConfig(norm_eps=2e-4, norm="layer")
    return VisionConfig(8, tuple(layers), block, len(layers) + 1, 6, 3, 3, kind="clip")
