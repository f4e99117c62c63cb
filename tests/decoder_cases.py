"""Tiny configs of every decoder, each with hyper-parameters that are nobody's default."""

from __future__ import annotations

from typing import Any

from hf_cases import LLAMA

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
DECODERS: dict[str, dict[str, Any]] = {
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "phi": PHI,
    "phi3": PHI3,
}
