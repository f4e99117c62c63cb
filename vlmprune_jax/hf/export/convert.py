"""Hub layouts -> the layouts of transformers: original LLaVA and Bunny -> Llava, InternVL-Chat -> InternVL."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmprune_jax.config import ModelConfig, VisionConfig
from vlmprune_jax.errors import UserError
from vlmprune_jax.families import FAMILIES, Family
from vlmprune_jax.families.table import JsonDict
from vlmprune_jax.families.towers import projector_of, vision_of
from vlmprune_jax.hf.export.per_layer import stock_class

# (family, layout) of a hub folder -> the family that takes its model over.
_TARGETS = {("llava", "original"): "llava", ("bunny", "original"): "llava", ("internvl", "original"): "internvl"}
# New vocabularies are padded to a multiple of this many rows, as llava-hf does (32,002 words in 32,064 rows).
VOCAB_MULTIPLE = 64
# What the hub's configs say beside the decoder, which a text_config has no use for.
_NOT_TEXT = re.compile(
    r"(mm|tune|freeze|unfreeze|image|tokenizer|use_mm|use_im|use_s2)_.*|.*_projector.*|_.*|architectures|auto_map|"
    r"model_type|attn_implementation|transformers_version|(torch_)?dtype|max_length|pretraining_tp|s2_.*|continuous_.*|"
    r"vision_config|per_layer_shapes|vocab_size|tie_word_embeddings"
)
_VISION_TYPES = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "internvit": "internvl_vision"}


def target_family(cfg: ModelConfig) -> Family | None:
    """The transformers family that a hub layout's model becomes, or None where transformers has its layout."""
    name = _TARGETS.get((cfg.family, cfg.layout))
    return next((f for f in FAMILIES if (f.name, f.layout) == (name, "transformers")), None)


def rows_for(cfg: ModelConfig, ids: Mapping[str, int]) -> int:
    """Vocabulary rows after tokens with these ids were added."""
    needed = max((cfg.text.vocab_size, *(token + 1 for token in ids.values())))
    return cfg.text.vocab_size if needed == cfg.text.vocab_size else -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def to_transformers(cfg: ModelConfig, source: JsonDict, image_token_id: int, vocab_size: int) -> JsonDict:
    """config.json of the transformers layout for a model from a hub folder with config `source`.

    The vision tower is described as far as it is computed: its last block's output is then the feature.

    Raises:
      UserError: the model has something that the transformers class lacks.
    """
    family = target_family(cfg)
    assert family is not None
    _check(cfg)
    text = source["llm_config"] if cfg.family == "internvl" else {**source, "model_type": cfg.text.decoder}
    model_type = text["model_type"]
    text = {name: value for name, value in text.items() if not _NOT_TEXT.fullmatch(name)}
    text |= {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "tie_word_embeddings": cfg.text.tie_embeddings,
    }
    if cfg.text.rope.kind == "longrope":
        # "su" is the hub's older name; transformers 4 wants these three fields and no more
        scaling = text["rope_scaling"]
        text["rope_scaling"] = {name: scaling[name] for name in ("short_factor", "long_factor")} | {"type": "longrope"}
    projector = projector_of(cfg)
    config = {
        "architectures": [stock_class(family.name)],
        "model_type": family.name,
        _IMAGE_TOKEN[family.name]: image_token_id,
        "image_seq_length": cfg.tokens_per_image,
        "projector_hidden_act": projector.activation,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if cfg.feature_select == "patch" else "full",
        "tie_word_embeddings": cfg.text.tie_embeddings,
        "torch_dtype": source.get("torch_dtype", source.get("dtype", "float32")),
        "text_config": text,
        "vision_config": _vision_config(vision_of(cfg)),
    }
    eos: Any = list(cfg.eos_token_ids) if len(cfg.eos_token_ids) > 1 else next(iter(cfg.eos_token_ids), None)
    ids = {"bos_token_id": cfg.bos_token_id, "eos_token_id": eos, "pad_token_id": cfg.pad_token_id}
    config |= {name: value for name, value in ids.items() if value is not None}
    if family.name == "internvl":
        config["downsample_ratio"] = 1 / projector.downsample
        if source.get("template") is not None:
            config["template"] = source["template"]  # transformers has no such field; ours tells prompts apart by it
    else:
        config["multimodal_projector_bias"] = projector.bias
    wide = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, vocab_size=vocab_size))
    return family.to_hf(wide, config)


_IMAGE_TOKEN = {"llava": "image_token_index", "internvl": "image_token_id"}


def _check(cfg: ModelConfig) -> None:
    projector, vision = projector_of(cfg), vision_of(cfg)
    what = None
    if projector.kind == "pixel_shuffle" and (projector.shuffle_version, projector.norm_eps) != ("v2", 1e-5):
        what = f"pixel shuffle {projector.shuffle_version} with layer norm eps {projector.norm_eps:g} (v2 and 1e-05)"
    elif vision.position_size not in (0, vision.image_size):
        what = f"images of another size ({vision.image_size}) than its tower's positions ({vision.position_size})"
    elif cfg.text.head_bias:
        what = "a bias in its output head (none)"
    if what is not None:
        raise UserError(f'layout "transformers": its {cfg.family} class has no {what}: use layout "source"')


def _vision_config(vision: VisionConfig) -> JsonDict:
    shape = vision.layers[0]
    config = {
        "model_type": _VISION_TYPES[vision.kind],
        "hidden_size": vision.hidden_size,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.q_heads,
        "num_hidden_layers": len(vision.layers),
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": vision.channels,
        "layer_norm_eps": vision.norm_eps,
        "hidden_act": vision.activation,
    }
    if vision.kind == "siglip":
        config["vision_use_head"] = False
    if vision.kind == "internvit":
        sides = {name: [config[name]] * 2 for name in ("image_size", "patch_size")}
        config |= {**sides, "attention_bias": vision.qkv_bias, "norm_type": "layer_norm", "use_qk_norm": False}
    return config


def constants(cfg: ModelConfig) -> dict[str, tuple[tuple[int, ...], float]]:
    """Weights that the transformers class holds and never uses, as key -> (shape, value)."""
    vision = vision_of(cfg)
    if vision.kind == "internvit":
        return {}
    # a norm behind the last block; the feature is taken before it
    norm = "vision_tower.vision_model.post_layernorm."
    return {f"{norm}weight": ((vision.hidden_size,), 1.0), f"{norm}bias": ((vision.hidden_size,), 0.0)}


def written_key(key: str, vision: VisionConfig) -> str:
    """The spelling of a key that versions 4 and 5 of transformers both load."""
    if vision.kind == "internvit":
        return key
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", key)


def more_words(array: np.ndarray, axes: tuple[str, ...], size: int) -> np.ndarray:
    """A vocabulary of `size`: new embeddings, and new rows of the output head, are the mean of all others.

    The logit of a new word is then the mean of all logits, so it is never the largest.
    """
    axis = axes.index("vocab")
    mean = array.mean(axis=axis, keepdims=True, dtype=np.float32).astype(array.dtype)
    return np.concatenate([array, np.repeat(mean, size - array.shape[axis], axis=axis)], axis=axis)
