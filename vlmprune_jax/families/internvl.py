"""InternVL in both layouts: the hub's InternVLChatModel (Mini-InternVL-Chat-4B-V1-5), and that of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.config import ModelConfig, ProjectorConfig
from vlmprune_jax.errors import UserError
from vlmprune_jax.families.decoders import text_from_hf, text_to_hf, text_weights
from vlmprune_jax.families.llava import HF_MODULES, NATIVE_RENAMES
from vlmprune_jax.families.shapes import layers_to_hf, token_ids
from vlmprune_jax.families.table import Family, JsonDict
from vlmprune_jax.families.towers import (
    internvit_weights,
    projector_of,
    projector_weights,
    vision_from_hf,
    vision_of,
    vision_to_hf,
)

# torch's default, which the projector's layer norm has in both layouts.
_PROJECTOR_EPS = 1e-5
# The vocabulary ends in <img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>, in this order.
_IMAGE_TOKEN_FROM_END = 7


def _projector(config: Mapping[str, Any], version: str) -> ProjectorConfig:
    ratio = float(config.get("downsample_ratio", 0.5))
    factor = round(1 / ratio) if ratio > 0 else 0
    if factor < 1 or factor * ratio != 1:
        raise UserError(f"downsample_ratio {ratio} is not supported: it must be 1 over a whole number, like 0.5")
    return ProjectorConfig(
        activation=config.get("projector_hidden_act", "gelu"),
        bias=True,
        kind="pixel_shuffle",
        norm_eps=_PROJECTOR_EPS,
        downsample=factor,
        shuffle_version=version,
    )


def _original_from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
    del vision
    text = text_from_hf({"model_type": "llama", **(config.get("llm_config") or {})})
    layer = config.get("select_layer", -1)
    tower = vision_from_hf(config.get("vision_config") or {}, layer, "intern_vit_6b", config.get("force_image_size"))
    if tower.kind != "internvit":
        raise UserError(f"InternVL-Chat with a {tower.kind} tower is not supported (supported: intern_vit_6b)")
    ids = token_ids({**(config.get("llm_config") or {}), **config})
    end = config.get("chat_end_token_id")
    if end is not None and end not in ids["eos_token_ids"]:
        ids["eos_token_ids"] = (*ids["eos_token_ids"], end)
    return ModelConfig(
        family="internvl",
        layout="original",
        text=text,
        vision=tower,
        projector=_projector(config, config.get("ps_version", "v1")),
        image_token_id=int(config.get("image_token_id", text.vocab_size - _IMAGE_TOKEN_FROM_END)),
        **ids,
    )


def _native_from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
    del vision
    text = {"model_type": "qwen2", **(config.get("text_config") or {})}
    if str(config.get("transformers_version", "5")).startswith("4."):
        tied = text.get("tie_word_embeddings", False)  # version 4 looks at the decoder's flag alone
    else:
        tied = config.get("tie_word_embeddings", True)  # version 5 at the outer one, true where absent
    text["tie_word_embeddings"] = bool(tied)
    select = config.get("vision_feature_select_strategy", "default")
    if select != "default":
        raise UserError(f"InternVL: vision_feature_select_strategy {select!r} is not supported (supported: default)")
    tower = vision_from_hf(config.get("vision_config") or {}, config.get("vision_feature_layer", -1), "internvl_vision")
    if tower.kind != "internvit":
        raise UserError(f"InternVL with a {tower.kind} tower is not supported (supported: internvl_vision)")
    return ModelConfig(
        family="internvl",
        layout="transformers",
        text=text_from_hf(text),
        vision=tower,
        projector=_projector(config, "v2"),
        image_token_id=int(config.get("image_token_id", 151667)),
        **token_ids({**text, **{k: v for k, v in config.items() if k.endswith("token_id") and v is not None}}),
    )


def _native_to_hf(cfg: ModelConfig, source: JsonDict) -> JsonDict:
    old = {"model_type": "qwen2", **(source.get("text_config") or {})}
    config = vision_to_hf(vision_of(cfg), source, "internvl_vision", ("vision_feature_layer", -1))
    return {**config, "text_config": text_to_hf(cfg.text, old)}


def _original_to_hf(cfg: ModelConfig, source: JsonDict) -> JsonDict:
    config = vision_to_hf(vision_of(cfg), source, "intern_vit_6b", ("select_layer", -1))
    # the hub's classes have no other name for other widths
    return {**config, "llm_config": layers_to_hf(cfg.text, source.get("llm_config") or {})}


INTERNVL_ORIGINAL = Family(
    name="internvl",
    layout="original",
    matches=lambda config: config.get("model_type") == "internvl_chat",
    from_hf=_original_from_hf,
    to_hf=_original_to_hf,
    weights=lambda cfg: (
        text_weights(cfg.text, "language_model.model.", "language_model.lm_head.weight")
        + projector_weights(projector_of(cfg), "mlp1.", ("0", "1", "3"))
        + internvit_weights(vision_of(cfg), "vision_model.", native=False)
    ),
    ignored=(
        r".*\.rotary_emb\.inv_freq",
        r"language_model\.lm_head\.weight",
        r"vision_model\.encoder\.layers\..*",
    ),
    token_names=(
        ("image_token_id", "<IMG_CONTEXT>"),
        ("chat_end_token_id", "<|end|>"),
        ("chat_end_token_id", "<|im_end|>"),
    ),
)

INTERNVL_HF = Family(
    name="internvl",
    layout="transformers",
    matches=lambda config: config.get("model_type") == "internvl",
    from_hf=_native_from_hf,
    to_hf=_native_to_hf,
    weights=lambda cfg: (
        text_weights(cfg.text, "language_model.model.", "language_model.lm_head.weight")
        + projector_weights(projector_of(cfg), "multi_modal_projector.", ("layer_norm", "linear_1", "linear_2"))
        + internvit_weights(vision_of(cfg), "vision_tower.", native=True)
    ),
    modules=HF_MODULES,
    renames=NATIVE_RENAMES,
    ignored=(
        r".*\.rotary_emb\.inv_freq",
        r"language_model\.lm_head\.weight",
        r"vision_tower\.(embeddings\.mask_token|encoder\.layer\..*)",
    ),
)
