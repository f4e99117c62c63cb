"""LFM2-VL: SigLIP 2's tower for images of any size, pixel unshuffle, and a decoder of short convolutions (LFM2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig, ProjectorConfig, TextConfig, VisionConfig
from vlmprune_jax.core.mixers import ShortConv
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import decoder_family, vlm_family, vlm_from_hf, vlm_to_hf
from vlmprune_jax.io.families.llama_like import defaults_of, llama_like
from vlmprune_jax.io.families.shapes import hybrid_layers, hybrid_problem, tied_embeddings, typed_layers_to_hf
from vlmprune_jax.io.families.table import LLAMA_NAMES, Decoder, JsonDict, in_layers
from vlmprune_jax.io.families.templates import QWEN3_VL
from vlmprune_jax.io.families.towers import (
    PROJECTOR_KEYS,
    TOWERS,
    position_side,
    vision_from_hf,
    vision_of,
)

_TEXT = defaults_of(
    "lfm2",
    max_position_embeddings=128000,
    norm_eps=1e-5,
    tie_word_embeddings=True,
    conv_L_cache=3,
    block_multiple_of=256,
    block_ffn_dim_multiplier=1.0,
    block_auto_adjust_ff_dim=True,
)
_THETA = 1e6
_TOWER = "siglip2_vision_model"
_NAMES = {
    **LLAMA_NAMES,
    **in_layers(
        {
            "input_layernorm": "operator_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn/o_proj": "self_attn.out_proj",
            "self_attn/q_norm": "self_attn.q_layernorm",
            "self_attn/k_norm": "self_attn.k_layernorm",
            "mlp/gate_proj": "feed_forward.w1",
            "mlp/up_proj": "feed_forward.w3",
            "mlp/down_proj": "feed_forward.w2",
            **{f"short_conv/{name}_proj": "conv.in_proj" for name in "bcx"},  # its rows, in order
            "short_conv/conv": "conv.conv",
            "short_conv/out_proj": "conv.out_proj",
        }
    ),
    "norm": "embedding_norm",
}


def _neurons(config: Mapping[str, Any]) -> int:
    """Return the MLP neurons per layer, computed from `block_ff_dim` or `intermediate_size` as transformers does."""
    stated = config.get("block_ff_dim")
    neurons = int(config["intermediate_size"] if stated is None else stated)
    if not config["block_auto_adjust_ff_dim"]:
        return neurons
    neurons, factor, multiple = int(2 * neurons / 3), config["block_ffn_dim_multiplier"], config["block_multiple_of"]
    return neurons if factor is None else -(-int(factor * neurons) // multiple) * multiple


def _tied(config: Mapping[str, Any]) -> JsonDict:
    """Return the config with `tie_word_embeddings` set from LFM2's own field `tie_embedding`, which has priority."""
    tied = config.get("tie_embedding", config.get("tie_word_embeddings", True))
    return {**config, "tie_word_embeddings": tied}


def _text_from_hf(config: Mapping[str, Any]) -> TextConfig:
    config = _tied(config)
    if config.get("conv_bias"):
        raise UserError("conv_bias true is not supported (no released model has it)")
    fields = {"intermediate_size": _neurons(config), "rms_norm_eps": config["norm_eps"], "hidden_act": "silu"}
    if not config.get("rope_parameters"):
        fields["rope_theta"] = config.get("rope_theta") or _THETA
    text = llama_like({**config, **fields}, "lfm2", attention={"qk_norm": True})
    full, mixer = config.get("full_attn_idxs"), ShortConv(text.hidden_size, int(config["conv_L_cache"]))
    return hybrid_layers(text, mixer, config, range(len(text.layers)) if full is None else full)


def _text_to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    """Return an LFM2 config with updated layers, which states the number of neurons itself."""
    config = typed_layers_to_hf(text, source) | {"block_auto_adjust_ff_dim": False}
    return {name: value for name, value in config.items() if name != "block_ff_dim"}


LFM2 = decoder_family(
    Decoder(
        "lfm2",
        "Lfm2ForCausalLM",
        _text_from_hf,
        _text_to_hf,
        _NAMES,
        defaults=_TEXT,
        gguf=(gguf.LFM2,),
        runs_in=("vllm", "mlx"),
        vllm_tpu="",
        problem=hybrid_problem,
    )
)

_TEMPLATE = dataclasses.replace(
    QWEN3_VL,
    name="lfm2_vl",
    image_tokens=("<|image_start|>", "<image>", "<|image_end|>"),
    tile_start="<|img_row_{row}_col_{column}|>",
    overview="<|img_thumbnail|>",
    video=None,
)


def _vision_from_hf(config: Mapping[str, Any], merge: int) -> VisionConfig:
    full = {"num_patches": 256, "patch_size": 16, **{name: x for name, x in config.items() if x is not None}}
    side, patch = position_side(int(full["num_patches"])), int(full["patch_size"])
    tower = {**full, "model_type": _TOWER, "image_size": side * patch}
    vision = vision_from_hf(tower, -1, _TOWER, image_size=max(side // merge, 1) * merge * patch)
    return dataclasses.replace(vision, merge=merge)


def _from_hf(config: Mapping[str, Any], _: Mapping[str, Any] | None) -> ModelConfig:
    merge = int(config.get("downsample_factor", 2))
    projector = ProjectorConfig(
        activation=config.get("projector_hidden_act", "gelu"),
        bias=bool(config.get("projector_bias", True)),
        kind="pixel_shuffle",
        input_norm=bool(config.get("projector_use_layernorm", True)),
        norm_eps=1e-5,
        downsample=merge,
        hidden_size=int(config.get("projector_hidden_size", 2560)),
    )
    tower = _vision_from_hf(config.get("vision_config") or {}, merge)
    section = _tied({**_TEXT, **(config.get("text_config") or {})})
    section["tie_embedding"] = tied_embeddings(_tied(config), section, default=True)
    config = {**config, "text_config": section}
    return vlm_from_hf("lfm2_vl", config, {}, tied=True, image_token=396, vision=tower, projector=projector)


def _to_hf(cfg: ModelConfig, source: JsonDict) -> JsonDict:
    vision, old = vision_of(cfg), source.get("vision_config") or {}
    section = {**old, "model_type": _TOWER, "image_size": vision.image_size}
    written = TOWERS[_TOWER].write(vision, {"vision_config": section}, vision_from_hf(section, -1, _TOWER))
    tower = {**written["vision_config"], "vision_use_head": False}
    tower = {name: value for name, value in tower.items() if name != "image_size" or name in old}
    return vlm_to_hf(cfg, {**source, "vision_config": tower}, _TEXT)


LFM2_VL = vlm_family(
    "lfm2_vl",
    "Lfm2VlForConditionalGeneration",
    model_types=("lfm2_vl", "lfm2-vl"),
    from_hf=_from_hf,
    to_hf=_to_hf,
    tower=TOWERS[_TOWER],
    projector=PROJECTOR_KEYS,
    prefixes={
        "text": "model.language_model.",
        "projector": "model.multi_modal_projector.",
        "vision": "model.vision_tower.",
    },
    renames=((r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),),
    dropped=(r"model\.vision_tower\.head\..*",),
    templates=(_TEMPLATE,),
    image_processors=("Lfm2Vl",),
    images="naflex",
    runs_in=("vllm", "mlx"),
)
