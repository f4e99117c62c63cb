"""Qwen3-VL, dense and with experts: a tower for images of any size whose features enter several decoder layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import Experts
from vlmprune_jax.core.config import ModelConfig, PatchConfig, PositionTable, ProjectorConfig, TextConfig, VisionConfig
from vlmprune_jax.core.mixers import RopeConfig
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import RECIPE, vlm_family, vlm_from_hf
from vlmprune_jax.io.families.experts import (
    QWEN_EXPERT_NAMES,
    expert_names,
    experts_problem,
    experts_to_hf,
    transposed_layouts,
    with_expert_count,
    with_experts,
)
from vlmprune_jax.io.families.llama_like import defaults_of, llama_like
from vlmprune_jax.io.families.shapes import rope_from_hf
from vlmprune_jax.io.families.table import Decoder, Family, JsonDict, in_layers
from vlmprune_jax.io.families.templates import QWEN3_VL as TEMPLATE
from vlmprune_jax.io.families.towers import FIELDS, FUSED_KEYS, Tower, position_side, vision_of

_DECODER = "qwen3_vl_text"
_SECTIONS = (24, 20, 20)
# Constants of both generations' towers.
TOWER: JsonDict = {
    "fields": FIELDS | {"depth": "depth", "q_heads": "num_heads", "channels": "in_channels"},
    "rope_theta": 10000.0,
    "attention": {"bias": True, "out_bias": True},
    "vision": {"class_token": False, "pre_norm": False},
}
NORM_EPS = 1e-6  # of all norms in both towers, fixed in their code
_TOWER = Tower(
    "qwen3_vl",
    {
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
    },
    {
        "patch_embedding": "patch_embed.proj",
        "position_embedding": "pos_embed",
        **in_layers({**FUSED_KEYS, "mlp/fc1": "mlp.linear_fc1", "mlp/fc2": "mlp.linear_fc2"}, "blocks"),
    },
    block={"norm": "layer", "norm_eps": NORM_EPS},
    **TOWER,
)


def _merger_keys(cfg: ModelConfig) -> dict[str, str]:
    layers = {"linear_1": "linear_fc1", "linear_2": "linear_fc2"}
    deepstack = {
        f"deepstack/{number}/{path}": f"deepstack_merger_list.{number}.{name}"
        for number in range(len(vision_of(cfg).deepstack))
        for path, name in {"layer_norm": "norm", **layers}.items()
    }
    return {"patch_norm": "merger.norm", **{path: f"merger.{name}" for path, name in layers.items()}, **deepstack}


def sectioned_rope(config: Mapping[str, Any], default: tuple[int, ...], *, interleaved: bool) -> RopeConfig:
    """Return the M-RoPE of a decoder config; `default` is used if `mrope_section` is absent."""
    rope = rope_from_hf(config)
    return dataclasses.replace(rope, sections=rope.sections or default, interleaved=interleaved)


def _text_from_hf(config: Mapping[str, Any], decoder: str) -> TextConfig:
    # the class interleaves regardless of mrope_interleaved
    rope = sectioned_rope(config, _SECTIONS, interleaved=True)
    return llama_like(config, decoder, biased=True, attention={"qk_norm": True, "rope": rope})


def qwen_tower(tower: Tower, section: Mapping[str, Any], cells: int, patch_bias: bool, **fields: Any) -> VisionConfig:
    """Return the VisionConfig of a complete vision_config; a typical image has `cells` merged patches per side."""
    merge, patch = int(section["spatial_merge_size"]), int(section["patch_size"])
    return tower.read(
        section,
        image_size=patch * merge * max(cells, 1),
        patches=PatchConfig(patch_bias, int(section["temporal_patch_size"])),
        merge=merge,
        **fields,
    )


def _vision_from_hf(config: Mapping[str, Any]) -> VisionConfig:
    section = _TOWER.filled(config)
    side = position_side(int(section["num_position_embeddings"]))
    positions = PositionTable(side * int(section["patch_size"]))
    deepstack = tuple(section["deepstack_visual_indexes"])
    cells = side // int(section["spatial_merge_size"])
    return qwen_tower(_TOWER, section, cells, patch_bias=True, positions=positions, deepstack=deepstack)


def qwen_from_hf(
    family: str, config: Mapping[str, Any], defaults: JsonDict, tower: Tower, vision: VisionConfig, **fields: Any
) -> ModelConfig:
    """Return the ModelConfig of a Qwen-VL model; `defaults` are those of the decoder, `fields` those of ModelConfig.

    Raises UserError unless the tower's output width is the decoder's hidden size.
    """
    merger = ProjectorConfig(
        activation="gelu",
        bias=True,
        kind="merger",
        norm_eps=NORM_EPS,
        downsample=vision.merge,
        norm=vision.block.norm,
        deepstack=len(vision.deepstack),
    )
    video = int(config.get("video_token_id", 151656))
    parts = {"vision": vision, "projector": merger, "video_token_id": video, **fields}
    cfg = vlm_from_hf(family, config, defaults, tied=False, image_token=151655, **parts)
    out_size = int(tower.filled(config.get("vision_config") or {})["out_hidden_size"])
    if out_size != cfg.text.hidden_size:
        raise UserError(
            f"vision_config: out_hidden_size {out_size} must be the decoder's hidden_size ({cfg.text.hidden_size})"
        )
    return cfg


def patch_family(name: str, decoder: Decoder, **fields: Any) -> Family:
    """Return a Qwen-VL family loaded by transformers' `decoder.stock_class`; `fields`: further fields of `Family`."""
    return vlm_family(
        name,
        decoder.stock_class,
        stock={"image_start": ("vision_start_token_id", 151652)},
        ignored=(r".*\.rotary_(pos_)?emb\.inv_freq", r"lm_head\.weight", r"mtp\..*"),
        image_processors=("Qwen2VL",),
        images="patches",
        recipe={**RECIPE, "data": {"max_length": 4096, "max_image_tokens": 1280}},
        decoder=decoder,
        **fields,
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
    *,
    deepstack: bool = True,
    ids: Mapping[str, int] | None = None,
    **fields: Any,
) -> Family:
    """Return a model family that combines Qwen3-VL's vision tower with `decoder`.

    `ids` are the defaults of image and video tokens; without `deepstack` no features of the tower's blocks enter the
    decoder.
    """

    def from_hf(config: Mapping[str, Any], _: Mapping[str, Any] | None) -> ModelConfig:
        section = config.get("vision_config") or {}
        if not deepstack and section.get("deepstack_visual_indexes"):
            raise UserError(f"deepstack_visual_indexes of {name} must be empty: its class reads no such features")
        vision = _vision_from_hf(section if deepstack else {**section, "deepstack_visual_indexes": []})
        return qwen_from_hf(name, {**(ids or {}), **config}, decoder.defaults, _TOWER, vision)

    return patch_family(
        name,
        decoder,
        from_hf=from_hf,
        tower=_TOWER,
        defaults={"model_type": decoder.model_type},
        projector=_merger_keys,
        prefixes={"text": "model.language_model.", "vision": "model.visual.", "projector": "model.visual."},
        templates=(TEMPLATE,),
        video=_VIDEO,
        **{"vllm_tpu": "torchax", "runs_in": ("vllm", "mlx"), **fields},
    )


