"""Qwen-VL's vision towers, which take images of any size as patches: configs and names of their weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import ModelConfig, PatchConfig, TextConfig, VisionConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.mixers import Attention
from vlmprune_jax.core.projector import ProjectorConfig
from vlmprune_jax.core.rope import RopeConfig
from vlmprune_jax.core.stack import BlockConfig
from vlmprune_jax.io.families.llava import RECIPE
from vlmprune_jax.io.families.shapes import vlm_token_ids
from vlmprune_jax.io.families.table import Decoder, Family, JsonDict, Stock, Weight
from vlmprune_jax.io.families.towers import equal_shape, first_axes, projector_of, vision_of

EPS = 1e-6  # of all norms in both towers, fixed in their code


def square_side(positions: int) -> int:
    """Return the side length of a square position embedding table.

    Raises UserError if the number of positions is not a square.
    """
    side = math.isqrt(positions)
    if side**2 != positions:
        raise UserError(f"vision tower: num_position_embeddings {positions} is not the square of an integer")
    return side


def tower_from_hf(
    config: Mapping[str, Any],
    *,
    windows: Sequence[int | None] = (),
    norm: str = "layer",
    gated: bool = False,
    patch_bias: bool = False,
    **traits: Any,
) -> VisionConfig:
    """Return the VisionConfig of a vision config dictionary.

    `windows` has the side of each layer's attention windows (empty: full attention); `norm`, `gated` and
    `patch_bias` are fields of BlockConfig, Dense and PatchConfig, and `traits` of VisionConfig.

    Raises UserError if the heads do not divide the width, or the type of rotary embedding is not supported.
    """
    hidden, heads = int(config["hidden_size"]), int(config["num_heads"])
    if "head_dim" not in config and hidden % heads:
        raise UserError(f"vision tower: hidden_size {hidden} is not a multiple of its {heads} heads")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise UserError(f"vision tower: rope type {rope['rope_type']!r} is not supported (supported: axial)")
    depth = int(config["depth"])
    attention = Attention(
        heads,
        heads,
        head_dim=int(config.get("head_dim", hidden // heads)),
        rope=RopeConfig(float(rope.get("rope_theta", 10000.0)), "axial"),
        bias=True,
        out_bias=True,
    )
    channel = Dense(int(config["intermediate_size"]), activation=config["hidden_act"], gated=gated, bias=True)
    return VisionConfig(
        hidden_size=hidden,
        layers=tuple(
            Layer(dataclasses.replace(attention, window=window), channel) for window in windows or [None] * depth
        ),
        block=BlockConfig(norm_eps=EPS, norm=norm),
        n_layers_total=depth,
        patch_size=int(config["patch_size"]),
        channels=int(config["in_channels"]),
        patches=PatchConfig(patch_bias, int(config["temporal_patch_size"])),
        merge=int(config["spatial_merge_size"]),
        **{"class_token": False, "pre_norm": False, **traits},
    )


def window_side(config: Mapping[str, Any]) -> int:
    """Return the side length of an attention window, in merged patches (tokens).

    Raises UserError if a window is smaller than one cell.
    """
    window, merge, patch = (int(config[name]) for name in ("window_size", "spatial_merge_size", "patch_size"))
    side = window // merge // patch
    if side < 1:
        raise UserError(
            f"vision tower: window_size {window} must be at least spatial_merge_size x patch_size ({merge} x {patch})"
        )
    return side


def windows_of_blocks(config: Mapping[str, Any], side: int) -> list[int | None]:
    """Return every block's window: none (full attention) in `fullatt_block_indexes`, windows of `side` elsewhere.

    Raises UserError if an index is not a block number.
    """
    depth, whole = int(config["depth"]), set(config["fullatt_block_indexes"])
    if not whole <= set(range(depth)):
        raise UserError(
            f"vision tower: fullatt_block_indexes {sorted(whole)} must be layer numbers from 0 to {depth - 1}"
        )
    return [None if i in whole else side for i in range(depth)]


def typical_size(config: Mapping[str, Any], cells: int) -> int:
    """Return the side length in pixels of a square image with `cells` merged patches per side."""
    return int(config["patch_size"]) * int(config["spatial_merge_size"]) * max(cells, 1)


def check_out_size(config: Mapping[str, Any], text: TextConfig) -> None:
    """Raise UserError unless the vision tower's output width equals the decoder's hidden size."""
    if int(config["out_hidden_size"]) != text.hidden_size:
        raise UserError(
            f"vision_config: out_hidden_size {config['out_hidden_size']} must be the decoder's hidden_size "
            f"({text.hidden_size})"
        )


def merger_of(vision: VisionConfig) -> ProjectorConfig:
    """Return the ProjectorConfig of a vision tower's patch merger."""
    return ProjectorConfig(
        activation="gelu",
        bias=True,
        kind="merger",
        norm_eps=EPS,
        downsample=vision.merge,
        norm=vision.block.norm,
        deepstack=len(vision.deepstack),
    )


