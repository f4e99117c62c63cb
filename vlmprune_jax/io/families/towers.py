"""Vision towers of several families (CLIP, SigLIP, InternViT), and weight names of projectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig, PatchConfig, PositionTable, ProjectorConfig, VisionConfig
from vlmprune_jax.io.families.table import JsonDict, in_layers
from vlmprune_jax.io.families.tower import Tower, square_side

_CLIP_KEYS = {
    "class_embedding/weight": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "position_embedding": "embeddings.position_embedding",
    "pre_layrnorm": "pre_layrnorm",
    **in_layers(
        {
            "layer_norm1": "layer_norm1",
            **{f"self_attn/{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
            "layer_norm2": "layer_norm2",
            "mlp/fc1": "mlp.fc1",
            "mlp/fc2": "mlp.fc2",
        },
        "encoder.layers",
    ),
    "post_layernorm": "post_layernorm",
}
_INTERNVIT_KEYS = {
    "class_embedding/weight": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "position_embedding/weight": "embeddings.position_embedding",
    **in_layers(
        {
            "layer_norm1": "norm1",
            **{f"self_attn/{name}_proj": "attn.qkv" for name in "qkv"},
            "self_attn/out_proj": "attn.proj",
            "layer_scale1/weight": "ls1",
            "layer_norm2": "norm2",
            "mlp/fc1": "mlp.fc1",
            "mlp/fc2": "mlp.fc2",
            "layer_scale2/weight": "ls2",
        },
        "encoder.layers",
    ),
}
_INTERNVL_KEYS = {
    "class_embedding/weight": "embeddings.cls_token",
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "position_embedding/weight": "embeddings.position_embeddings",
    **in_layers(
        {
            "layer_norm1": "layernorm_before",
            **{f"self_attn/{name}_proj": f"attention.{name}_proj" for name in "qkv"},
            "self_attn/out_proj": "attention.projection_layer",
            "layer_scale1/weight": "lambda_1",
            "layer_norm2": "layernorm_after",
            "mlp/fc1": "mlp.fc1",
            "mlp/fc2": "mlp.fc2",
            "layer_scale2/weight": "lambda_2",
        },
        "encoder.layer",
    ),
}
PROJECTOR_KEYS = {name: name for name in ("layer_norm", "linear_1", "linear_2")}  # of transformers' projectors
_BIASED = PatchConfig(bias=True)
_CLIP: JsonDict = {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
    "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}  # fmt: skip
_SIGLIP: JsonDict = {**_CLIP, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
_INTERNVL: JsonDict = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
    "image_size": 448, "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
    "attention_bias": False, "use_qk_norm": False, "norm_type": "layer_norm", "use_mean_pooling": True,
    "use_absolute_position_embeddings": True,
}  # fmt: skip
_INTERNVIT: JsonDict = {
    "hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25, "num_hidden_layers": 48,
    "image_size": 224, "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
    "qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm",
}  # fmt: skip
_OF_SIGLIP: JsonDict = {"class_token": False, "patches": _BIASED, "pre_norm": False}
_OF_INTERNVIT: JsonDict = {
    # class token and positions have a batch axis
    "layouts": {"class_embedding/weight": "1 1 vision", "position_embedding/weight": "1 position vision"},
    "block": {"norm": "layer", "layer_scale": True},
    "vision": {"patches": _BIASED, "pre_norm": False, "positions": PositionTable(resizes=True)},
}
# Towers of any family by the `model_type` of their config section.
TOWERS = {
    "clip_vision_model": Tower("clip", _CLIP, _CLIP_KEYS),
    "siglip_vision_model": Tower("siglip", _SIGLIP, _CLIP_KEYS, vision=_OF_SIGLIP),
    "smolvlm_vision": Tower(
        "smolvlm",
        {**_SIGLIP, "hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32},
        _CLIP_KEYS,
        vision={**_OF_SIGLIP, "post_norm": True, "positions": PositionTable(spreads=True)},
    ),
    "siglip2_vision_model": Tower(
        "siglip2",
        {name: value for name, value in _SIGLIP.items() if name != "image_size"},
        _CLIP_KEYS,
        vision={
            **_OF_SIGLIP,
            "post_norm": True,
            "positions": PositionTable(antialiased=True),
            "patches": PatchConfig(bias=True, temporal=1, channels_last=True),
        },
    ),
    "internvl_vision": Tower("internvit", _INTERNVL, _INTERNVL_KEYS, **_OF_INTERNVIT),
    "intern_vit_6b": Tower("internvit", _INTERNVIT, _INTERNVIT_KEYS, **_OF_INTERNVIT),
}
# Mean and standard deviation of each tower's training images (openai/clip, google/siglip, ImageNet).
PIXELS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "smolvlm": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "siglip2": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "internvit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# Complete CLIP or SigLIP configs -> type of their vision part, which may not state it.
_OUTER = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
# Key prefixes of SigLIP's pooling head, which image features bypass; its MLP is as wide as those of the layers.
_POOLING_HEAD = ("vision_tower.head.", "vision_tower.vision_model.head.")


def _tower_of(config: Mapping[str, Any], default_type: str) -> tuple[Tower, Mapping[str, Any]]:
    """Return the tower of a vision config dictionary, or of a complete CLIP or SigLIP config, and its section."""
    default_type = _OUTER.get(config.get("model_type", ""), default_type)
    section = config.get("vision_config") or config
    model_type = section.get("model_type") or default_type
    if model_type not in TOWERS:
        raise UserError(f"vision tower {model_type!r} is not supported (supported: {', '.join(TOWERS)})")
    return TOWERS[model_type], section


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
    tower, section = _tower_of(config, default_type)
    section = tower.filled(section)
    _check_internvit(section)
    total = int(section["num_hidden_layers"])
    if not isinstance(feature_layer, int):
        raise UserError(f"vision feature layer {feature_layer!r} is not supported: it must be one integer")
    used = feature_layer if feature_layer >= 0 else total + 1 + feature_layer
    if not 0 < used <= total:
        raise UserError(f"vision feature layer {feature_layer} does not exist in a vision tower of {total} layers")
    table_size = square_side(section["image_size"], "image_size")
    positions = tower.vision.get("positions", PositionTable())
    if image_size not in (None, table_size):
        positions = dataclasses.replace(positions, image_size=table_size)
    vision = tower.read(section, image_size=image_size or table_size, positions=positions)
    return dataclasses.replace(vision, layers=vision.layers[:used])


def vision_to_hf(
    vision: VisionConfig, source: JsonDict, default_type: str, feature_layer: tuple[str, int] | None = None
) -> JsonDict:
    """Return config.json with the fields updated that depend on the vision tower's layers.

    A pruned tower ends with its feature layer, which then is the last hidden state. `feature_layer` is the name and the
    default of the field with the feature layer; None for classes that always use the last.

    Raises UserError if the layers have unequal widths, which no class loads.
    """
    section = source.get("vision_config") or {}
    before = vision_from_hf(section, source.get(*feature_layer) if feature_layer else -1, default_type)
    config = _tower_of(section, default_type)[0].write(vision, source, before)
    return config if config is source or feature_layer is None else {**config, feature_layer[0]: -1}


def is_left_out(key: str, config: JsonDict) -> bool:
    """Return True if the checkpoint may lack this key: SigLIP's pooling head, if config.json switches it off."""
    vision = config.get("vision_config") or {}
    return key.startswith(_POOLING_HEAD) and vision.get("vision_use_head") is False


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
        "model_type": next(model_type for model_type, tower in TOWERS.items() if tower.kind == vision.kind),
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
