"""LLaVA in both layouts (LlavaForConditionalGeneration, LlavaLlamaForCausalLM), and Bunny (SigLIP, Phi-2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig, ProjectorConfig, VisionConfig
from vlmprune_jax.io.families.decoders import RECIPE, UNUSED, text_from_hf, vlm_family, vlm_from_hf, vlm_weights
from vlmprune_jax.io.families.shapes import layers_to_hf, token_ids
from vlmprune_jax.io.families.table import Conversion, Family, JsonDict, ProcessorFiles
from vlmprune_jax.io.families.templates import LLAVA_V1, Template
from vlmprune_jax.io.families.tiles import BICUBIC
from vlmprune_jax.io.families.towers import (
    PIXELS,
    PROJECTOR_KEYS,
    TOWERS,
    projector_of,
    rescaling,
    vision_from_hf,
    vision_of,
)

_TOWER = TOWERS["clip_vision_model"]  # SigLIP's weights have the same names
# The original code's sentinel for an image in input_ids (LLaVA constants.py); it is never embedded.
ORIGINAL_IMAGE_TOKEN = -200

# Bunny's code computes all blocks but the last, whatever the config says (siglip_encoder.py).
_BUNNY_LAYER = -2
# Bunny's config.json has only the tower's name and width; these are the sizes of the tower of Bunny-v1.0 on the hub.
_HUB_TOWER = "siglip-so400m-patch14-384"
_HUB_TOWER_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "image_size": 384,
    "patch_size": 14,
}
NATIVE_PREFIXES = {"text": "language_model.model.", "projector": "multi_modal_projector.", "vision": "vision_tower."}
# Key spellings in transformers: in-memory names since 4.52.
NATIVE_RENAMES = (
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
NATIVE_UNUSED = (UNUSED[0], r"language_model\.lm_head\.weight")
# Keys of the tower inside an original checkpoint, or in its own folder (spellings of transformers 4 and 5).
TOWER_RENAMES = (
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"^vision_model\.", "vision_tower."),
    (r"^(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.", r"vision_tower.\1."),
)
# Tensors above the feature layer, and the other parts of a CLIP or SigLIP model.
UNUSED_VISION = (
    r"vision_tower\.(vision_model\.)?((post_layernorm|head)\..*|embeddings\.position_ids|encoder\.layers\..*)"
)
OTHER_TOWERS = r"(text_model|text_projection|visual_projection)\..*|logit_scale|logit_bias"


def _hf_from_hf(config: Mapping[str, Any], _: Mapping[str, Any] | None) -> ModelConfig:
    section = config.get("text_config") or {}
    # transformers 5 ties if either flag is set, 4 if the decoder's flag is set (and 4 never writes the outer default)
    tied = {"tie_word_embeddings": bool(config.get("tie_word_embeddings") or section.get("tie_word_embeddings"))}
    select = config.get("vision_feature_select_strategy", "default")
    one_of("vision_feature_select_strategy", select, ("default", "full"))
    layer = config.get("vision_feature_layer", -2)
    tower = vision_from_hf(config.get("vision_config") or {}, layer, "clip_vision_model", "siglip_vision_model")
    projector = ProjectorConfig(
        activation=config.get("projector_hidden_act", "gelu"), bias=bool(config.get("multimodal_projector_bias", True))
    )
    parts = {"vision": tower, "projector": projector, "feature_select": "patch" if select == "default" else "full"}
    config = {**config, **tied, "text_config": {**section, **tied}}
    return vlm_from_hf("llava", config, {}, tied=False, image_token=config.get("image_token_index", 32000), **parts)


def _original(
    family: str, config: Mapping[str, Any], projector: str, decoder: str, vision: VisionConfig, select: str
) -> ModelConfig:
    kind = config.get("mm_projector_type", projector)
    if kind != "mlp2x_gelu":
        raise UserError(f"mm_projector_type {kind!r} is not supported (supported: mlp2x_gelu)")
    return ModelConfig(
        family=family,
        layout="original",
        text=text_from_hf({**config, "model_type": decoder}),
        vision=vision,
        projector=ProjectorConfig(activation="gelu", bias=True),
        image_token_id=ORIGINAL_IMAGE_TOKEN,
        feature_select=select,
        **token_ids(config),
    )


def _original_from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
    if vision is None:
        raise UserError(
            f"LLaVA: the vision tower {config.get('mm_vision_tower')!r} is not in this folder: set vision_dir "
            "(--config.model.vision_dir) to the tower's folder"
        )
    select = one_of("mm_vision_select_feature", config.get("mm_vision_select_feature", "patch"), ("patch", "cls_patch"))
    tower = vision_from_hf(vision, config.get("mm_vision_select_layer", -2), "clip_vision_model")
    # Vicuna's ids, the defaults of LlamaConfig
    config = {"bos_token_id": 1, "eos_token_id": 2, **config}
    return _original("llava", config, "linear", "llama", tower, "patch" if select == "patch" else "full")


def _bunny_from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
    name, width = str(config.get("mm_vision_tower", "")), config.get("mm_hidden_size")
    if vision is None and name.rstrip("/").endswith(_HUB_TOWER) and width == _HUB_TOWER_CONFIG["hidden_size"]:
        vision = _HUB_TOWER_CONFIG
    if vision is None:
        raise UserError(
            f"Bunny: config.json names the vision tower {name!r} (width {width}) but not its sizes: "
            "set vision_dir (--config.model.vision_dir) to the tower's folder"
        )
    if config.get("use_s2"):
        raise UserError("Bunny with use_s2 (several image scales, Bunny-v1.1) is not supported")
    tower = vision_from_hf(vision, _BUNNY_LAYER, "siglip_vision_model")
    if width not in (None, tower.hidden_size):
        raise UserError(f"mm_hidden_size is {width} but the vision tower {name!r} has width {tower.hidden_size}")
    return _original("bunny", config, "mlp2x_gelu", "phi", tower, "full")


def _original_to_hf(cfg: ModelConfig, source: JsonDict) -> JsonDict:
    """Return the decoder's part of config.json; raise UserError if the tower, which has its own folder, was pruned."""
    vision = vision_of(cfg)
    layer = _BUNNY_LAYER if cfg.family == "bunny" else source.get("mm_vision_select_layer", -2)
    used = layer if layer >= 0 else vision.n_layers_total + 1 + layer
    if len(vision.layers) != used or not vision.whole_heads:
        raise UserError(
            'the vision tower was pruned, but this layout does not contain the tower: export with layout="transformers"'
        )
    return layers_to_hf(cfg.text, source)  # the original layout has no class for unequal widths


