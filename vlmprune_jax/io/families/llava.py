"""LLaVA in both layouts: transformers' LlavaForConditionalGeneration and the original LlavaLlamaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.projector import ProjectorConfig
from vlmprune_jax.io.families.decoders import text_from_hf, text_weights, vlm_text_to_hf
from vlmprune_jax.io.families.shapes import layers_to_hf, token_ids, vlm_token_ids
from vlmprune_jax.io.families.table import Conversion, Family, JsonDict, ProcessorFiles, Stock
from vlmprune_jax.io.families.templates import Template
from vlmprune_jax.io.families.tiles import BICUBIC
from vlmprune_jax.io.families.towers import (
    PIXELS,
    check_unpruned,
    projector_of,
    projector_weights,
    vision_from_hf,
    vision_of,
    vision_to_hf,
    vision_weights,
)

# The original code's sentinel for an image in input_ids (LLaVA constants.py); it is never embedded.
ORIGINAL_IMAGE_TOKEN = -200

# The reference's recovery as a partial experiment: fine-tunes adapters and projector with hidden-state distillation.
# Source: VLM/llava/train/train_pruned.py (for Bunny: VLM/bunny/train/train_pruned.py). Its command line is not
# published, so learning rates, batch size, schedule and adapters are those of LLaVA's own LoRA script.
RECIPE: dict[str, Any] = {
    "data": {"max_length": 2048, "template": "llava_v1", "aspect_ratio": "pad"},
    "prune": {"heads": "proportional"},
    "recover": {
        "name": "sft_l2",
        "trainable": "lora",
        "lora": {"rank": 128, "alpha": 256.0, "dropout": 0.05},
        "losses": {"ce": 0.5, "l2": 0.5, "l2_layers": (-1,), "teacher_inputs": "student"},
        "learning_rate": 2e-4,
        "projector_learning_rate": 2e-5,
        "weight_decay": 0.0,
        "schedule": "cosine",
        "warmup_ratio": 0.03,
        "epochs": 1.0,
        "batch_size": 128,
        "compute_dtype": "bfloat16",
        "remat": "full",
    },
}

# Key spellings in transformers: in-memory names since 4.52.
NATIVE_RENAMES = (
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
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


def _hf_from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
    del vision
    text = dict(config.get("text_config") or {})
    # transformers 5 ties if either flag is set, 4 if the decoder's flag is set (and 4 never writes the outer default)
    text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    select = config.get("vision_feature_select_strategy", "default")
    if select not in ("default", "full"):
        raise UserError(f"vision_feature_select_strategy {select!r} is not one of default, full")
    layer = config.get("vision_feature_layer", -2)
    tower = vision_from_hf(config.get("vision_config") or {}, layer, "clip_vision_model")
    if tower.kind not in ("clip", "siglip"):
        raise UserError(
            f"LLaVA with a {tower.kind} vision tower is not supported (supported: clip_vision_model, "
            "siglip_vision_model)"
        )
    return ModelConfig(
        family="llava",
        layout="transformers",
        text=text_from_hf(text),
        vision=tower,
        projector=ProjectorConfig(
            activation=config.get("projector_hidden_act", "gelu"),
            bias=bool(config.get("multimodal_projector_bias", True)),
        ),
        image_token_id=int(config.get("image_token_id", config.get("image_token_index", 32000))),
        feature_select="patch" if select == "default" else "full",
        **vlm_token_ids(config, text),
    )


def _hf_to_hf(cfg: ModelConfig, source: JsonDict) -> JsonDict:
    config = dict(vision_to_hf(vision_of(cfg), source, "clip_vision_model", ("vision_feature_layer", -2)))
    return vlm_text_to_hf(cfg.text, config, dict(source.get("text_config") or {}))


def _original_from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
    if vision is None:
        raise UserError(
            f"LLaVA: the vision tower {config.get('mm_vision_tower')!r} is not in this folder: set vision_dir "
            "(--config.model.vision_dir) to the tower's folder"
        )
    kind = config.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise UserError(f"mm_projector_type {kind!r} is not supported (supported: mlp2x_gelu)")
    select = config.get("mm_vision_select_feature", "patch")
    if select not in ("patch", "cls_patch"):
        raise UserError(f"mm_vision_select_feature {select!r} is not one of patch, cls_patch")
    tower = vision_from_hf(vision, config.get("mm_vision_select_layer", -2), "clip_vision_model")
    if tower.kind != "clip":
        raise UserError(f"LLaVA in original layout with a {tower.kind} vision tower is not supported (supported: CLIP)")
    return ModelConfig(
        family="llava",
        layout="original",
        text=text_from_hf({**config, "model_type": "llama"}),
        vision=tower,
        projector=ProjectorConfig(activation="gelu", bias=True),
        image_token_id=ORIGINAL_IMAGE_TOKEN,
        feature_select="patch" if select == "patch" else "full",
        # Vicuna's ids, the defaults of LlamaConfig
        **token_ids({"bos_token_id": 1, "eos_token_id": 2, **config}),
    )


def _processor(cfg: ModelConfig, source: JsonDict, template: Template, new_token: str) -> ProcessorFiles:
    """Return the files of transformers' LLaVA processor, which may pad images to a square before resizing."""
    del template
    vision = vision_of(cfg)
    mean, std = PIXELS[vision.kind]
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
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
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


