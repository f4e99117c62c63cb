"""Metadata of GGUF files, and remarks for their users on differences in llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mixers import Attention, DeltaNet
from vlmprune_jax.io.checkpoints.read import read_fields
from vlmprune_jax.io.data.images import cut_preparation
from vlmprune_jax.io.data.patching import Patching
from vlmprune_jax.io.data.processor_files import processor_settings
from vlmprune_jax.io.exports.card import render
from vlmprune_jax.io.exports.gguf_tokenizer import Vocabulary, drops_white_space
from vlmprune_jax.io.families import Family, family_of
from vlmprune_jax.io.families.gguf import (
    DROPPING_NAME,
    Architecture,
    full_attention_period,
    recurrent_fields,
    width_fields,
)
from vlmprune_jax.io.families.gguf_towers import LEAST_TOKENS
from vlmprune_jax.io.families.table import JsonDict
from vlmprune_jax.io.families.towers import PIXELS, vision_of

BLOCK = 32  # values of a row that share a scale in quantised types, and that kernels of llama.cpp read at once
_PHYSICAL_BATCH = 512  # default of --ubatch-size (tokens)


def file_type(label: str) -> JsonDict:
    """Return the GGUF metadata field for the data type of most tensors."""
    from gguf import LlamaFileType

    name = "ALL_F32" if label == "F32" else f"MOSTLY_{label}"
    return {"file_type": int(LlamaFileType[name]), "quantization_version": 2}


def text_fields(cfg: ModelConfig, architecture: Architecture) -> JsonDict:
    """Return GGUF metadata of the decoder: layer shapes and hyper-parameters."""
    text = cfg.text

    def widths(name: str) -> int | list[int]:
        column = [layer.sizes[name] for layer in text.layers if name in layer.sizes]
        return column[0] if len(set(column)) == 1 else column

    rope = text.rope
    fields: JsonDict = {
        "context_length": architecture.context_length(text),
        "embedding_length": text.hidden_size,
        "block_count": len(text.layers),
        "vocab_size": text.vocab_size,
        "head_count": widths("q_heads"),
        "head_count_kv": widths("kv_heads"),
        **width_fields(text.layers),
        **recurrent_fields(text, architecture.name),
        "key_length": text.attention.head_dim,
        "value_length": text.attention.head_dim,
        "rope_dimension_count": text.attention.rotated,
        "rope_freq_base": rope.theta,
        "layer_norm_rms_eps" if text.block.norm == "rms" else "layer_norm_eps": text.block.norm_eps,
    }
    if architecture.windows is not None:
        local, pattern = text.local_attention, [shape.mixer.window is not None for shape in text.layers]
        windows = [shape.mixer.window for shape in text.layers if shape.mixer.window is not None]
        fields["sliding_window"] = max(windows, default=text.max_positions)
        fields["sliding_window_pattern"] = full_attention_period(text.layers)
        fields["rope_freq_base_swa"] = (local.rope or rope).theta
        if text.attention.head_dim != local.head_dim:
            fields |= {"key_length_swa": local.head_dim, "value_length_swa": local.head_dim}
            fields |= {"sliding_window_pattern": pattern, "rope_dimension_count_swa": local.rotated}
            fields["shared_kv_layers"] = sum(shape.mixer.source is not None for shape in text.layers)
            fields["embedding_length_per_layer_input"] = text.block.layer_inputs
        if text.logit_cap:
            fields["final_logit_softcapping"] = text.logit_cap
    if rope.sections:
        fields["rope_dimension_sections"] = [*rope.sections, 0]  # time, rows, columns, and an unused section
    if cfg.deepstack:
        fields["num_deepstack_layers"] = cfg.deepstack
    if rope.kind in ("linear", "yarn", "longrope"):
        fields["rope_scaling_type"] = rope.kind
    if rope.kind in ("linear", "yarn"):
        fields["rope_scaling_factor"] = rope.factor
    if rope.kind in ("yarn", "longrope"):
        fields["rope_scaling_orig_ctx_len"] = rope.original_max_positions
    if rope.kind == "longrope":
        fields["rope_scaling_attn_factors"] = rope.attention_factor
    if rope.kind == "yarn":
        fields |= {"rope_scaling_yarn_beta_fast": rope.beta_fast, "rope_scaling_yarn_beta_slow": rope.beta_slow}
        # llama.cpp multiplies by 1 + 0.1 log(factor) itself
        fields["rope_scaling_attn_factors"] = rope.attention_factor / (1 + 0.1 * float(np.log(rope.factor)))
    return fields


def image_fields(cfg: ModelConfig, family: Family, source: Path) -> tuple[JsonDict, JsonDict]:
    """Return GGUF metadata on pixel statistics, and on limits of image size or tiles, from the image processor.

    Raises UserError if an image that is divided into tiles has only one.
    """
    mean, std = PIXELS.get(vision_of(cfg).kind, ((0.0,) * 3, (1.0,) * 3))  # Gemma 4's tower centres them itself
    fields: JsonDict = {}
    tiling, tiles = None, 0
    processor = None if family.tiling is not None else processor_settings(source)
    if family.images == "patches":
        patching = _patching(source)
        mean, std = patching.mean, patching.std
        fields = {"vision_min_pixels": patching.min_pixels, "vision_max_pixels": patching.max_pixels}
    elif family.tiling is not None:
        config = source / "config.json"
        tiling = family.tiling(read_fields(config), str(config))
    elif processor is not None and family.images != "budget":
        mean, std = (processor[0].get(name) or default for name, default in (("image_mean", mean), ("image_std", std)))
        if family.images == "splits":
            splitting = cut_preparation(*processor)
            fields, tiles = {"vision_preproc_image_size": splitting.longest}, splitting.most(1)
        elif family.images == "tiles":
            tiling = cut_preparation(*processor)
    if tiling is not None:
        fields = {"vision_preproc_min_tiles": tiling.min_tiles, "vision_preproc_max_tiles": tiling.max_tiles}
        tiles = tiling.max_tiles
    if tiles == 1:
        raise UserError(
            'format "gguf": images have one tile, but llama.cpp adds an overview to it: allow more tiles '
            "(export.max_image_tokens)"
        )
    return {"vision_image_mean": [float(x) for x in mean], "vision_image_std": [float(x) for x in std]}, fields


def image_options(family: Family, source: Path) -> str:
    """Return llama.cpp command-line options that limit image tokens like the image processor.

    If tokens of an image attend to each other, the options also enlarge llama.cpp's physical batch to hold them all.
    """
    if family.images == "patches":
        patching = _patching(source)
        area = (patching.patch * patching.merge) ** 2
        return f" --image-min-tokens {-(-patching.min_pixels // area)} --image-max-tokens {patching.max_pixels // area}"
    processor = processor_settings(source) if family.images == "budget" else None
    if processor is None:
        return ""
    most = cut_preparation(*processor).tokens
    return f" --image-max-tokens {most}" + (f" --ubatch-size {most}" if most > _PHYSICAL_BATCH else "")


def _patching(source: Path) -> Patching:
    processor = processor_settings(source)
    if processor is None:
        raise UserError(f"{source}: has no preprocessor_config.json, which limits the size of images: add the file")
    return cut_preparation(*processor)


def title(name: str, tokenizer: Any) -> str:
    """Return the model name for GGUF metadata; for a name with "Phi-3", llama.cpp treats spaces as in Phi-3."""
    if drops_white_space(tokenizer):
        return name if DROPPING_NAME.search(name) else f"{name} (Phi-3)"
    return DROPPING_NAME.sub(lambda match: " ".join((match[0][:-1].rstrip("-"), match[0][-1])), name)


def differences(
    cfg: ModelConfig, architecture: Architecture, vocabulary: Vocabulary, rolled: bool, source: Path
) -> str:
    """Return the list of the model card on how llama.cpp computes, tokenizes and prepares images differently.

    `cfg`: config of the model before zero-padding. `source`: the folder with the image processor.
    """
    text, family = cfg.text, family_of(cfg)
    neurons = {width for layer in text.layers for width in layer.channel.neuron_counts}
    moved = architecture.recurrent is DeltaNet and full_attention_period(text.layers) is None
    processor = processor_settings(source) if cfg.vision is not None and family.images == "crops" else None
    return render(
        "differences",
        cfg=cfg,
        architecture=architecture.name,
        context_length=architecture.context_length(text),
        block=BLOCK,
        odd_widths=sorted(width for width in neurons if width % BLOCK),
        attention_layers=[i for i, layer in enumerate(text.layers) if moved and isinstance(layer.mixer, Attention)],
        vocabulary=vocabulary,
        pans_and_scans=processor is not None and processor[0].get("do_pan_and_scan"),
        rolled=rolled,
        least_tokens=LEAST_TOKENS,
        prompt=family.templates[0],
    )
