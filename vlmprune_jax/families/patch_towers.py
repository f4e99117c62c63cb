"""Qwen's vision towers, which take images of any size as patches: configs, and the names of their weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from vlmprune_jax.core.config import LayerShape, ModelConfig, ProjectorConfig, TextConfig, VisionConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.families.table import JsonDict, Weight
from vlmprune_jax.families.towers import first_axes, projector_of, vision_of

EPS = 1e-6  # of all norms in both towers, fixed in their code
# A typical image where none is at hand: so many windows a side.
_TYPICAL_WINDOWS = 4


def square_side(positions: int) -> int:
    """Side of a square table of so many positions.

    Raises:
      UserError: it is none.
    """
    side = math.isqrt(positions)
    if side**2 != positions:
        raise UserError(f"vision tower: num_position_embeddings {positions} is not the square of a whole number")
    return side


def tower_from_hf(config: Mapping[str, Any], **traits: Any) -> VisionConfig:
    """VisionConfig of a vision config dictionary that has every field; `traits` are what it does not say.

    Raises:
      UserError: heads that do not divide the width, or a rotary embedding of another kind.
    """
    hidden, heads = int(config["hidden_size"]), int(config["num_heads"])
    if "head_dim" not in config and hidden % heads:
        raise UserError(f"vision tower: hidden_size {hidden} is not a multiple of its {heads} heads")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise UserError(f"vision tower: rope type {rope['rope_type']!r} is not supported (supported: axial)")
    depth = int(config["depth"])
    shape = LayerShape(heads, heads, int(config["intermediate_size"]))
    return VisionConfig(
        hidden_size=hidden,
        head_dim=int(config.get("head_dim", hidden // heads)),
        n_layers_total=depth,
        patch_size=int(config["patch_size"]),
        channels=int(config["in_channels"]),
        norm_eps=EPS,
        activation=config["hidden_act"],
        temporal=int(config["temporal_patch_size"]),
        merge=int(config["spatial_merge_size"]),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        **{"layers": (shape,) * depth, "class_token": False, "pre_norm": False, **traits},
    )


def window_side(config: Mapping[str, Any]) -> int:
    """Merged cells a side of an attention window.

    Raises:
      UserError: not one.
    """
    names = ("window_size", "spatial_merge_size", "patch_size")
    window, merge, patch = (int(config[name]) for name in names)
    side = window // merge // patch
    if side < 1:
        raise UserError(
            f"vision tower: window_size {window} holds no cell of {merge} x {merge} patches of {patch} pixels "
            f"({', '.join(names)})"
        )
    return side


def windowed_layers(config: Mapping[str, Any], side: int) -> tuple[LayerShape, ...]:
    """One shape per block: those of `fullatt_block_indexes` see a whole image, all others a window of it.

    Raises:
      UserError: an index that is no block.
    """
    depth, whole = int(config["depth"]), set(config["fullatt_block_indexes"])
    if not whole <= set(range(depth)):
        raise UserError(
            f"vision tower: fullatt_block_indexes {sorted(whole)} must be numbers of its blocks, 0 to {depth - 1}"
        )
    heads, mlp = int(config["num_heads"]), int(config["intermediate_size"])
    return tuple(LayerShape(heads, heads, mlp, None if i in whole else side) for i in range(depth))


def typical_size(patch: int, merge: int, cells: int) -> int:
    """Side in pixels of an image of so many merged cells a side."""
    return patch * merge * max(cells, 1)


def typical_windows(patch: int, merge: int, side: int) -> int:
    """Side in pixels of an image of a few windows of `side` cells a side."""
    return typical_size(patch, merge, _TYPICAL_WINDOWS * side)


def check_out_size(config: Mapping[str, Any], text: TextConfig) -> None:
    """Raise UserError where what a tower makes is not as wide as the decoder."""
    if int(config["out_hidden_size"]) != text.hidden_size:
        raise UserError(
            f"vision_config: out_hidden_size {config['out_hidden_size']} is not the decoder's hidden_size "
            f"{text.hidden_size}"
        )


def merger_of(vision: VisionConfig) -> ProjectorConfig:
    """The merger behind a tower; its activation is the exact GELU, whatever the tower's."""
    return ProjectorConfig(
        activation="gelu",
        bias=True,
        kind="merger",
        norm_eps=EPS,
        downsample=vision.merge,
        norm=vision.norm,
        deepstack=len(vision.deepstack),
    )


