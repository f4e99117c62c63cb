"""Tiny configs of every decoder, each with hyper-parameters that are nobody's default."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from hf_cases import LLAMA
from safetensors.numpy import save_file

from vlmprune_jax.base.files import read_json
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint

BASE = {key: value for key, value in LLAMA.items() if key not in ("attention_bias", "mlp_bias")}
FACTORS = {
    "short_factor": [1.0, 1.05, 1.2, 1.45, 1.9, 2.35],
    "long_factor": [1.03, 1.23, 2.86, 5.49, 15.7, 30.0],
}
SU = {"rope_scaling": {"type": "su", **FACTORS}, "original_max_position_embeddings": 32}
LONGROPE = {**SU, "rope_scaling": {"type": "longrope", **FACTORS}}
PHI = {
    **{key: value for key, value in BASE.items() if key not in ("rms_norm_eps", "hidden_act")},
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "layer_norm_eps": 3e-4,
    "hidden_act": "gelu",
    "partial_rotary_factor": 0.4,  # int(0.4 * 12) = 4 of 12 channels
    "resid_pdrop": 0.1,
}
PHI3 = {
    **{key: value for key, value in BASE.items() if key != "head_dim"},
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_act": "silu",
    "num_attention_heads": 4,  # heads of 12
    "num_key_value_heads": 2,
    "sliding_window": 19,
    **SU,
}
QWEN2 = {
    **BASE,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 9,
    "max_window_layers": 2,
}
QWEN3 = {**BASE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": True}
MISTRAL = {**BASE, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 11}
V5_PHI = {key: value for key, value in PHI.items() if key not in ("rope_theta", "partial_rotary_factor")}
V5_PHI["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.4}
V5_PHI3 = {key: value for key, value in PHI3.items() if key not in ("rope_theta", "rope_scaling")}
V5_PHI3["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 1.0, **FACTORS}

# One of each kind, by model_type.
DECODERS = {config["model_type"]: config for config in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI, PHI3)}


def golden_decoder(goldens: Path, name: str, to: Path) -> Path:
    """The decoder of the golden Bunny ("phi2") or InternVL ("phi3") alone, as stock transformers has it."""
    source = Checkpoint(goldens / "ckpt" / {"phi2": "bunny", "phi3": "internvl"}[name])
    config = read_json(source.folder / "config.json")
    keys = [key for key in source if re.match(r"(language_model\.)?(model\.(embed|layers|norm|final)|lm_head)", key)]
    tensors = {key.removeprefix("language_model."): np.ascontiguousarray(source[key]) for key in keys}
    if name == "phi2":
        config = {**config, "model_type": "phi", "architectures": ["PhiForCausalLM"]}
        tensors["lm_head.bias"] = np.zeros(config["vocab_size"], np.float32)
    else:
        config = config["llm_config"]
    to.mkdir()
    (to / "config.json").write_text(json.dumps(config))
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def fed_with(model: Model, embeddings: np.ndarray) -> tuple[Model, np.ndarray]:
    """A model and int[batch, seq] ids that put float[batch, seq, embed] into its decoder: each its own word."""
    table = np.array(model.params["text"]["embed_tokens"]["weight"])
    flat = embeddings.reshape(-1, embeddings.shape[-1])
    table[: len(flat)] = flat
    text = {**model.params["text"], "embed_tokens": {"weight": jnp.asarray(table)}}
    return Model({**model.params, "text": text}, model.cfg), np.arange(len(flat)).reshape(embeddings.shape[:2])
