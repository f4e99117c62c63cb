"""Vision towers and projectors: conversion of Hugging Face configs, and weight names in every checkpoint layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import ModelConfig, PatchConfig, PositionTable, VisionConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.mixers import Attention
from vlmprune_jax.core.projector import ProjectorConfig
from vlmprune_jax.core.stack import BlockConfig
from vlmprune_jax.io.families.table import JsonDict, Weight

# Defaults of each tower's config class in transformers (InternViT: in the hub's remote code).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
        "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
    },
    "siglip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
        "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
    },
    "smolvlm_vision": {
        "hidden_size": 1152, "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 12,
        "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
    },
    "siglip2_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
        "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
    },
    "internvl_vision": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
        "image_size": 448, "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
        "attention_bias": False, "use_qk_norm": False, "norm_type": "layer_norm", "use_mean_pooling": True,
        "use_absolute_position_embeddings": True,
    },
    "intern_vit_6b": {
        "hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25, "num_hidden_layers": 48,
        "image_size": 224, "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
        "qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm",
    },
}  # fmt: skip
# Fields of VisionConfig in which the towers differ.
_BIASED = PatchConfig(bias=True)
_INTERNVIT = {"patches": _BIASED, "pre_norm": False, "positions": PositionTable(resizes=True)}
_SIGLIP = {"class_token": False, "patches": _BIASED, "pre_norm": False}
_TRAITS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"kind": "clip"},
    "siglip_vision_model": {"kind": "siglip", **_SIGLIP},
    "smolvlm_vision": {"kind": "smolvlm", **_SIGLIP, "post_norm": True, "positions": PositionTable(spreads=True)},
    "siglip2_vision_model": {
        "kind": "siglip2",
        **_SIGLIP,
        "post_norm": True,
        "positions": PositionTable(antialiased=True),
        "patches": PatchConfig(bias=True, temporal=1, channels_last=True),
    },
    "internvl_vision": {"kind": "internvit", **_INTERNVIT},
    "intern_vit_6b": {"kind": "internvit", **_INTERNVIT},
}
# Mean and standard deviation of each tower's training images (openai/clip, google/siglip, ImageNet).
PIXELS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "smolvlm": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "siglip2": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "internvit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# `VisionConfig.kind` -> model_type in transformers.
KINDS = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "internvit": "internvl_vision",
    "smolvlm": "smolvlm_vision",
    "siglip2": "siglip2_vision_model",
}
TYPES = tuple(_DEFAULTS)
# Whole CLIP or SigLIP configs -> type of their vision part, which may not state it.
_OUTER = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def vision_from_hf(
    config: Mapping[str, Any], feature_layer: Any, default_type: str, image_size: int | None = None
) -> VisionConfig:
    """Return the VisionConfig of a vision config dictionary, or of a complete CLIP or SigLIP config.

    Args:
      config: the config.
      feature_layer: index into the hidden states (0 = embeddings); blocks above are not computed.
      default_type: type of tower if the config has none.
      image_size: side of the images (pixels), if it differs from that of the tower's position table.

    Raises UserError if the type of tower or an option is not supported, or there are several feature layers.
    """
    kind = _OUTER.get(config.get("model_type", ""), default_type)
    config = config.get("vision_config") or config
    kind = config.get("model_type") or kind
    if kind not in _DEFAULTS:
        raise UserError(f"vision tower {kind!r} is not supported (supported: {', '.join(_DEFAULTS)})")
    full = {**_DEFAULTS[kind], **{name: value for name, value in config.items() if value is not None}}
    _check_internvit(full)
    total = int(full["num_hidden_layers"])
    if not isinstance(feature_layer, int):
        raise UserError(f"vision feature layer {feature_layer!r} is not supported: it must be one integer")
    used = feature_layer if feature_layer >= 0 else total + 1 + feature_layer
    if not 0 < used <= total:
        raise UserError(f"vision feature layer {feature_layer} does not exist in a vision tower of {total} layers")
    table_size = _side(full["image_size"], "image_size")
    positions = _TRAITS[kind].get("positions", PositionTable())
    if image_size not in (None, table_size):
        positions = dataclasses.replace(positions, image_size=table_size)
    hidden, heads = int(full["hidden_size"]), int(full["num_attention_heads"])
    if "head_dim" not in full and hidden % heads:
        raise UserError(f"vision tower: hidden_size {hidden} is not a multiple of its {heads} heads")
    attention = Attention(
        heads,
        heads,
        head_dim=int(full.get("head_dim", hidden // heads)),
        bias=bool(full.get("qkv_bias", full.get("attention_bias", True))),
        out_bias=True,
    )
    channel = Dense(int(full["intermediate_size"]), activation=full["hidden_act"], gated=False, bias=True)
    return VisionConfig(
        hidden_size=hidden,
        layers=(Layer(attention, channel),) * used,
        block=BlockConfig(
            float(full["layer_norm_eps"]), norm="layer", layer_scale=_TRAITS[kind]["kind"] == "internvit"
        ),
        n_layers_total=total,
        image_size=image_size or table_size,
        patch_size=_side(full["patch_size"], "patch_size"),
        channels=int(full.get("num_channels", 3)),
        **{**_TRAITS[kind], "positions": positions},
    )


def vision_to_hf(
    vision: VisionConfig, source: JsonDict, default_type: str, feature_layer: tuple[str, int] | None
) -> JsonDict:
    """Return config.json with the fields updated that depend on the vision tower's layers.

    A pruned tower ends with its feature layer, which then is the last hidden state. `feature_layer` is the name and the
    default of the field with the feature layer; None for classes that always use the last.

    Raises UserError if the layers have unequal widths, which no class loads.
    """
    old = source.get("vision_config") or {}
    before = vision_from_hf(old, source.get(*feature_layer) if feature_layer else -1, default_type)
    if (before.layers, before.n_layers_total) == (vision.layers, vision.n_layers_total):
        return source
    shape = equal_shape(vision)
    new = {
        **old,
        "num_hidden_layers": len(vision.layers),
        "num_attention_heads": shape.mixer.q_heads,
        "intermediate_size": shape.sizes["mlp"],
    }
    if "head_dim" in old or not vision.whole_heads:
        new["head_dim"] = vision.attention.head_dim
    if vision.kind == "siglip":
        new["vision_use_head"] = False
    return {**source, "vision_config": new, **({feature_layer[0]: -1} if feature_layer else {})}


def equal_shape(vision: VisionConfig) -> Layer:
    """Return the layer shape that all layers of a vision tower share, from its config dictionary.

    Raises UserError if the layers have unequal widths, which no class loads.
    """
    if not vision.uniform:
        raise UserError(
            "the layers of the vision tower have unequal widths, which no transformers class can load: prune all "
            "layers alike, or "
            'export with uneven="pad" (same function, no savings)'
        )
    return vision.layers[0]


def is_left_out(key: str, config: JsonDict) -> bool:
    """Return True if the checkpoint may lack this key: SigLIP's pooling head, if config.json switches it off."""
    vision = config.get("vision_config") or {}
    return key.startswith(_POOLING_HEAD) and vision.get("vision_use_head") is False


