"""InternVL in both layouts: the hub's InternVLChatModel (Mini-InternVL-Chat-4B-V1-5) and transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.core.config import ModelConfig, ProjectorConfig
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.families.decoders import RECIPE, text_from_hf, vlm_family, vlm_from_hf, vlm_weights
from vlmprune_jax.io.families.fields import check_fields
from vlmprune_jax.io.families.llava import HF_MODULES, NATIVE_PREFIXES, NATIVE_RENAMES, NATIVE_UNUSED
from vlmprune_jax.io.families.shapes import layers_to_hf, token_ids
from vlmprune_jax.io.families.table import Conversion, Family, JsonDict, ProcessorFiles
from vlmprune_jax.io.families.templates import Template, VideoText, role_marks
from vlmprune_jax.io.families.tiles import BICUBIC, TilingConfig
from vlmprune_jax.io.families.towers import (
    PIXELS,
    PROJECTOR_KEYS,
    TOWERS,
    projector_of,
    rescaling,
    square_side,
    vision_from_hf,
    vision_of,
)

_TYPES = ("intern_vit_6b", "internvl_vision")  # of the tower, in the hub's layout and in transformers'
# Epsilon of the projector's layer norm in both layouts (torch's default).
_PROJECTOR_EPS = 1e-5
# The vocabulary ends with <img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>, in this order.
_IMAGE_TOKEN_FROM_END = 7
_TEXT: JsonDict = {"model_type": "qwen2"}  # default of transformers' InternVLConfig
# Defaults of InternVLChatConfig in the hub's remote code.
_TILE_DEFAULTS = {"min_dynamic_patch": 1, "max_dynamic_patch": 6, "use_thumbnail": False, "dynamic_image_size": False}

_PHI3_CHAT = Template(
    name="phi3-chat",
    system="你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。",
    **role_marks("<|{role}|>\n", "<|end|>"),
    image_lead=True,
    image_tokens=("<img>", "<IMG_CONTEXT>", "</img>"),
    video=VideoText("<IMG_CONTEXT>", "Frame{number}: <img><IMG_CONTEXT></img>", joint="\n"),
    padding_mark="<|endoftext|>",
    special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
)
# Models with Qwen2 or Llama: versions 1.5 and 2; then 2.5 and later (reference: InternVL conversation.py, dataset.py).
_HERMES_2 = replace(
    _PHI3_CHAT,
    name="Hermes-2",
    **role_marks("<|im_start|>{role}\n", "<|im_end|>"),
    special=("<|im_start|>", "<|im_end|>"),
)
_INTERNVL2_5 = replace(
    _HERMES_2,
    name="internvl2_5",
    system="你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
    **role_marks("<|im_start|>{role}\n", "<|im_end|>\n"),
    padding_mark=None,
    by_turn=True,
)
# InternVL3 and later in the transformers layout; their chat templates have no system text.
_INTERNVL3 = replace(_INTERNVL2_5, name="internvl3", system="", image_lead=False)
_CHAT_TEMPLATES = (_PHI3_CHAT, _HERMES_2, _INTERNVL2_5)

# Source: InternVL's slurm scripts. They adapt the fused qkv_proj and gate_up_proj and decay every tensor; here each
# projection has its own adapter, and biases and norms do not decay.
_RECIPE: dict[str, Any] = {
    "data": {"max_length": 4096},
    "prune": RECIPE["prune"],
    "recover": {
        **RECIPE["recover"],
        "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.05},
        "losses": {**RECIPE["recover"]["losses"], "teacher_inputs": "own"},
        "learning_rate": 4e-5,
        "projector_learning_rate": None,
        "weight_decay": 0.05,
    },
}


def _projector(config: Mapping[str, Any], version: str) -> ProjectorConfig:
    ratio = float(config.get("downsample_ratio", 0.5))
    factor = round(1 / ratio)
    if factor < 1 or factor * ratio != 1:
        raise UserError(
            f"downsample_ratio {ratio} is not supported: it must be 1 divided by an integer, for example 0.5"
        )
    return ProjectorConfig(
        activation=config.get("projector_hidden_act", "gelu"),
        bias=True,
        kind="pixel_shuffle",
        norm_eps=_PROJECTOR_EPS,
        downsample=factor,
        shuffle_version=version,
    )


def _original_from_hf(config: Mapping[str, Any], _: Mapping[str, Any] | None) -> ModelConfig:
    section = config.get("llm_config") or {}
    text, ids = text_from_hf({"model_type": "llama", **section}), token_ids({**section, **config})
    end = config.get("chat_end_token_id")
    if end is not None and end not in ids["eos_token_ids"]:
        ids["eos_token_ids"] = (*ids["eos_token_ids"], end)
    size = config.get("force_image_size")
    return ModelConfig(
        family="internvl",
        layout="original",
        text=text,
        vision=vision_from_hf(
            config.get("vision_config") or {}, config.get("select_layer", -1), *_TYPES, image_size=size
        ),
        projector=_projector(config, config.get("ps_version", "v1")),
        image_token_id=int(config.get("image_token_id", text.vocab_size - _IMAGE_TOKEN_FROM_END)),
        **ids,
    )


def _native_from_hf(config: Mapping[str, Any], _: Mapping[str, Any] | None) -> ModelConfig:
    select = config.get("vision_feature_select_strategy", "default")
    if select != "default":
        raise UserError(f"InternVL: vision_feature_select_strategy {select!r} is not supported (supported: default)")
    tower = vision_from_hf(config.get("vision_config") or {}, config.get("vision_feature_layer", -1), *reversed(_TYPES))
    parts = {"vision": tower, "projector": _projector(config, "v2"), "feature_select": "patch"}
    return vlm_from_hf("internvl", config, _TEXT, tied=True, image_token=151667, **parts)


def _original_to_hf(cfg: ModelConfig, source: JsonDict) -> JsonDict:
    before = vision_of(_original_from_hf(source, None))
    config = TOWERS["intern_vit_6b"].write(vision_of(cfg), source, before, "select_layer")
    # the hub has no class for unequal widths
    return {**config, "llm_config": layers_to_hf(cfg.text, source.get("llm_config") or {})}


def _tiling(config: Mapping[str, Any], location: str) -> TilingConfig:
    check_fields(config, location)
    fields = {**_TILE_DEFAULTS, **{name: config[name] for name in _TILE_DEFAULTS if config.get(name) is not None}}
    size = config.get("force_image_size") or (config.get("vision_config") or {}).get("image_size")
    dynamic = bool(fields["dynamic_image_size"])
    mean, std = PIXELS["internvit"]
    if size is None:
        raise UserError(f"{location}: force_image_size is None, expected a number: restore it from the model's source")
    numbers = {"min_tiles": "min_dynamic_patch", "max_tiles": "max_dynamic_patch"}
    tiles = {name: fields[field] if dynamic else 1 for name, field in numbers.items()}
    with error_context(location):
        return TilingConfig(
            size=square_side(size, "force_image_size"),
            **tiles,
            thumbnail=dynamic and bool(fields["use_thumbnail"]),
            # the reference pads after tiling, and tiles are square already
            pad=bool(config.get("pad2square")) and not dynamic,
            mean=mean,
            std=std,
            resample=BICUBIC,
            shares=True,
        )


def _processor(cfg: ModelConfig, source: JsonDict, template: Template, new_token: str) -> ProcessorFiles:
    """Return the files of transformers' InternVL processor, which tiles images and adds a thumbnail.

    Raises UserError if the config needs image processing that transformers does not have.
    """
    tiling = _tiling(source, "config.json")
    for field, unsupported in (
        ("use_thumbnail", tiling.max_tiles > 1 and not tiling.thumbnail),
        ("pad2square", tiling.pad),
    ):
        if unsupported:
            raise UserError(
                f"config.json: {field} {json.dumps(source.get(field))} is not supported by transformers' "
                'InternVLProcessor: export with layout="source"'
            )
    vision = vision_of(cfg)
    frames = {
        "video_processor_type": "InternVLVideoProcessor",
        "processor_class": "InternVLProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": BICUBIC,
        **rescaling(vision),
    }
    tiles = {
        **frames,
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": tiling.max_tiles > 1,
        "min_patches": tiling.min_tiles,
        "max_patches": tiling.max_tiles,
    }
    start, context, end = template.image_tokens or ("", "", "")
    tokens = {"start_image_token": start, "end_image_token": end, "context_image_token": context}
    files = {
        "preprocessor_config.json": tiles,
        "video_preprocessor_config.json": frames,
        "processor_config.json": {
            "processor_class": "InternVLProcessor",
            "image_seq_length": cfg.tokens_per_image,
        },
    }
    return ProcessorFiles({**tokens, "video_token": new_token}, context, files)


def _stock_config(cfg: ModelConfig, source: JsonDict) -> JsonDict:
    # "template" is our own field: it selects the prompt template when the export is read
    template = source.get("template") or _CHAT_TEMPLATES[0].name
    return {"downsample_ratio": 1 / projector_of(cfg).downsample, "template": template}


def _lacks(cfg: ModelConfig) -> str | None:
    projector = projector_of(cfg)
    if projector.kind == "pixel_shuffle" and (projector.shuffle_version, projector.norm_eps) == ("v2", _PROJECTOR_EPS):
        return None
    if projector.kind != "pixel_shuffle":
        return f"projector of kind {projector.kind} (pixel shuffle)"
    return f"pixel shuffle {projector.shuffle_version} with layer norm eps {projector.norm_eps:g} (v2 and 1e-05)"


INTERNVL_ORIGINAL = Family(
    name="internvl",
    layout="original",
    model_types=("internvl_chat",),
    from_hf=_original_from_hf,
    text_section="llm_config",
    to_hf=_original_to_hf,
    weights=vlm_weights(
        TOWERS["intern_vit_6b"],
        {"layer_norm": "0", "linear_1": "1", "linear_2": "3"},
        {"text": "language_model.model.", "projector": "mlp1.", "vision": "vision_model."},
    ),
    ignored=(
        *NATIVE_UNUSED,
        r"vision_model\.encoder\.layers\..*",
    ),
    token_names=(
        ("image_token_id", "<IMG_CONTEXT>"),
        ("chat_end_token_id", "<|end|>"),
        ("chat_end_token_id", "<|im_end|>"),
    ),
    templates=_CHAT_TEMPLATES,
    template_field="template",
    images="tiles",
    tiling=_tiling,
    tile_limit="max_dynamic_patch",
    video=VideoConfig("middles", size=(448, 448), mean=PIXELS["internvit"][0], std=PIXELS["internvit"][1]),
    recipe=_RECIPE,
    conversion=Conversion(to="internvl", new_token="<video>", marks_images=False),
)

INTERNVL_HF = vlm_family(
    "internvl",
    "InternVLForConditionalGeneration",
    stock={"image_token": "image_token_id", "config": _stock_config, "lacks": _lacks, "processor": _processor},
    from_hf=_native_from_hf,
    tower=TOWERS["internvl_vision"],
    feature_layer="vision_feature_layer",
    defaults=_TEXT,
    projector=PROJECTOR_KEYS,
    prefixes=NATIVE_PREFIXES,
    modules=HF_MODULES,
    renames=NATIVE_RENAMES,
    ignored=(
        *NATIVE_UNUSED,
        r"vision_tower\.(embeddings\.mask_token|encoder\.layer\..*)",
    ),
    templates=(_INTERNVL3, *_CHAT_TEMPLATES),
    template_field="template",
    image_processors=("GotOcr2",),
    images="tiles",
    video=VideoConfig("middles", size=(384, 384), mean=PIXELS["clip"][0], std=PIXELS["clip"][1]),
    recipe=_RECIPE,
    runs_in=("vllm", "mlx"),
)
