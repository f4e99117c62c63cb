"""Qwen3-VL, dense: a tower for images of any size with features for several decoder layers, and a Qwen3 decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig, PositionTable, TextConfig, VisionConfig
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import text_from_hf, text_weights, vlm_text_to_hf
from vlmprune_jax.io.families.llama_like import llama_like, llama_like_weights
from vlmprune_jax.io.families.patch_towers import (
    check_out_size,
    model_from_hf,
    patch_family,
    square_side,
    tower_from_hf,
    tower_to_hf,
    tower_weights,
    typical_size,
    with_sections,
)
from vlmprune_jax.io.families.shapes import layers_to_hf, tied_embeddings
from vlmprune_jax.io.families.table import Decoder, Family, JsonDict
from vlmprune_jax.io.families.templates import QWEN3_VL as TEMPLATE
from vlmprune_jax.io.families.towers import vision_of

# Defaults of the config classes in transformers.
_DECODER = "qwen3_vl_text"
_TEXT: JsonDict = {
    "model_type": _DECODER,
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
}
_SECTIONS = (24, 20, 20)
_VISION: JsonDict = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def text_of(config: Mapping[str, Any], decoder: str) -> TextConfig:
    """Return the TextConfig of a Qwen3-VL decoder config with all defaults filled in."""
    bias = bool(config.get("attention_bias", False))
    text = llama_like(config, decoder, attention={"bias": bias, "out_bias": bias, "qk_norm": True})
    # the class interleaves regardless of mrope_interleaved
    return with_sections(text, _SECTIONS, interleaved=True)


def _vision_from_hf(config: Mapping[str, Any]) -> VisionConfig:
    full = {**_VISION, **{name: value for name, value in config.items() if value is not None}}
    side = square_side(int(full["num_position_embeddings"]))
    return tower_from_hf(
        full,
        kind="qwen3_vl",
        image_size=typical_size(full, side // int(full["spatial_merge_size"])),
        positions=PositionTable(side * int(full["patch_size"])),
        patch_bias=True,
        deepstack=tuple(full["deepstack_visual_indexes"]),
    )


_VIDEO = VideoConfig(
    "linspace",
    fps=2.0,
    min_frames=4,
    max_frames=768,
    temporal_patch=2,
    min_pixels=128 * 32**2,
    max_pixels=768 * 32**2,
)


def qwen3_vl_family(
    name: str,
    decoder: Decoder,
    defaults: JsonDict,
    *,
    deepstack: bool = True,
    ids: Mapping[str, int] | None = None,
    **fields: Any,
) -> Family:
    """Return a model family that combines Qwen3-VL's vision tower with `decoder`.

    `defaults` are those of the decoder's config class, `ids` those of image and video tokens; without `deepstack` no
    features of the tower's blocks enter the decoder.
    """

    def vision_from_hf(tower: Mapping[str, Any]) -> VisionConfig:
        if not deepstack and tower.get("deepstack_visual_indexes"):
            raise UserError(f"deepstack_visual_indexes of {name} must be empty: its class reads no such features")
        return _vision_from_hf(tower if deepstack else {**tower, "deepstack_visual_indexes": []})

    def from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
        del vision
        section = config.get("text_config") or {}
        tied = tied_embeddings(config, section, default=False)
        text = text_from_hf({**defaults, **section, "tie_word_embeddings": tied})
        tower = config.get("vision_config") or {}
        check_out_size({**_VISION, **tower}, text)
        return model_from_hf(name, {**(ids or {}), **config}, text, vision_from_hf(tower))

    def to_hf(cfg: ModelConfig, source: JsonDict) -> JsonDict:
        config = tower_to_hf(vision_of(cfg), source, vision_from_hf)
        section = {"model_type": decoder.model_type, **(source.get("text_config") or {})}
        return vlm_text_to_hf(cfg.text, config, section)

    return patch_family(
        name,
        decoder,
        from_hf=from_hf,
        to_hf=to_hf,
        weights=lambda cfg: (
            text_weights(cfg.text, "model.language_model.", "lm_head.weight")
            + tower_weights(cfg, "model.visual.", ("norm", "linear_fc1", "linear_fc2"))
        ),
        templates=(TEMPLATE,),
        video=_VIDEO,
        **{"vllm_tpu": "torchax", "runs_in": ("vllm", "mlx"), **fields},
    )


QWEN3_VL = qwen3_vl_family(
    "qwen3_vl",
    Decoder(
        _DECODER,
        "Qwen3VLForConditionalGeneration",
        lambda config: text_of({**_TEXT, **config}, _DECODER),
        layers_to_hf,
        llama_like_weights,
        gguf=(gguf.QWEN3VL,),
    ),
    _TEXT,
    tried={"vllm": "", "mlx": ""},
)
