"""Llama, and decoders with the same blocks: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.core.layer import BlockConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import decoder_family
from vlmprune_jax.io.families.shapes import (
    PER_LAYER,
    layers_from_hf,
    layers_to_hf,
    rope_from_hf,
    rotary_dim,
    same_windows,
    windows_from_hf,
)
from vlmprune_jax.io.families.table import Decoder, JsonDict

_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads", "head_dim")  # fmt: skip
# Default values of these fields in transformers, by model type; None: the class computes it.
_SIZES = {
    "llama": (32000, 4096, 11008, 32, 32, None, None),
    "mistral": (32000, 4096, 14336, 32, 32, 8, None),
    "phi": (51200, 2048, 8192, 24, 32, None, None),
    "phi3": (32064, 3072, 8192, 32, 32, None, None),
    "lfm2": (65536, 2560, 12288, 32, 32, 8, None),
    "qwen2": (151936, 4096, 22016, 32, 32, 32, None),
    "qwen2_5_vl_text": (152064, 8192, 29568, 80, 64, 8, None),
    "qwen3": (151936, 4096, 22016, 32, 32, 32, 128),
    "qwen3_moe": (151936, 2048, 6144, 24, 32, 4, None),
    "qwen3_vl_text": (151936, 4096, 22016, 32, 32, 32, 128),
    "qwen3_vl_moe_text": (151936, 2048, 5632, 24, 16, 16, None),
    "qwen3_5_text": (248320, 4096, 12288, 32, 16, 4, 256),
    "qwen3_5_moe_text": (248320, 2048, 12288, 40, 16, 2, 256),
    "gemma3_text": (262208, 2304, 9216, 26, 8, 4, 256),
    "gemma4_text": (262144, 2304, 9216, 30, 8, 4, 256),
}


def defaults_of(model_type: str, **others: Any) -> JsonDict:
    """Return the defaults of a decoder's config class in transformers: its sizes, and `others`."""
    sizes = zip(_FIELDS, _SIZES[model_type], strict=True)
    return {"model_type": model_type, **{name: size for name, size in sizes if size is not None}, **others}


_LLAMA = defaults_of("llama", max_position_embeddings=2048, hidden_act="silu", rms_norm_eps=1e-6)


def llama_like(
    config: Mapping[str, Any],
    decoder: str,
    *,
    windows: Callable[[Mapping[str, Any]], Sequence[int | None]] | None = None,
    biased: bool = False,
    rotary: float | None = None,
    attention: Mapping[str, Any] | None = None,
    local: Mapping[str, Any] | None = None,
    dense: Mapping[str, Any] | None = None,
    block: Mapping[str, Any] | None = None,
    **traits: Any,
) -> TextConfig:
    """Return the TextConfig of a decoder whose config dictionary has Llama's fields.

    Absent fields take LlamaConfig's defaults. `windows` returns the sliding window of each layer (None: full attention
    everywhere). With `biased`, `attention_bias` says whether all projections of attention have biases. `rotary` is the
    default of `partial_rotary_factor` (None: all channels of a head rotate, and the field is not read). `attention`,
    `dense`, `block` and `traits` are fields of Attention, Dense, BlockConfig and TextConfig; `local` overrides those of
    attention with a window. By default the decoder has no biases and no norm of queries and keys.
    """
    config = {**_LLAMA, **config}
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    bias = biased and bool(config.get("attention_bias", False))
    fields: JsonDict = {"head_dim": head_dim, "rope": rope_from_hf(config), "bias": bias, "out_bias": bias}
    if rotary is not None:
        fields["rotary_dim"] = rotary_dim(config, head_dim, rotary)
    return TextConfig(
        hidden_size=hidden,
        layers=layers_from_hf(
            config,
            (heads, kv_heads, int(config["intermediate_size"])),
            [None] * int(config["num_hidden_layers"]) if windows is None else windows(config),
            {**fields, **(attention or {})},
            local or {},
            {"activation": config["hidden_act"], **(dense or {})},
        ),
        block=BlockConfig(norm_eps=float(config["rms_norm_eps"]), **(block or {})),
        vocab_size=int(config["vocab_size"]),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_positions=int(config["max_position_embeddings"]),
        decoder=decoder,
        **traits,
    )


def _llama_from_hf(config: Mapping[str, Any]) -> TextConfig:
    return llama_like(config, "llama", biased=True, dense={"bias": bool(config.get("mlp_bias", False))})


def _llama_to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    """Return a Llama config with its layer counts and widths updated; other fields are kept.

    If the number of heads no longer divides `hidden_size`, the model is written as Mistral: transformers 5's config
    class of Llama refuses it, Mistral's accepts an explicit `head_dim`. Computation and weight names are the same.
    """
    config = layers_to_hf(text, source)
    heads = config["num_attention_heads"]
    if text.hidden_size % heads == 0:
        return config
    biases = text.attention.bias or text.channel.bias
    if biases and PER_LAYER in config:
        return config  # no stock class loads unequal widths anyway
    if biases:
        raise UserError(
            f"{heads} attention heads do not divide hidden_size {text.hidden_size}, and Mistral, which allows this, "
            "has no biases: prune to a number of heads that divides hidden_size"
        )
    return as_mistral(text, config)


def as_mistral(text: TextConfig, config: JsonDict) -> JsonDict:
    """Convert a Llama-like config to a Mistral config; fields whose defaults differ become explicit."""
    defaults = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "hidden_act": text.channel.activation,
        "rms_norm_eps": text.block.norm_eps,
        "max_position_embeddings": text.max_positions,
    }
    config = {**defaults, **config, "model_type": "mistral", "sliding_window": text.layers[0].mixer.window}
    if config.get("architectures") in (["LlamaForCausalLM"], ["Phi3ForCausalLM"]):
        config["architectures"] = ["MistralForCausalLM"]
    return config


LLAMA = decoder_family(
    Decoder(
        "llama",
        "LlamaForCausalLM",
        _llama_from_hf,
        _llama_to_hf,
        heads_divide=True,
        gguf=(gguf.LLAMA, gguf.DECI),
        vllm_tpu="jax",
    )
)
MISTRAL = decoder_family(
    Decoder(
        "mistral",
        "MistralForCausalLM",
        functools.partial(llama_like, decoder="mistral", windows=same_windows),
        defaults=defaults_of("mistral", max_position_embeddings=131072, sliding_window=4096),
        gguf=(gguf.LLAMA, gguf.DECI),
    )
)
QWEN2 = decoder_family(
    Decoder(
        "qwen2",
        "Qwen2ForCausalLM",
        functools.partial(llama_like, decoder="qwen2", windows=windows_from_hf, attention={"bias": True}),
        defaults=defaults_of("qwen2", max_position_embeddings=32768),
        gguf=(gguf.QWEN2, gguf.LLAMA, gguf.DECI),
        derives_head_dim=("vllm", "mlx"),
        vllm_tpu="jax",
    )
)
QWEN3 = decoder_family(
    Decoder(
        "qwen3",
        "Qwen3ForCausalLM",
        functools.partial(
            llama_like, decoder="qwen3", windows=windows_from_hf, biased=True, attention={"qk_norm": True}
        ),
        defaults=defaults_of("qwen3", max_position_embeddings=32768),
        gguf=(gguf.QWEN3,),
        vllm_tpu="jax",
    )
)
