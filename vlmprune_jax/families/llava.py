"""LLaVA-1.5 in both layouts: `llava-hf` (LlavaForConditionalGeneration) and the original LlavaLlamaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.config import ModelConfig, ProjectorConfig, VisionConfig
from vlmprune_jax.errors import UserError
from vlmprune_jax.families.llama import TEXT_MODEL_TYPES, text_from_hf, text_to_hf, text_weights, token_ids
from vlmprune_jax.families.table import Family, JsonDict, Weight

# The original code's sentinel for an image in input_ids (LLaVA constants.py); it is never embedded.
ORIGINAL_IMAGE_TOKEN = -200


def vision_from_hf(config: Mapping[str, Any], feature_layer: int) -> VisionConfig:
    """VisionConfig of a CLIPVisionConfig dictionary (or a whole CLIPConfig), computing only up to `feature_layer`."""
    config = config.get("vision_config", config)
    if config.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise UserError(
            f"vision tower of type {config['model_type']!r} is not supported (supported: clip_vision_model)"
        )
    total = int(config.get("num_hidden_layers", 12))
    used = feature_layer if feature_layer >= 0 else total + 1 + feature_layer
    if not 0 < used <= total:
        raise UserError(f"vision feature layer {feature_layer} does not exist in a tower of {total} layers")
    return VisionConfig(
        hidden_size=int(config.get("hidden_size", 768)),
        mlp=int(config.get("intermediate_size", 3072)),
        heads=int(config.get("num_attention_heads", 12)),
        n_layers=used,
        n_layers_total=total,
        image_size=int(config.get("image_size", 224)),
        patch_size=int(config.get("patch_size", 32)),
        channels=int(config.get("num_channels", 3)),
        norm_eps=float(config.get("layer_norm_eps", 1e-5)),
        activation=config.get("hidden_act", "quick_gelu"),
    )


def vision_weights(vision: VisionConfig, prefix: str) -> list[Weight]:
    """Weight lines of a CLIP tower's computed part under key `prefix`."""
    layer, key = "vision/layers/{i}", prefix + "encoder.layers.{i}"
    table = [
        Weight("vision/class_embedding/weight", prefix + "embeddings.class_embedding", "vision"),
        Weight(
            "vision/patch_embedding/weight",
            prefix + "embeddings.patch_embedding.weight",
            "vision channel patch_row patch_column",
        ),
        Weight("vision/position_embedding/weight", prefix + "embeddings.position_embedding.weight", "position vision"),
    ]
    for part in ("weight", "bias"):
        table.append(Weight(f"vision/pre_layrnorm/{part}", f"{prefix}pre_layrnorm.{part}", "vision"))
        for name in ("layer_norm1", "layer_norm2"):
            table.append(Weight(f"{layer}/{name}/{part}", f"{key}.{name}.{part}", "vision"))
    for name in ("q_proj", "k_proj", "v_proj"):
        path, source = f"{layer}/self_attn/{name}", f"{key}.self_attn.{name}"
        table.append(Weight(f"{path}/weight", f"{source}.weight", "(vision_heads vision_head) vision"))
        table.append(Weight(f"{path}/bias", f"{source}.bias", "(vision_heads vision_head)"))
    table += [
        Weight(
            f"{layer}/self_attn/out_proj/weight",
            f"{key}.self_attn.out_proj.weight",
            "vision (vision_heads vision_head)",
        ),
        Weight(f"{layer}/self_attn/out_proj/bias", f"{key}.self_attn.out_proj.bias", "vision"),
        Weight(f"{layer}/mlp/fc1/weight", f"{key}.mlp.fc1.weight", "vision_mlp vision"),
        Weight(f"{layer}/mlp/fc1/bias", f"{key}.mlp.fc1.bias", "vision_mlp"),
        Weight(f"{layer}/mlp/fc2/weight", f"{key}.mlp.fc2.weight", "vision vision_mlp"),
        Weight(f"{layer}/mlp/fc2/bias", f"{key}.mlp.fc2.bias", "vision"),
    ]
    return table


def projector_weights(projector: ProjectorConfig, prefix: str, first: str, second: str) -> list[Weight]:
    """Weight lines of the two-layer projector."""
    parts = ("weight", "bias") if projector.bias else ("weight",)
    table = []
    for name, key, layout in (("linear_1", first, "projector vision"), ("linear_2", second, "embed projector")):
        for part in parts:
            table.append(
                Weight(
                    f"projector/{name}/{part}",
                    f"{prefix}{key}.{part}",
                    layout if part == "weight" else layout.split()[0],
                )
            )
    return table