def _original_to_hf(cfg: ModelConfig, source: JsonDict) -> JsonDict:
    check_unpruned(vision_of(cfg), source.get("mm_vision_select_layer", -2))
    return layers_to_hf(cfg.text, source)  # the original layout has no class for unequal widths


# The hub's spelling, which every version of transformers, vLLM and mlx-vlm load; 5.24 saves the tower in another one.
LLAVA_HF = Family(
    name="llava",
    layout="transformers",
    model_types=("llava",),
    matches=lambda config: "vision_config" in config and "mm_vision_tower" not in config,
    from_hf=_hf_from_hf,
    to_hf=_hf_to_hf,
    text_section="text_config",
    weights=lambda cfg: (
        text_weights(cfg.text, "language_model.model.", "language_model.lm_head.weight")
        + projector_weights(projector_of(cfg), "multi_modal_projector.", ("linear_1", "linear_2"))
        + vision_weights(vision_of(cfg), "vision_tower.vision_model.")
    ),
    modules=HF_MODULES,
    renames=(*NATIVE_RENAMES, (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.")),
    respells=True,
    ignored=(r".*\.rotary_emb\.inv_freq", r"language_model\.lm_head\.weight", UNUSED_VISION),
    image_processors=("CLIP", "Siglip", "Llava"),
    recipe=RECIPE,
    runs_in=("vllm", "mlx", "openvino"),
    tried={"vllm": "", "mlx": "", "openvino": ""},
    derives_head_dim=("mlx",),
    engine_problem=_engine_problem,
    stock=Stock(
        "LlavaForConditionalGeneration",
        "AutoModelForImageTextToText",
        image_token="image_token_index",
        config=lambda cfg, source: {"multimodal_projector_bias": projector_of(cfg).bias},
        lacks=lambda cfg: "pixel shuffle" if projector_of(cfg).shuffles else None,
        processor=_processor,
    ),
)

LLAVA_ORIGINAL = Family(
    name="llava",
    layout="original",
    model_types=("llava", "llava_llama"),
    matches=lambda config: "mm_vision_tower" in config,
    from_hf=_original_from_hf,
    to_hf=_original_to_hf,
    weights=lambda cfg: (
        text_weights(cfg.text, "model.", "lm_head.weight")
        + projector_weights(projector_of(cfg), "model.mm_projector.", ("0", "2"))
        + vision_weights(vision_of(cfg), "vision_tower.")
    ),
    renames=TOWER_RENAMES,
    ignored=(r".*\.rotary_emb\.inv_freq", r"lm_head\.weight", UNUSED_VISION, OTHER_TOWERS),
    separate_vision=True,
    holds_tower=False,
    recipe=RECIPE,
    conversion=Conversion(to="llava", new_token="<image>", marks_images=True),
)
