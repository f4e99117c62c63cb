"""Config fields that many families share: layer widths, sliding windows, layer types and special token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.mixers import Attention, DeltaNet, ShortConv
from vlmprune_jax.io.families.table import JsonDict

# config.json field with the true widths of each layer, in folders with unequal layers.
PER_LAYER, _PER_LAYER_AXES = "per_layer_shapes", ("q_heads", "kv_heads", "mlp")
LAYER_TYPES = {"full_attention": False, "sliding_attention": True}
TYPES = {DeltaNet: "linear_attention", ShortConv: "conv"}  # names of other mixers in `layer_types`


def layers_from_hf(
    config: Mapping[str, Any],
    widths: tuple[int, int, int],
    windows: Sequence[int | None],
    attention: Mapping[str, Any],
    local: Mapping[str, Any],
    dense: Mapping[str, Any],
) -> tuple[Layer, ...]:
    """Return the decoder's layers, with widths per layer if config.json lists them, otherwise all with `widths`.

    `attention` and `dense` are fields of the parts; `local` overrides those of layers with a window.

    Raises UserError if the recorded widths and the config have different numbers of layers.
    """
    recorded = config.get(PER_LAYER) or [widths] * len(windows)
    if len(recorded) != len(windows):
        raise UserError(f"num_hidden_layers is {len(windows)} but {PER_LAYER} lists {len(recorded)} layers")
    return tuple(
        Layer(Attention(q, kv, window, **{**attention, **({} if window is None else local)}), Dense(mlp, **dense))
        for (q, kv, mlp), window in zip(recorded, windows, strict=True)
    )


def same_windows(config: Mapping[str, Any]) -> list[int | None]:
    """Return the sliding window size of all layers of a Mistral or Phi-3 config (None = full attention)."""
    window = config.get("sliding_window")
    return [None if window is None else int(window)] * int(config["num_hidden_layers"])


def windows_from_hf(config: Mapping[str, Any]) -> list[int | None]:
    """Return each layer's sliding window size in a Qwen config (None = full attention).

    Raises UserError if `layer_types` has a wrong number of layers or an unknown type of attention.
    """
    n_layers = int(config["num_hidden_layers"])
    window = int(config.get("sliding_window") or 4096) if config.get("use_sliding_window", False) else None
    types = config.get("layer_types")
    if types is None:
        first = int(config.get("max_window_layers", 28))
        return [window if i >= first else None for i in range(n_layers)]
    if len(types) != n_layers:
        raise UserError(f"num_hidden_layers is {n_layers} but layer_types lists {len(types)} layers")
    unknown = sorted(set(types) - set(LAYER_TYPES))
    if unknown:
        raise UserError(f"layer_types {unknown} not supported (supported: {', '.join(LAYER_TYPES)})")
    return [window if LAYER_TYPES[kind] else None for kind in types]


def layers_to_hf(text: TextConfig, source: Mapping[str, Any]) -> JsonDict:
    """Return a config with its layer counts and widths updated; other fields are kept."""
    config = dict(source)
    fields = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    for name, axis in zip(fields, _PER_LAYER_AXES, strict=True):
        if widths := [layer.sizes[axis] for layer in text.layers if axis in layer.sizes]:
            config[name] = max(widths)
    config.update(num_hidden_layers=len(text.layers), head_dim=text.local_attention.head_dim)
    config.pop(PER_LAYER, None)
    if not text.uniform:
        config[PER_LAYER] = [[layer.sizes[axis] for axis in _PER_LAYER_AXES] for layer in text.layers]
    sliding = [shape.mixer.window is not None for shape in text.layers]
    if "max_window_layers" in source:
        config["max_window_layers"] = sliding.index(True) if any(sliding) else len(sliding)
    if "layer_types" in source or len(set(sliding)) > 1:
        config["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in sliding]
    return config


def hybrid_layers(text: TextConfig, mixer: Any, types: Sequence[str]) -> TextConfig:
    """Replace attention by `mixer` in the layers that `types` does not list as full attention; return the config.

    Raises UserError if `types` has a wrong number of layers, unknown types or no full attention.
    """
    n_layers, unknown = len(text.layers), sorted(set(types) - {TYPES[type(mixer)], "full_attention"})
    if unknown:
        raise UserError(f"layer_types {unknown} are not supported (supported: {TYPES[type(mixer)]}, full_attention)")
    if len(types) != n_layers:
        raise UserError(f"num_hidden_layers is {n_layers} but layer_types lists {len(types)} layers")
    if "full_attention" not in types:
        raise UserError("layer_types has no full_attention: transformers needs one such layer, so keep one")
    pairs = zip(types, text.layers, strict=True)
    return text.with_layers([x if kind == "full_attention" else Layer(mixer, x.channel) for kind, x in pairs])


def hybrid_layers_to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    """Return a hybrid decoder's config with layer counts, widths and `layer_types` updated."""
    attention = [layer for layer in text.layers if isinstance(layer.mixer, Attention)]
    types = [TYPES.get(type(layer.mixer), "full_attention") for layer in text.layers]
    config = layers_to_hf(dataclasses.replace(text, layers=tuple(attention)), source)
    return {**config, "num_hidden_layers": len(text.layers), "layer_types": types}


def hybrid_problem(text: TextConfig) -> str | None:
    """Return why transformers' hybrid decoders do not support these layers, with advice; None if they do."""
    if not text.attentions:
        return "transformers needs one layer of full attention: keep one"
    return (
        None if text.uniform else "its class has one width for all layers of a kind: prune them alike (selection local)"
    )


def tied_embeddings(config: Mapping[str, Any], text: Mapping[str, Any], *, default: bool) -> bool:
    """Return True if a vision-language model's output head shares its weights with the embeddings.

    Transformers 4 reads the decoder's flag, transformers 5 the outer one (`default` if absent).
    """
    if str(config.get("transformers_version", "5")).startswith("4."):
        return bool(text.get("tie_word_embeddings", False))
    return bool(config.get("tie_word_embeddings", default))


def token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bos, eos and pad token ids of a config as keyword arguments of ModelConfig."""
    eos = config.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    return {
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_ids": eos_ids,
        "pad_token_id": config.get("pad_token_id"),
    }


def vlm_token_ids(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """Return a vision-language model's bos, eos and pad ids; its own config overrides its decoder's."""
    outer = {name: value for name, value in config.items() if name.endswith("token_id") and value is not None}
    return token_ids({**text, **outer})