def _bunny_pixels(size: int) -> JsonDict:
    """Return Bunny's image processor settings, which its hub code has as constants instead of a file."""
    mean, std = PIXELS["siglip"]
    side = {"height": size, "width": size}
    return {"image_processor_type": "SiglipImageProcessor", "size": side, "image_mean": mean, "image_std": std}


def _processor(cfg: ModelConfig, source: JsonDict, template: Template, new_token: str) -> ProcessorFiles:
    del template
    vision = vision_of(cfg)
    side = {"height": vision.image_size, "width": vision.image_size}
    crops = vision.kind == "clip"
    images = {
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_pad": source.get("image_aspect_ratio") == "pad",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": vision.image_size} if crops else side,
        "resample": BICUBIC,
        "do_center_crop": crops,
        "crop_size": side,
        **rescaling(vision),
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.class_token),
        "vision_feature_select_strategy": "default" if cfg.feature_select == "patch" else "full",
        "image_token": new_token,
    }
    files = {"preprocessor_config.json": images, "processor_config.json": processor}
    return ProcessorFiles({"image_token": new_token}, new_token, files)


# Tensor names -> names of modules in memory, in transformers' vision-language classes since 4.52.
HF_MODULES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)


def _engine_problem(engine: str, cfg: ModelConfig) -> str | None:
    if engine == "mlx" and cfg.text.decoder not in ("llama", "qwen2"):
        return f"mlx-vlm's LLaVA has no {cfg.text.decoder} decoder (only llama, qwen2): serve it with another engine"
    return None


# The hub's spelling, which every version of transformers, vLLM and mlx-vlm load; 5.24 saves the tower in another one.
LLAVA_HF = vlm_family(
    "llava",
    "LlavaForConditionalGeneration",
    stock={
        "image_token": "image_token_index",
        "config": lambda cfg, source: {"multimodal_projector_bias": projector_of(cfg).bias},
        "lacks": lambda cfg: "pixel shuffle" if projector_of(cfg).shuffles else None,
        "processor": _processor,
    },
    matches=lambda config: "vision_config" in config and "mm_vision_tower" not in config,
    from_hf=_hf_from_hf,
    tower=_TOWER,
    feature_layer="vision_feature_layer",
    projector=PROJECTOR_KEYS,
    prefixes=NATIVE_PREFIXES | {"vision": "vision_tower.vision_model."},
    modules=HF_MODULES,
    renames=(*NATIVE_RENAMES, (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.")),
    respells=True,
    ignored=(*NATIVE_UNUSED, UNUSED_VISION),
    image_processors=("CLIP", "Siglip", "Llava"),
    recipe=RECIPE,
    runs_in=("vllm", "mlx", "openvino"),
    derives_head_dim=("mlx",),
    engine_problem=_engine_problem,
)

LLAVA_ORIGINAL = Family(
    name="llava",
    layout="original",
    model_types=("llava", "llava_llama"),
    matches=lambda config: "mm_vision_tower" in config,
    from_hf=_original_from_hf,
    to_hf=_original_to_hf,
    weights=vlm_weights(
        _TOWER,
        {"linear_1": "0", "linear_2": "2"},
        {"text": "model.", "projector": "model.mm_projector.", "vision": "vision_tower."},
    ),
    renames=TOWER_RENAMES,
    ignored=(*UNUSED, UNUSED_VISION, OTHER_TOWERS),
    separate_vision=True,
    holds_tower=False,
    recipe=RECIPE,
    conversion=Conversion(to="llava", new_token="<image>", marks_images=True),
)

_BUNNY_TEMPLATE = dataclasses.replace(LLAVA_V1, name="bunny", assistant_end="<|endoftext|>")
BUNNY = dataclasses.replace(
    LLAVA_ORIGINAL,
    name="bunny",
    model_types=("bunny-phi",),
    matches=lambda config: True,
    from_hf=_bunny_from_hf,
    holds_tower=True,
    templates=(_BUNNY_TEMPLATE,),
    recipe={**RECIPE, "data": {**RECIPE["data"], "template": _BUNNY_TEMPLATE.name}},
    pixels=_bunny_pixels,
)