QWEN3_VL = qwen3_vl_family(
    "qwen3_vl",
    Decoder(
        _DECODER,
        "Qwen3VLForConditionalGeneration",
        functools.partial(_text_from_hf, decoder=_DECODER),
        defaults=defaults_of(_DECODER, max_position_embeddings=128000, rope_theta=500000.0),
        gguf=(gguf.QWEN3VL,),
    ),
)

# Qwen3-VL with experts ------------------------------------------------------------------------------------------------

_VL_DECODER = "qwen3_vl_moe_text"


def _vl_from_hf(config: Mapping[str, Any]) -> TextConfig:
    config = with_expert_count(config, 60)
    # the class divides by the sum regardless of norm_topk_prob
    return with_experts(_text_from_hf(config, _VL_DECODER), config, renormalise=True)


def _vl_problem(text: TextConfig) -> str | None:
    """Return why transformers' class does not load these layers, with advice; None if it does."""
    neurons = {layer.channel.neurons for layer in text.layers if isinstance(layer.channel, Experts)}
    if neurons & {text.hidden_size, text.hidden_size / 2}:
        return (
            "it tells transposed experts by their shape, and the neurons of an expert are the hidden size "
            f"({text.hidden_size}) or half of it: keep another number of neurons"
        )
    return experts_problem(text)


QWEN3_VL_MOE = qwen3_vl_family(
    "qwen3_vl_moe",
    Decoder(
        _VL_DECODER,
        "Qwen3VLMoeForConditionalGeneration",
        _vl_from_hf,
        experts_to_hf,
        QWEN_EXPERT_NAMES | expert_names(),
        transposed_layouts(),
        defaults_of(
            _VL_DECODER,
            max_position_embeddings=128000,
            rope_theta=500000.0,
            moe_intermediate_size=1408,
            num_experts_per_tok=4,
        ),
        gguf=(gguf.QWEN3VLMOE,),
        problem=_vl_problem,
    ),
)