def _hf_from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
    del vision
    text = dict(config.get("text_config") or {})
    if text.get("model_type", "llama") not in TEXT_MODEL_TYPES:
        raise UserError(
            f"LLaVA with a {text['model_type']!r} decoder is not supported (supported: {', '.join(TEXT_MODEL_TYPES)})"
        )
    # The outer flag decides in transformers (LlavaConfig ties nothing by default).
    text["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    select = config.get("vision_feature_select_strategy", "default")
    if select not in ("default", "full"):
        raise UserError(f"vision_feature_select_strategy {select!r} is not one of default, full")
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise UserError(f"vision_feature_layer {layer!r}: several feature layers are not supported, use one integer")
    ids = token_ids({**text, **{k: v for k, v in config.items() if k.endswith("token_id") and v is not None}})
    return ModelConfig(
        family="llava",
        layout="transformers",
        text=text_from_hf(text),
        vision=vision_from_hf(config.get("vision_config") or {}, layer),
        projector=ProjectorConfig(
            activation=config.get("projector_hidden_act", "gelu"),
            bias=bool(config.get("multimodal_projector_bias", True)),
        ),
        image_token_id=int(config.get("image_token_id", config.get("image_token_index", 32000))),
        feature_select="patch" if select == "default" else "full",
        **ids,
    )


def _hf_to_hf(cfg: ModelConfig, source: JsonDict) -> JsonDict:
    config = dict(source)
    # transformers fills what text_config leaves out with LlamaConfig's defaults, so absent fields must stay meaningful.
    config["text_config"] = text_to_hf(cfg.text, dict(source.get("text_config") or {}))
    return config


def _original_from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
    if vision is None:
        raise UserError(
            f"this LLaVA folder names its vision tower {config.get('mm_vision_tower')!r} but does not hold it: "
            "pass the tower's own folder as vision_dir (--config.model.vision_dir)"
        )
    kind = config.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise UserError(f"mm_projector_type {kind!r} is not supported (supported: mlp2x_gelu)")
    select = config.get("mm_vision_select_feature", "patch")
    if select not in ("patch", "cls_patch"):
        raise UserError(f"mm_vision_select_feature {select!r} is not one of patch, cls_patch")
    return ModelConfig(
        family="llava",
        layout="original",
        text=text_from_hf({**config, "model_type": "llama"}),
        vision=vision_from_hf(vision, int(config.get("mm_vision_select_layer", -2))),
        projector=ProjectorConfig(activation="gelu", bias=True),
        image_token_id=ORIGINAL_IMAGE_TOKEN,
        feature_select="patch" if select == "patch" else "full",
        # Vicuna's ids, which LlamaConfig supplies when the file leaves them out.
        **token_ids({"bos_token_id": 1, "eos_token_id": 2, **config}),
    )


def _original_to_hf(cfg: ModelConfig, source: JsonDict) -> JsonDict:
    # The original classes keep their own model_type, whatever the head count (they never check divisibility).
    return {
        **text_to_hf(cfg.text, source),
        "model_type": source["model_type"],
        "architectures": source.get("architectures"),
    }


# Tensor names -> names of modules in memory, of transformers' vision-language classes since 4.52.
HF_MODULES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
)

LLAVA_HF = Family(
    name="llava",
    layout="transformers",
    matches=lambda config: (
        config.get("model_type") == "llava" and "vision_config" in config and "mm_vision_tower" not in config
    ),
    from_hf=_hf_from_hf,
    to_hf=_hf_to_hf,
    weights=lambda cfg: (
        text_weights(cfg.text, "language_model.model.", "language_model.lm_head.weight")
        + projector_weights(_projector(cfg), "multi_modal_projector.", "linear_1", "linear_2")
        + vision_weights(_vision(cfg), "vision_tower.")
    ),
    renames=(
        # in-memory names of transformers >= 4.52, then the optional vision_model segment of transformers 4
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^vision_tower\.vision_model\.", "vision_tower."),
    ),
    ignored=(
        r".*\.rotary_emb\.inv_freq",
        r"language_model\.lm_head\.weight",
        r"vision_tower\.(post_layernorm\..*|embeddings\.position_ids|encoder\.layers\..*)",
    ),
    modules=HF_MODULES,
)

LLAVA_ORIGINAL = Family(
    name="llava",
    layout="original",
    matches=lambda config: config.get("model_type") in ("llava", "llava_llama") and "mm_vision_tower" in config,
    from_hf=_original_from_hf,
    to_hf=_original_to_hf,
    weights=lambda cfg: (
        text_weights(cfg.text, "model.", "lm_head.weight")
        + projector_weights(_projector(cfg), "model.mm_projector.", "0", "2")
        + vision_weights(_vision(cfg), "vision_tower.")
    ),
    renames=(
        # the tower inside the LLaVA checkpoint, or (transformers 4 | 5 names) in its own CLIP folder
        (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "vision_tower."),
        (r"^vision_model\.", "vision_tower."),
        (r"^(embeddings|encoder|pre_layrnorm|post_layernorm)\.", r"vision_tower.\1."),
    ),
    ignored=(
        r".*\.rotary_emb\.inv_freq",
        r"lm_head\.weight",
        r"vision_tower\.(post_layernorm\..*|embeddings\.position_ids|encoder\.layers\..*)",
        r"(text_model|text_projection|visual_projection)\..*|logit_scale",
    ),
    separate_vision=True,
)


def _projector(cfg: ModelConfig) -> ProjectorConfig:
    assert cfg.projector is not None
    return cfg.projector


def _vision(cfg: ModelConfig) -> VisionConfig:
    assert cfg.vision is not None
    return cfg.vision
