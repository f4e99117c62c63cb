"""Phi (1, 1.5, 2): parallel blocks and layer norms. Phi-3, Phi-4-mini: Llama's blocks, fused weights, LongRoPE."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import decoder_family
from vlmprune_jax.io.families.llama_like import as_mistral, defaults_of, llama_like
from vlmprune_jax.io.families.shapes import PER_LAYER, layers_to_hf, longrope_to_hf, same_windows
from vlmprune_jax.io.families.table import LLAMA_NAMES, Decoder, JsonDict, in_layers

# Paths with one name are rows of a fused tensor, in order.
_PHI3_NAMES = LLAMA_NAMES | in_layers(
    {
        **{f"self_attn/{name}_proj": "self_attn.qkv_proj" for name in "qkv"},
        **{f"mlp/{name}_proj": "mlp.gate_up_proj" for name in ("gate", "up")},
    }
)


def _phi_from_hf(config: Mapping[str, Any]) -> TextConfig:
    """Return the TextConfig of a Phi config, whose head has no bias (only `PhiForCausalLM` alone has one)."""
    if config.get("qk_layernorm", False):
        raise UserError("Phi with qk_layernorm=true is not supported (no released Phi uses it)")
    return llama_like(
        {**config, "rms_norm_eps": config["layer_norm_eps"]},
        "phi",
        rotary=0.5,
        attention={"bias": True, "out_bias": True},
        dense={"gated": False, "bias": True},
        block={"norm": "layer", "parallel": True},
    )


def _phi3_to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    """Return a Phi-3 config with its layer counts and widths updated; other fields are kept.

    The rope type "su" is renamed to "longrope", which both transformers 4 and 5 read. Phi3Config requires
    hidden_size // heads / 2 LongRoPE factors, whatever `head_dim` is, so a model with pruned heads does not load as
    Phi-3. It is written as Mistral: the same computation, with the fused weights split.

    Raises:
      UserError: heads were pruned and only part of each is rotated (Phi-4-mini), which no transformers class computes.
    """
    config = layers_to_hf(text, source)
    scaling = config.get("rope_scaling") or {}
    if text.rope.kind == "longrope" and "type" in scaling:
        config["rope_scaling"] = {**scaling, "type": "longrope"}
    heads = config["num_attention_heads"]
    if text.rope.kind != "longrope" or text.hidden_size // heads == text.attention.head_dim or PER_LAYER in config:
        return config
    if text.attention.rotated != text.attention.head_dim:
        raise UserError(
            f"no transformers class supports {heads} heads of {text.attention.head_dim} with hidden_size "
            f"{text.hidden_size}, LongRoPE and partial rotary embedding: keep all heads and prune layers or neurons"
        )
    config = {name: value for name, value in config.items() if name not in ("auto_map", "partial_rotary_factor")}
    return as_mistral(text, {**config, **longrope_to_hf(text.rope, source)})


PHI3 = decoder_family(
    Decoder(
        "phi3",
        "Phi3ForCausalLM",
        functools.partial(llama_like, decoder="phi3", windows=same_windows, rotary=1.0),
        _phi3_to_hf,
        _PHI3_NAMES,
        defaults=defaults_of("phi3", max_position_embeddings=4096, rms_norm_eps=1e-5),
        heads_divide=True,
        gguf=(gguf.PHI3, gguf.LLAMA, gguf.DECI),
        derives_head_dim=("mlx",),
    )
)
PHI = decoder_family(
    Decoder(
        "phi",
        "PhiForCausalLM",
        _phi_from_hf,
        defaults=defaults_of("phi", max_position_embeddings=2048, hidden_act="gelu_new", layer_norm_eps=1e-5),
        head_bias=True,
        gguf=(gguf.PHI2,),
        derives_head_dim=("vllm", "vllm_tpu", "mlx"),
    )
)