def tower_to_hf(vision: VisionConfig, source: JsonDict, read: Callable[[Mapping[str, Any]], VisionConfig]) -> JsonDict:
    """`source`, a whole config.json, with every field that depends on the tower's layers rewritten.

    `read` makes a VisionConfig of its vision_config.

    Raises:
      UserError: layers of unequal width, which no class loads.
    """
    old = source.get("vision_config") or {}
    if read(old).layers == vision.layers:
        return source
    if not vision.even:
        raise UserError(
            "the layers of the vision tower have unequal widths, which no class loads: prune all of them alike, or "
            'export with uneven="pad" (same function, no savings)'
        )
    shape = vision.layers[0]
    new = {**old, "depth": len(vision.layers), "num_heads": shape.q_heads, "intermediate_size": shape.mlp}
    if any(one.window for one in vision.layers):
        new["fullatt_block_indexes"] = [i for i, one in enumerate(vision.layers) if one.window is None]
    if "head_dim" in old or not vision.whole_heads:
        new["head_dim"] = vision.head_dim
    return {**source, "vision_config": new}


_BLOCK = {
    "layer_norm1": ("norm1", "vision"),
    "self_attn/q_proj": ("attn.qkv", "(q_heads head) vision"),
    "self_attn/k_proj": ("attn.qkv", "(kv_heads head) vision"),
    "self_attn/v_proj": ("attn.qkv", "(kv_heads head) vision"),
    "self_attn/out_proj": ("attn.proj", "vision (q_heads head)"),
    "layer_norm2": ("norm2", "vision"),
}
_MLP = {
    "plain": {"mlp/fc1": ("mlp.linear_fc1", "mlp vision"), "mlp/fc2": ("mlp.linear_fc2", "vision mlp")},
    "gated": {
        "mlp/gate_proj": ("mlp.gate_proj", "mlp vision"),
        "mlp/up_proj": ("mlp.up_proj", "mlp vision"),
        "mlp/down_proj": ("mlp.down_proj", "vision mlp"),
    },
}


def tower_weights(cfg: ModelConfig, prefix: str, merger: tuple[str, str, str]) -> list[Weight]:
    """Weight lines of tower and mergers under key `prefix`; `merger`: names of the norm and layers of the last."""
    vision, projector = vision_of(cfg), projector_of(cfg)
    without_bias = {f"vision/layers/{{i}}/layer_norm{n}" for n in (1, 2)} | {"projector/patch_norm"}
    without_bias = without_bias if vision.norm == "rms" else set()
    without_bias |= {"vision/position_embedding", *(() if vision.patch_bias else ("vision/patch_embedding",))}
    lines = {"vision/patch_embedding": ("patch_embed.proj", "vision channel temporal patch_row patch_column")}
    if vision.table:
        lines["vision/position_embedding"] = ("pos_embed", "position vision")
    for path, (key, layout) in {**_BLOCK, **_MLP[vision.mlp_kind]}.items():
        lines[f"vision/layers/{{i}}/{path}"] = (f"blocks.{{i}}.{key}", layout)
    layers = {"linear_1": "projector shuffled", "linear_2": "embed projector"}
    for path, key, layout in zip(("patch_norm", *layers), merger, ("vision", *layers.values()), strict=True):
        lines[f"projector/{path}"] = (f"merger.{key}", layout)
    for j in range(projector.deepstack):
        deep, here = f"projector/deepstack/{j}", f"deepstack_merger_list.{j}"
        lines[f"{deep}/layer_norm"] = (f"{here}.norm", "shuffled")
        lines |= {f"{deep}/linear_{n}": (f"{here}.linear_fc{n}", layers[f"linear_{n}"]) for n in (1, 2)}
    table = []
    for path, (key, layout) in lines.items():
        table.append(Weight(f"{path}/weight", f"{prefix}{key}.weight", layout))
        if path not in without_bias:
            table.append(Weight(f"{path}/bias", f"{prefix}{key}.bias", first_axes(layout)))
    return table


def with_sections(text: TextConfig, default: tuple[int, ...], interleaved: bool) -> TextConfig:
    """A decoder whose images have rows and columns; `default`: the class's own `mrope_section`."""
    sections = text.rope.sections or default
    return dataclasses.replace(text, rope=dataclasses.replace(text.rope, sections=sections, interleaved=interleaved))


def outer_tokens(config: Mapping[str, Any], text: Mapping[str, Any]) -> JsonDict:
    """A decoder's config with the ids of tokens that stand beside it, where it does not say them."""
    ids = {name: value for name, value in config.items() if name.endswith("token_id") and value is not None}
    return {**text, **ids}
