"""Parts that families with a vision tower share: config.json around both sections, recovery settings, `Family`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.io.families.decoders import UNUSED, text_from_hf, text_to_hf
from vlmprune_jax.io.families.shapes import tied_embeddings, vlm_token_ids
from vlmprune_jax.io.families.table import Family, JsonDict, Stock

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


def vlm_from_hf(
    name: str, config: Mapping[str, Any], defaults: JsonDict, *, tied: bool, image_token: int, **fields: Any
) -> ModelConfig:
    """Return the ModelConfig of a transformers config.json with a section `text_config`.

    `defaults` are those of the decoder's section, `tied` and `image_token` those of two fields outside of it; `fields`
    are further fields of ModelConfig.
    """
    section = {**defaults, **(config.get("text_config") or {})}
    shared = tied_embeddings(config, section, default=tied)
    return ModelConfig(
        family=name,
        layout="transformers",
        text=text_from_hf({**section, "tie_word_embeddings": shared}),
        image_token_id=int(config.get("image_token_id", image_token)),
        **{"feature_select": "full", **fields},
        **vlm_token_ids(config, section),
    )


def vlm_to_hf(cfg: ModelConfig, config: JsonDict, defaults: JsonDict) -> JsonDict:
    """Return config.json with its decoder section updated for changed layers; `defaults`: those of the section.

    `tie_word_embeddings` is written to both, since transformers 4 and 5 read it from different places.
    """
    tied = {"tie_word_embeddings": cfg.text.tie_embeddings}
    section = {**defaults, **(config.get("text_config") or {})}
    return {**config, **tied, "text_config": {**text_to_hf(cfg.text, section), **tied}}


def vlm_family(name: str, stock_class: str, *, stock: JsonDict | None = None, **fields: Any) -> Family:
    """Return a family in transformers' layout, with the settings of most; `stock`, `fields`: those of Stock, Family."""
    usual = {
        "model_types": (name,),
        "text_section": "text_config",
        "ignored": UNUSED,
        "recipe": {**RECIPE, "data": {"max_length": 4096}},
        "stock": Stock(stock_class, "AutoModelForImageTextToText", **(stock or {})),
    }
    return Family(name=name, layout="transformers", **{**usual, **fields})
