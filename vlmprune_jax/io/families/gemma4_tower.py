"""Vision tower of Gemma 4: images of any aspect, rotary positions by row and column, clipped linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import ModelConfig, PatchConfig, PositionTable, VisionConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.mixers import Attention
from vlmprune_jax.core.rope import RopeConfig
from vlmprune_jax.core.stack import BlockConfig
from vlmprune_jax.io.families.table import JsonDict, Weight
from vlmprune_jax.io.families.towers import projector_of, vision_of

# Defaults of the config class in transformers.
_VISION: JsonDict = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "pooling_kernel_size": 3,
    "patch_size": 16,
    "position_embedding_size": 10240,
    "use_clipped_linears": False,
    "standardize": False,
}
_TYPICAL = 16  # tokens per side of a typical image: the default budget is 280 tokens


_TOWER = {
    "layer_norm1": ("input_layernorm", "vision"),
    "attention_output_norm": ("post_attention_layernorm", "vision"),
    "layer_norm2": ("pre_feedforward_layernorm", "vision"),
    "mlp_output_norm": ("post_feedforward_layernorm", "vision"),
    "self_attn/q_norm": ("self_attn.q_norm", "head"),
    "self_attn/k_norm": ("self_attn.k_norm", "head"),
}
_CLIPPED = {
    "self_attn/q_proj": ("self_attn.q_proj", "(q_heads head) vision"),
    "self_attn/k_proj": ("self_attn.k_proj", "(kv_heads head) vision"),
    "self_attn/v_proj": ("self_attn.v_proj", "(kv_heads head) vision"),
    "self_attn/out_proj": ("self_attn.o_proj", "vision (q_heads head)"),
    "mlp/gate_proj": ("mlp.gate_proj", "mlp vision"),
    "mlp/up_proj": ("mlp.up_proj", "mlp vision"),
    "mlp/down_proj": ("mlp.down_proj", "vision mlp"),
}
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def tower_weights(cfg: ModelConfig) -> list[Weight]:
    """Return the weight table of Gemma 4's vision tower and projector."""
    vision, prefix = vision_of(cfg), "model.vision_tower."
    layer, key = "vision/layers/{i}", prefix + "encoder.layers.{i}"
    embedder = prefix + "patch_embedder."
    table = [
        Weight(
            "vision/patch_embedding/weight",
            f"{embedder}input_proj.weight",
            "vision (patch_row patch_column channel)",
        ),
        Weight("vision/position_embedding/weight", f"{embedder}position_embedding_table", "axis position vision"),
    ]
    for path, (name, layout) in _TOWER.items():
        table.append(Weight(f"{layer}/{path}/weight", f"{key}.{name}.weight", layout))
    for path, (name, layout) in _CLIPPED.items():
        table.append(Weight(f"{layer}/{path}/weight", f"{key}.{name}.linear.weight", layout))
        if vision.block.clips:
            table += [Weight(f"{layer}/{path}/{bound}", f"{key}.{name}.{bound}", "") for bound in _BOUNDS]
    for name in ("std_bias", "std_scale") if projector_of(cfg).standardizes else ():
        table.append(Weight(f"projector/{name}/weight", prefix + name, "vision"))
    return [*table, Weight("projector/linear/weight", "model.embed_vision.embedding_projection.weight", "embed vision")]


def vision_from_hf(config: Mapping[str, Any]) -> VisionConfig:
    """Return the VisionConfig for a `vision_config` section; raise UserError if an option is not supported."""
    full = {**_VISION, **{name: value for name, value in config.items() if value is not None}}
    rope = full.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise UserError(f"vision tower: rope type {rope['rope_type']!r} is not supported (supported: axial)")
    depth, patch, merge = (int(full[name]) for name in ("num_hidden_layers", "patch_size", "pooling_kernel_size"))
    if full.get("attention_bias"):
        raise UserError("vision tower: attention_bias true is not supported")
    attention = Attention(
        int(full["num_attention_heads"]),
        int(full["num_key_value_heads"]),
        head_dim=int(full["head_dim"]),
        rope=RopeConfig(float(rope.get("rope_theta", 100.0)), "axial"),
        rope_parts=2,
        scale=1.0,
        qk_norm=True,
        v_norm=True,
    )
    return VisionConfig(
        hidden_size=int(full["hidden_size"]),
        layers=(Layer(attention, Dense(int(full["intermediate_size"]), activation=full["hidden_activation"])),) * depth,
        block=BlockConfig(
            norm_eps=float(full["rms_norm_eps"]), norm_place="both", clips=bool(full["use_clipped_linears"])
        ),
        n_layers_total=depth,
        image_size=_TYPICAL * merge * patch,
        patch_size=patch,
        channels=3,
        kind="gemma4",
        class_token=False,
        pre_norm=False,
        merge=merge,
        positions=PositionTable(by_axis=int(full["position_embedding_size"])),
        patches=PatchConfig(temporal=1, channels_last=True, centres=True),
    )
