"""Conversion of configs and vocabularies from hub layouts to transformers layouts (each family's `conversion`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.io.families import family_of, target_of
from vlmprune_jax.io.families.table import JsonDict
from vlmprune_jax.io.families.towers import projector_of, stock_tower, vision_of

# New vocabularies are padded to a multiple, as llava-hf does (32,002 words in 32,064 rows).
VOCAB_MULTIPLE = 64
# Fields of hub configs that a text_config does not have.
_NOT_TEXT = re.compile(
    r"(mm|tune|freeze|unfreeze|image|tokenizer|use_mm|use_im|use_s2)_.*|.*_projector.*|_.*|architectures|auto_map|"
    r"model_type|attn_implementation|transformers_version|(torch_)?dtype|max_length|pretraining_tp|s2_.*|continuous_.*|"
    r"vision_config|per_layer_shapes|vocab_size|tie_word_embeddings"
)


def rows_for(cfg: ModelConfig, ids: Mapping[str, int]) -> int:
    """Return the number of vocabulary rows that an export needs, including those of new special tokens."""
    needed = max((cfg.text.vocab_size, *(token + 1 for token in ids.values())))
    if needed > 2 * cfg.text.vocab_size + VOCAB_MULTIPLE:
        raise UserError(
            f"the tokenizer has token id {needed - 2:,}, but the model has {cfg.text.vocab_size:,} tokens: use "
            "the tokenizer of this model"
        )
    return cfg.text.vocab_size if needed == cfg.text.vocab_size else -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def to_transformers(cfg: ModelConfig, source: JsonDict, image_token_id: int, vocab_size: int) -> JsonDict:
    """Return the transformers config.json for a model whose original hub config is `source`.

    The vision tower in the result ends at the last computed block, whose output is the image feature.
    """
    family = target_of(family_of(cfg))
    assert family is not None
    stock, section = family.stock, family.text_section
    assert stock is not None
    assert section is not None
    _check(cfg, stock.lacks(cfg))
    text = family_of(cfg).text_config(source)
    text = {name: value for name, value in text.items() if not _NOT_TEXT.fullmatch(name)}
    text |= {
        "model_type": cfg.text.decoder,
        "vocab_size": vocab_size,
        "tie_word_embeddings": cfg.text.tie_embeddings,
    }
    if cfg.text.rope.kind == "longrope":
        # "su" is the hub's older name; transformers 4 wants these three fields and no more
        scaling = text["rope_scaling"]
        text["rope_scaling"] = {name: scaling[name] for name in ("short_factor", "long_factor")} | {"type": "longrope"}
    projector = projector_of(cfg)
    config: JsonDict = {
        "architectures": [stock.name],
        "model_type": family.model_types[0],
        stock.image_token: image_token_id,
        "image_seq_length": cfg.tokens_per_image,
        "projector_hidden_act": projector.activation,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if cfg.feature_select == "patch" else "full",
        "tie_word_embeddings": cfg.text.tie_embeddings,
        "torch_dtype": source.get("torch_dtype", source.get("dtype", "float32")),
        section: text,
        "vision_config": stock_tower(vision_of(cfg)),
    }
    eos: Any = list(cfg.eos_token_ids) if len(cfg.eos_token_ids) > 1 else next(iter(cfg.eos_token_ids), None)
    ids = {"bos_token_id": cfg.bos_token_id, "eos_token_id": eos, "pad_token_id": cfg.pad_token_id}
    config |= {name: value for name, value in ids.items() if value is not None}
    config |= stock.config(cfg, source)
    wide = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, vocab_size=vocab_size))
    return family.to_hf(wide, config)


def _check(cfg: ModelConfig, missing: str | None) -> None:
    vision = vision_of(cfg)
    size = 0 if vision.positions is None else vision.positions.image_size
    if missing is None and size not in (0, vision.image_size):
        missing = f"images of another size ({vision.image_size}) than its tower's positions ({size})"
    elif missing is None and cfg.text.head_bias:
        missing = "a bias in its output head (none)"
    if missing is not None:
        raise UserError(
            f'layout "transformers": transformers\' {cfg.family} class does not support {missing}: use layout "source"'
        )
