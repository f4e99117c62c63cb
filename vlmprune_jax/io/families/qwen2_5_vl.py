"""Qwen2.5-VL: a tower for images of any size, with windowed attention in most blocks, and a Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig, TextConfig, VisionConfig
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import vlm_to_hf
from vlmprune_jax.io.families.llama_like import defaults_of, llama_like
from vlmprune_jax.io.families.qwen3_vl import (
    NORM_EPS,
    TOWER,
    patch_family,
    qwen_from_hf,
    qwen_tower,
    sectioned_rope,
)
from vlmprune_jax.io.families.shapes import PER_LAYER, layers_to_hf, windows_from_hf
from vlmprune_jax.io.families.table import Decoder, JsonDict, in_layers
from vlmprune_jax.io.families.templates import QWEN2_5_VL as TEMPLATE
from vlmprune_jax.io.families.towers import FUSED_KEYS, PIXELS, Tower, vision_of

_DECODER = "qwen2_5_vl_text"
_TEXT = defaults_of(
    _DECODER, max_position_embeddings=32768, rms_norm_eps=1e-5, max_window_layers=80, rope_theta=1000000.0
)
_SECTIONS = (16, 24, 24)
_TOWER = Tower(
    "qwen2_5_vl",
    {
        "depth": 32,
        "hidden_size": 3584,
        "hidden_act": "silu",
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    {
        "patch_embedding": "patch_embed.proj",
        **in_layers(
            {**FUSED_KEYS, **{f"mlp/{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")}}, "blocks"
        ),
    },
    dense={"bias": True},
    block={"norm_eps": NORM_EPS},
    **TOWER,
)
_TOKENS_PER_SECOND = 4  # temporal positions per second of video
_TYPICAL_WINDOWS = 4  # windows per side of a typical image, for estimates
# Fields of a hub's config.json that describe the whole model; the others describe the decoder.
_OUTER = (
    "architectures", "auto_map", "model_type", "vision_config", "transformers_version", "torch_dtype", "dtype",
    "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id",
    "tie_word_embeddings",
)  # fmt: skip


def _text_from_hf(config: Mapping[str, Any]) -> TextConfig:
    """Return the decoder's TextConfig; head_dim is hidden_size / heads, as in the transformers class."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    if hidden % heads:
        raise UserError(f"hidden_size {hidden} must be a multiple of num_attention_heads {heads}")
    config = {**config, "head_dim": hidden // heads}
    attention = {"bias": True, "rope": sectioned_rope(config, _SECTIONS, interleaved=False)}
    return llama_like(config, _DECODER, windows=windows_from_hf, attention=attention, whole_heads=True)


def _text_to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    config, heads = layers_to_hf(text, source), text.hidden_size // text.attention.head_dim
    del config["head_dim"]  # the class does not read it
    if PER_LAYER not in config and config["num_attention_heads"] != heads:
        raise UserError(
            f"Qwen2.5-VL: transformers cannot load {config['num_attention_heads']} of {heads} heads, because it "
            "computes "
            'head_dim from the number of heads: prune with heads="keep", or export with uneven="pad" (same function, '
            "no savings in heads)"
        )
    return {**config, "num_attention_heads": heads}


def _vision_from_hf(config: Mapping[str, Any]) -> VisionConfig:
    section = _TOWER.filled(config)
    window, merge, patch = (int(section[name]) for name in ("window_size", "spatial_merge_size", "patch_size"))
    side = window // merge // patch
    if side < 1:
        raise UserError(
            f"vision tower: window_size {window} must be at least spatial_merge_size x patch_size ({merge} x {patch})"
        )
    depth, whole = int(section["depth"]), set(section["fullatt_block_indexes"])
    if not whole <= set(range(depth)):
        raise UserError(
            f"vision tower: fullatt_block_indexes {sorted(whole)} must be layer numbers from 0 to {depth - 1}"
        )
    windows = [None if i in whole else side for i in range(depth)]
    return qwen_tower(_TOWER, section, _TYPICAL_WINDOWS * side, patch_bias=False, windows=windows, positions=None)


def _nested(config: Mapping[str, Any]) -> JsonDict:
    """Return a Qwen2.5-VL config.json in transformers 5's form, with the decoder's fields in `text_config`."""
    if config.get("text_config") is not None:
        return dict(config)
    outer = {name: value for name, value in config.items() if name in _OUTER}
    inner = {name: value for name, value in config.items() if name not in _OUTER}
    tied = {name: value for name, value in config.items() if name == "tie_word_embeddings"}
    return {**outer, "text_config": {"model_type": _DECODER, **inner, **tied}}


def _from_hf(config: Mapping[str, Any], _: Mapping[str, Any] | None) -> ModelConfig:
    config = _nested(config)
    section = config["text_config"]
    # transformers 5 reads the outer flag first, transformers 4 the decoder's
    flags = (section, config) if str(config.get("transformers_version", "5")).startswith("4.") else (config, section)
    tied = next((flag["tie_word_embeddings"] for flag in flags if "tie_word_embeddings" in flag), False)
    shared = {"tie_word_embeddings": bool(tied)}
    config = {**config, **shared, "text_config": {**section, **shared}}
    tower = config.get("vision_config") or {}
    seconds = float(tower.get("tokens_per_second") or _TOKENS_PER_SECOND)
    return qwen_from_hf("qwen2_5_vl", config, _TEXT, _TOWER, _vision_from_hf(tower), tokens_per_second=seconds)


def _to_hf(cfg: ModelConfig, source: JsonDict) -> JsonDict:
    before = _vision_from_hf(source.get("vision_config") or {})
    config = vlm_to_hf(cfg, _TOWER.write(vision_of(cfg), _nested(source), before), {"model_type": _DECODER})
    # mlx-vlm reads the decoder's fields at the top level, as on the hub; transformers and vLLM read text_config
    return {name: value for name, value in config["text_config"].items() if name not in _OUTER} | config


QWEN2_5_VL = patch_family(
    "qwen2_5_vl",
    Decoder(
        _DECODER,
        "Qwen2_5_VLForConditionalGeneration",
        _text_from_hf,
        _text_to_hf,
        defaults=_TEXT,
        derives_head_dim=("transformers", "vllm", "vllm_tpu", "mlx", "openvino"),
        gguf=(gguf.QWEN2VL,),
    ),
    from_hf=_from_hf,
    to_hf=_to_hf,
    tower=_TOWER,
    projector={"patch_norm": "ln_q", "linear_1": "mlp.0", "linear_2": "mlp.2"},
    prefixes={"text": "model.", "vision": "visual.", "projector": "visual.merger."},
    # in files of transformers 4 and 5, and in memory in transformers 5
    renames=((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),
    modules=((r"^visual\.", "model.visual."), (r"^model\.(?!visual\.)", "model.language_model.")),
    templates=(TEMPLATE,),
    video=VideoConfig(
        "steps",
        min_frames=4,
        max_frames=768,
        temporal_patch=2,
        min_pixels=128 * 28**2,
        max_pixels=768 * 28**2,
        mean=PIXELS["clip"][0],
        std=PIXELS["clip"][1],
    ),
    vllm_tpu="jax",
    runs_in=("vllm", "mlx"),
)