def check_unpruned(vision: VisionConfig, feature_layer: int) -> None:
    """Raise UserError for a pruned vision tower if the checkpoint layout keeps the tower in a separate folder."""
    total = vision.n_layers_total
    used = feature_layer if feature_layer >= 0 else total + 1 + feature_layer
    if len(vision.layers) != used or not vision.whole_heads:
        raise UserError(
            'the vision tower was pruned, but this layout does not contain the tower: export with layout="transformers"'
        )


def _check_internvit(config: Mapping[str, Any]) -> None:
    unsupported = {
        "qk_normalization": config.get("qk_normalization", False),
        "use_qk_norm": config.get("use_qk_norm", False),
        "norm_type": config.get("norm_type", "layer_norm") != "layer_norm",
        "use_mean_pooling": not config.get("use_mean_pooling", True),
        "use_absolute_position_embeddings": not config.get("use_absolute_position_embeddings", True),
    }
    for name, refused in unsupported.items():
        if refused:
            raise UserError(
                f"vision tower: {name} = {config[name]!r} is not supported (supported: InternViT-300M with layer_norm, "
                "no norm of queries and keys, mean pooling, absolute positions)"
            )


def _side(size: Any, name: str) -> int:
    """Return the side length of a square image or patch, given as a number or a pair."""
    sides = {int(side) for side in (size if isinstance(size, (list, tuple)) else (size,))}
    if len(sides) != 1:
        raise UserError(
            f"vision tower: {name} {size} has unequal height and width, but only square sizes are supported"
        )
    return sides.pop()


