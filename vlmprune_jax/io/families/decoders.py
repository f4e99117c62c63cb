"""Decoders of all families, alone and as the section of a vision-language model's config.json; settings of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vlmprune_jax.base.checks import check_returned
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.io.families.shapes import for_both_versions, tied_embeddings, token_ids
from vlmprune_jax.io.families.table import FAMILIES, Decoder, Family, JsonDict, Stock, Weight, part_weights
from vlmprune_jax.io.families.towers import Tower, vision_of

Names = Mapping[str, str]
# Keys of tensors that no forward pass uses: also a tied output head that is stored in the file anyway.
UNUSED = (r".*\.rotary_emb\.inv_freq", r"lm_head\.weight")

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


def decoder_of(model_type: str) -> Decoder:
    """Return the decoder declaration for a config's `model_type`.

    Raises UserError if the decoder is unknown; the message lists the known ones.
    """
    decoders = {f.decoder.model_type: f.decoder for f in FAMILIES.values() if f.decoder is not None}
    if model_type not in decoders:
        raise UserError(f"decoder {model_type!r} is not supported (supported: {', '.join(decoders)})")
    return decoders[model_type]


def text_from_hf(config: Mapping[str, Any]) -> TextConfig:
    """Return the TextConfig of a decoder's config dictionary; absent fields get transformers' defaults."""
    return _read(decoder_of(config.get("model_type", "llama")), config)


def text_weights(text: TextConfig, prefix: str = "model.") -> list[Weight]:
    """Return the decoder's weight table; its keys begin with `prefix` ("x.model.": the output head is x.lm_head)."""
    decoder, head = decoder_of(text.decoder), "lm_head"
    if prefix.endswith(".model."):
        head = prefix.removesuffix("model.") + head
    table = part_weights("text", prefix, decoder.names, decoder.layouts)
    return [dataclasses.replace(line, key=head) if line.path == "text/lm_head" else line for line in table]


def _read(decoder: Decoder, config: Mapping[str, Any]) -> TextConfig:
    text = decoder.from_hf({**decoder.defaults, **config})
    check_returned(decoder.from_hf, text, isinstance(text, TextConfig), "a core.config.TextConfig")
    return text


def decoder_family(decoder: Decoder) -> Family:
    """Return a family for a decoder without vision tower, in the transformers layout."""

    def from_hf(config: Mapping[str, Any], _: Mapping[str, Any] | None) -> ModelConfig:
        text = dataclasses.replace(_read(decoder, config), head_bias=decoder.head_bias)
        return ModelConfig(family=decoder.model_type, layout="transformers", text=text, **token_ids(config))

    return Family(
        name=decoder.model_type,
        layout="transformers",
        model_types=(decoder.model_type,),
        from_hf=from_hf,
        to_hf=lambda cfg, source: for_both_versions(decoder.to_hf(cfg.text, source)),
        weights=lambda cfg: text_weights(cfg.text),
        ignored=UNUSED,
        decoder=decoder,
        stock=Stock(decoder.stock_class, "AutoModelForCausalLM"),
        vllm_tpu=decoder.vllm_tpu,
        runs_in=decoder.runs_in,
    )


def vlm_from_hf(
    name: str, config: Mapping[str, Any], defaults: JsonDict, *, tied: bool, image_token: int, **fields: Any
) -> ModelConfig:
    """Return the ModelConfig of a transformers config.json with a section `text_config`.

    `defaults` are those of the decoder's section, `tied` and `image_token` those of two fields outside of it; `fields`
    are further fields of ModelConfig.
    """
    section = {**defaults, **(config.get("text_config") or {})}
    shared = tied_embeddings(config, section, default=tied)
    outer_ids = {name: value for name, value in config.items() if name.endswith("token_id") and value is not None}
    return ModelConfig(
        family=name,
        layout="transformers",
        text=text_from_hf({**section, "tie_word_embeddings": shared}),
        image_token_id=int(config.get("image_token_id", image_token)),
        **{"feature_select": "full", **fields},
        **token_ids({**section, **outer_ids}),
    )


def vlm_to_hf(cfg: ModelConfig, config: JsonDict, defaults: JsonDict) -> JsonDict:
    """Return config.json with its decoder section updated for changed layers; `defaults`: those of the section.

    `tie_word_embeddings` is written to both, since transformers 4 and 5 read it from different places.
    """
    tied = {"tie_word_embeddings": cfg.text.tie_embeddings}
    section = {**defaults, **(config.get("text_config") or {})}
    written = for_both_versions(decoder_of(cfg.text.decoder).to_hf(cfg.text, section))
    return {**config, **tied, "text_config": {**written, **tied}}


def vlm_weights(
    tower: Tower, projector: Names | Callable[[ModelConfig], Names], prefixes: Mapping[str, str]
) -> Callable[[ModelConfig], list[Weight]]:
    """Return a family's `weights`: `projector` has names or returns them, `prefixes` has the parts in file order."""

    def weights(cfg: ModelConfig) -> list[Weight]:
        names = projector(cfg) if callable(projector) else projector
        tables = {
            "text": text_weights(cfg.text, prefixes["text"]),
            "projector": part_weights("projector", prefixes["projector"], names),
            "vision": tower.weights(prefixes["vision"]),
        }
        return [line for part in prefixes for line in tables[part]]

    return weights


def vlm_family(
    name: str,
    stock_class: str,
    *,
    from_hf: Callable[[Mapping[str, Any], Mapping[str, Any] | None], ModelConfig],
    tower: Tower,
    projector: Names | Callable[[ModelConfig], Names],
    prefixes: Mapping[str, str],
    stock: JsonDict | None = None,
    feature_layer: str | None = None,
    defaults: JsonDict | None = None,
    **fields: Any,
) -> Family:
    """Return a family in transformers' layout, with the settings of most; `stock`, `fields`: those of Stock, Family.

    `tower`, `projector` and `prefixes` are as in `vlm_weights`; `feature_layer` and `defaults` are for families without
    `to_hf`, see `Tower.write` and `vlm_to_hf`.
    """

    def to_hf(cfg: ModelConfig, source: JsonDict) -> JsonDict:
        written = tower.write(vision_of(cfg), source, vision_of(from_hf(source, None)), feature_layer)
        return vlm_to_hf(cfg, written, defaults or {})

    usual = {
        "from_hf": from_hf,
        "to_hf": to_hf,
        "weights": vlm_weights(tower, projector, prefixes),
        "model_types": (name,),
        "text_section": "text_config",
        "ignored": UNUSED,
        "recipe": {**RECIPE, "data": {"max_length": 4096}},
        "stock": Stock(stock_class, "AutoModelForImageTextToText", **(stock or {})),
    }
    return Family(name=name, layout="transformers", **{**usual, **fields})