def tower_to_hf(vision: VisionConfig, source: JsonDict, read: Callable[[Mapping[str, Any]], VisionConfig]) -> JsonDict:
    """Return config.json with the fields updated that depend on the vision tower's layers.

    `read` returns the VisionConfig of a vision_config.

    Raises UserError if the layers have unequal widths, which no class loads.
    """
    old = source.get("vision_config") or {}
    if read(old).layers == vision.layers:
        return source
    shape = equal_shape(vision)
    new = {
        **old,
        "depth": len(vision.layers),
        "num_heads": shape.mixer.q_heads,
        "intermediate_size": shape.sizes["mlp"],
    }
    if any(layer.mixer.window for layer in vision.layers):
        new["fullatt_block_indexes"] = [i for i, layer in enumerate(vision.layers) if layer.mixer.window is None]
    if "head_dim" in old or not vision.whole_heads:
        new["head_dim"] = vision.attention.head_dim
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
    """Return the weight table of vision tower and patch mergers; `merger` names the layers of the last merger."""
    vision, projector = vision_of(cfg), projector_of(cfg)
    without_bias = {f"vision/layers/{{i}}/layer_norm{n}" for n in (1, 2)} | {"projector/patch_norm"}
    without_bias = without_bias if vision.block.norm == "rms" else set()
    without_bias |= {"vision/position_embedding", *(() if vision.patches.bias else ("vision/patch_embedding",))}
    lines = {"vision/patch_embedding": ("patch_embed.proj", "vision channel temporal patch_row patch_column")}
    if vision.positions is not None:
        lines["vision/position_embedding"] = ("pos_embed", "position vision")
    for path, (key, layout) in {**_BLOCK, **_MLP["gated" if vision.channel.gated else "plain"]}.items():
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
    """Return the decoder config with M-RoPE; `default` is used if `mrope_section` is absent."""
    sections = text.rope.sections or default
    rope = dataclasses.replace(text.rope, sections=sections, interleaved=interleaved)
    return text.with_layers([Layer(dataclasses.replace(x.mixer, rope=rope), x.channel) for x in text.layers])


def model_from_hf(
    family: str, config: Mapping[str, Any], text: TextConfig, vision: VisionConfig, tokens_per_second: float = 0.0
) -> ModelConfig:
    """Return the ModelConfig of a Qwen-VL model, decoder and vision tower, from its config.json."""
    return ModelConfig(
        family=family,
        layout="transformers",
        text=text,
        vision=vision,
        projector=merger_of(vision),
        image_token_id=int(config.get("image_token_id", 151655)),
        video_token_id=int(config.get("video_token_id", 151656)),
        tokens_per_second=tokens_per_second,
        feature_select="full",
        **vlm_token_ids(config, config.get("text_config") or {}),
    )


def patch_family(name: str, decoder: Decoder, **fields: Any) -> Family:
    """Return a Qwen-VL family loaded by transformers' `decoder.stock_class`; `fields`: further fields of `Family`."""
    return Family(
        name=name,
        layout="transformers",
        model_types=(name,),
        text_section="text_config",
        ignored=(r".*\.rotary_(pos_)?emb\.inv_freq", r"lm_head\.weight", r"mtp\..*"),
        image_processors=("Qwen2VL",),
        images="patches",
        recipe={**RECIPE, "data": {"max_length": 4096, "max_image_tokens": 1280}},
        decoder=decoder,
        stock=Stock(decoder.stock_class, "AutoModelForImageTextToText", image_start=("vision_start_token_id", 151652)),
        **fields,
    )