# File layout of each weight; a bias has the first axes of its weight.
_LAYOUTS = {
    "class_embedding": "vision",
    "patch_embedding": "vision channel patch_row patch_column",
    "position_embedding": "position vision",
    "pre_layrnorm": "vision",
    "layers/{i}/layer_norm1": "vision",
    "layers/{i}/self_attn/q_proj": "(q_heads head) vision",
    "layers/{i}/self_attn/k_proj": "(kv_heads head) vision",
    "layers/{i}/self_attn/v_proj": "(kv_heads head) vision",
    "layers/{i}/self_attn/out_proj": "vision (q_heads head)",
    "layers/{i}/layer_scale1": "vision",
    "layers/{i}/layer_norm2": "vision",
    "layers/{i}/mlp/fc1": "mlp vision",
    "layers/{i}/mlp/fc2": "vision mlp",
    "layers/{i}/layer_scale2": "vision",
    "post_layernorm": "vision",
}
# Key prefixes of SigLIP's pooling head, which image features bypass; its MLP is as wide as those of the layers.
_POOLING_HEAD = ("vision_tower.head.", "vision_tower.vision_model.head.")
# Keys that differ from the path with dots; paths that share a key are rows of a fused tensor, in this order.
_CLIP_KEYS = {
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding.weight",
    "position_embedding": "embeddings.position_embedding.weight",
}
_INTERNVIT_KEYS = {
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding.weight",
    "position_embedding": "embeddings.position_embedding",
    "layers/{i}/layer_norm1": "encoder.layers.{i}.norm1.weight",
    "layers/{i}/self_attn/q_proj": "encoder.layers.{i}.attn.qkv.weight",
    "layers/{i}/self_attn/k_proj": "encoder.layers.{i}.attn.qkv.weight",
    "layers/{i}/self_attn/v_proj": "encoder.layers.{i}.attn.qkv.weight",
    "layers/{i}/self_attn/out_proj": "encoder.layers.{i}.attn.proj.weight",
    "layers/{i}/layer_scale1": "encoder.layers.{i}.ls1",
    "layers/{i}/layer_norm2": "encoder.layers.{i}.norm2.weight",
    "layers/{i}/layer_scale2": "encoder.layers.{i}.ls2",
}
_INTERNVL_KEYS = {
    "class_embedding": "embeddings.cls_token",
    "patch_embedding": "embeddings.patch_embeddings.projection.weight",
    "position_embedding": "embeddings.position_embeddings",
    "layers/{i}/layer_norm1": "encoder.layer.{i}.layernorm_before.weight",
    "layers/{i}/self_attn/q_proj": "encoder.layer.{i}.attention.q_proj.weight",
    "layers/{i}/self_attn/k_proj": "encoder.layer.{i}.attention.k_proj.weight",
    "layers/{i}/self_attn/v_proj": "encoder.layer.{i}.attention.v_proj.weight",
    "layers/{i}/self_attn/out_proj": "encoder.layer.{i}.attention.projection_layer.weight",
    "layers/{i}/layer_scale1": "encoder.layer.{i}.lambda_1",
    "layers/{i}/layer_norm2": "encoder.layer.{i}.layernorm_after.weight",
    "layers/{i}/layer_scale2": "encoder.layer.{i}.lambda_2",
    "layers/{i}/mlp/fc1": "encoder.layer.{i}.mlp.fc1.weight",
    "layers/{i}/mlp/fc2": "encoder.layer.{i}.mlp.fc2.weight",
}


def vision_weights(vision: VisionConfig, prefix: str) -> list[Weight]:
    """Return the weight table of a CLIP, SigLIP or SmolVLM tower, up to the layer whose features are used."""
    return _tower_weights(vision, prefix, _CLIP_KEYS)


def internvit_weights(vision: VisionConfig, prefix: str, native: bool) -> list[Weight]:
    """Return the weight table of an InternViT tower, up to the layer whose features are used."""
    return _tower_weights(vision, prefix, _INTERNVL_KEYS if native else _INTERNVIT_KEYS)


