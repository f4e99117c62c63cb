# seed_oss.py
"""Seed-OSS (ByteDance): Llama's blocks, with separate settings for the biases."""

from collections.abc import Mapping
from typing import Any

import vlmprune_jax as vp
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.io.families.decoders import decoder_family
from vlmprune_jax.io.families.llama_like import llama_like
from vlmprune_jax.io.families.table import Decoder

# Defaults of transformers' SeedOssConfig for fields missing in config.json.
DEFAULTS = {
    "vocab_size": 155136,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524288,
    "attention_bias": True,
    "attention_out_bias": False,
    "mlp_bias": False,
}


def from_hf(config: Mapping[str, Any]) -> TextConfig:
    biases = {"bias": config["attention_bias"], "out_bias": config["attention_out_bias"]}
    return llama_like(config, "seed_oss", attention=biases, dense={"bias": config["mlp_bias"]})


vp.families["seed_oss"] = decoder_family(Decoder("seed_oss", "SeedOssForCausalLM", from_hf, defaults=DEFAULTS))