def _tower_weights(vision: VisionConfig, prefix: str, keys: Mapping[str, str]) -> list[Weight]:
    absent = {
        "class_embedding": not vision.class_token,
        "pre_layrnorm": not vision.pre_norm,
        "post_layernorm": not vision.post_norm,
        "layers/{i}/layer_scale1": not vision.block.layer_scale,
        "layers/{i}/layer_scale2": not vision.block.layer_scale,
    }
    without_bias = {"class_embedding", "position_embedding", "layers/{i}/layer_scale1", "layers/{i}/layer_scale2"}
    if not vision.patches.bias:
        without_bias.add("patch_embedding")
    if not vision.attention.bias:
        without_bias.update(f"layers/{{i}}/self_attn/{name}" for name in ("q_proj", "k_proj", "v_proj"))
    # InternViT stores class token and positions with a batch axis of size 1
    batched = {"class_embedding": "1 1 ", "position_embedding": "1 "} if vision.kind == "internvit" else {}
    table = []
    for path, layout in _LAYOUTS.items():
        if absent.get(path):
            continue
        if path == "patch_embedding" and vision.patches.channels_last:
            layout = "vision (patch_row patch_column channel)"
        default = path.replace("layers/", "encoder.layers.").replace("/", ".") + ".weight"
        key = prefix + keys.get(path, default)
        table.append(Weight(f"vision/{path}/weight", key, batched.get(path, "") + layout))
        if path not in without_bias:
            table.append(Weight(f"vision/{path}/bias", key.removesuffix("weight") + "bias", first_axes(layout)))
    return table


def first_axes(layout: str) -> str:
    """Return the layout of a bias: the output axes of its weight's layout."""
    return layout.partition(")")[0] + ")" if layout.startswith("(") else layout.split()[0]


def projector_weights(projector: ProjectorConfig, prefix: str, names: tuple[str, ...]) -> list[Weight]:
    """Return the projector's weight table; `names` are the checkpoint names of its layers in order."""
    into = "shuffled" if projector.shuffles else "vision"
    layouts = {"linear_1": f"projector {into}", "linear_2": "embed projector"}
    if projector.kind == "pixel_shuffle" and projector.input_norm:
        layouts = {"layer_norm": into, **layouts}
    if projector.kind == "linear":
        layouts = {"linear": f"embed {into}"}
    table = []
    for (path, layout), name in zip(layouts.items(), names, strict=True):
        table.append(Weight(f"projector/{path}/weight", f"{prefix}{name}.weight", layout))
        if projector.bias or path == "layer_norm":
            table.append(Weight(f"projector/{path}/bias", f"{prefix}{name}.bias", first_axes(layout)))
    return table


def projector_of(cfg: ModelConfig) -> ProjectorConfig:
    """Return a model's ProjectorConfig; the model must have a projector."""
    assert cfg.projector is not None
    return cfg.projector


def vision_of(cfg: ModelConfig) -> VisionConfig:
    """Return a model's VisionConfig; the model must have a vision tower."""
    assert cfg.vision is not None
    return cfg.vision


def stock_tower(vision: VisionConfig) -> JsonDict:
    """Return transformers' vision_config for a tower without the layers after the one whose features are used."""
    shape = vision.layers[0]
    config = {
        "model_type": KINDS[vision.kind],
        "hidden_size": vision.hidden_size,
        "intermediate_size": shape.sizes["mlp"],
        "num_attention_heads": shape.mixer.q_heads,
        "num_hidden_layers": len(vision.layers),
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": vision.channels,
        "layer_norm_eps": vision.block.norm_eps,
        "hidden_act": vision.channel.activation,
    }
    if vision.kind == "siglip":
        config["vision_use_head"] = False
    if vision.kind == "internvit":
        sides = {name: [config[name]] * 2 for name in ("image_size", "patch_size")}
        config |= {**sides, "attention_bias": vision.attention.bias, "norm_type": "layer_norm", "use_qk_norm": False}
    return config


def stock_tower_constants(vision: VisionConfig) -> dict[str, tuple[tuple[int, ...], float]]:
    """Return {key: (shape, value)} of weights that transformers' tower class has but never uses."""
    if vision.kind == "internvit":
        return {}
    # a norm after the last block; features are taken before it
    norm = "vision_tower.vision_model.post_layernorm."
    return {f"{norm}weight": ((vision.hidden_size,), 1.0), f"{norm}bias": ((vision.hidden_size,), 0.0)}
