"""Configs of models at their true sizes, by the names that benchmarks give them."""

from __future__ import annotations

from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    },
    "llava": {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000,
        "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "torch_dtype": "bfloat16", "pad_token_id": 32001,
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
        },
    },
    "bunny": {
        "architectures": ["BunnyPhiForCausalLM"], "model_type": "bunny-phi", "hidden_size": 2560,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 10240,
        "vocab_size": 50295, "max_position_embeddings": 2048, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.4, "rope_theta": 10000.0, "tie_word_embeddings": False, "qk_layernorm": False,
        "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 1152, "use_mm_proj": True,
        "mm_vision_tower": "google/siglip-so400m-patch14-384", "bos_token_id": 50256, "eos_token_id": 50256,
        "pad_token_id": 50256, "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
            "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
        },
    },
    "internvl": {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "downsample_ratio": 0.5,
        "ps_version": "v2", "select_layer": -1, "force_image_size": 448, "template": "phi3-chat", "use_thumbnail": True,
        "min_dynamic_patch": 1, "max_dynamic_patch": 12, "torch_dtype": "bfloat16",
        "llm_config": {
            "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 8192, "vocab_size": 32020,
            "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "hidden_act": "silu", "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000,
            "rope_scaling": {"type": "su", "short_factor": [1.1] * 48, "long_factor": [32.0] * 48},
        },
        "vision_config": {
            "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "hidden_size": 1024,
            "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 448,
            "patch_size": 14, "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
            "qk_normalization": False, "norm_type": "layer_norm",
        },
    },
    "internvl3.5": {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "image_token_id": 151671,
        "image_seq_length": 256, "downsample_ratio": 0.5, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1000000.0,
            "attention_bias": False, "tie_word_embeddings": False, "eos_token_id": 151645, "pad_token_id": 151643,
        },
        "vision_config": {
            "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
        },
    },
    "smolvlm2": {
        "architectures": ["SmolVLMForConditionalGeneration"], "model_type": "smolvlm", "image_token_id": 49190,
        "scale_factor": 3, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64, "vocab_size": 49280,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 130000.0,
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 49279, "pad_token_id": 2,
        },
        "vision_config": {
            "model_type": "smolvlm_vision", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
        },
    },
    "internvl3-8b": {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "image_token_id": 151667,
        "image_seq_length": 256, "downsample_ratio": 0.5, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 151674, "rope_theta": 1000000.0,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "hidden_act": "silu", "use_sliding_window": False,
            "tie_word_embeddings": False, "eos_token_id": 151645, "pad_token_id": 151643,
        },
        "vision_config": {
            "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
        },
    },
    "smolvlm-256m": {
        "architectures": ["SmolVLMForConditionalGeneration"], "model_type": "smolvlm", "image_token_id": 49190,
        "scale_factor": 4, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 100000.0,
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 49279, "pad_token_id": 2,
        },
        "vision_config": {
            "model_type": "smolvlm_vision", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
        },
    },
    "qwen3vl": {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "image_token_id": 151655,
        "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "qwen3_vl_text", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 5000000.0,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
            "attention_bias": False, "tie_word_embeddings": True, "eos_token_id": 151645, "pad_token_id": 151643,
        },
        "vision_config": {
            "model_type": "qwen3_vl", "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
            "out_hidden_size": 2560, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
            "hidden_act": "gelu_pytorch_tanh",
        },
    },
    "qwen2.5vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "image_token_id": 151655,
        "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "use_sliding_window": False,
        "sliding_window": 32768, "max_window_layers": 36, "eos_token_id": 151645, "pad_token_id": 151643,
        "vision_config": {
            "model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_chans": 3, "window_size": 112,
            "out_hidden_size": 2048, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
            "hidden_act": "silu",
        },
    },
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "image_token_index": 262144,
        "boi_token_index": 255999, "eoi_token_index": 256000, "mm_tokens_per_image": 256, "torch_dtype": "bfloat16",
        "eos_token_id": [1, 106],
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
            "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
            "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
            "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "vision_use_head": False,
        },
    },
    "gemma4_e4b": {
        "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "image_token_id": 258880,
        "boi_token_id": 255999, "eoi_token_id": 258882, "torch_dtype": "bfloat16", "eos_token_id": [1, 106],
        "text_config": {
            "model_type": "gemma4_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512,
            "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256,
            "num_kv_shared_layers": 18, "sliding_window": 512, "final_logit_softcapping": 30.0,
            "max_position_embeddings": 131072,
        },
        "vision_config": {
            "model_type": "gemma4_vision", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16,
            "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64, "patch_size": 16,
            "pooling_kernel_size": 3, "position_embedding_size": 10240, "use_clipped_linears": True,
        },
    },
}  # fmt: skip
_QWEN35 = {
    "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "image_token_id": 248056,
    "video_token_id": 248057, "vision_start_token_id": 248053, "vision_end_token_id": 248054,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "qwen3_5_text", "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320,
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "hidden_act": "silu", "full_attention_interval": 4,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
        },
    },
    "vision_config": {
        "model_type": "qwen3_5", "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        "out_hidden_size": 2560, "num_position_embeddings": 2304, "hidden_act": "gelu_pytorch_tanh",
    },
}  # fmt: skip
MODELS["qwen3.5-4b"] = _QWEN35
MODELS["qwen3.5-9b"] = {
    **_QWEN35, "tie_word_embeddings": False,
    "text_config": {
        **_QWEN35["text_config"], "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False,
    },
    "vision_config": {
        **_QWEN35["vision_config"], "depth": 27, "hidden_size": 1152, "intermediate_size": 4304,
        "out_hidden_size": 4096,
    },
}  # fmt: skip
MODELS["llava"]["text_config"] = {**MODELS["llama"], "vocab_size": 32064}
_EXPERTS = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "tie_word_embeddings": False, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}  # fmt: skip
MODELS["qwen3vl_moe"] = {  # 30B-A3B
    **MODELS["qwen3vl"],
    **{"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"},
    "tie_word_embeddings": False,
    "text_config": {**MODELS["qwen3vl"]["text_config"], **_EXPERTS, "model_type": "qwen3_vl_moe_text"},
    "vision_config": {
        **MODELS["qwen3vl"]["vision_config"], "model_type": "qwen3_vl_moe", "depth": 27, "hidden_size": 1152,
        "intermediate_size": 4304, "out_hidden_size": 2048, "deepstack_visual_indexes": [8, 16, 24],
    },
}  # fmt: skip
MODELS["internvl3.5_moe"] = {  # InternVL3.5-30B-A3B
    **MODELS["internvl3.5"],
    "text_config": {**MODELS["internvl3.5"]["text_config"], **_EXPERTS, "model_type": "qwen3_moe"},
}
MODELS["gemma4_moe"] = {  # 26B-A4B
    **MODELS["gemma4_e4b"],
    "text_config": {
        **MODELS["gemma4_e4b"]["text_config"], "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2, "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "sliding_window": 1024, "enable_moe_block": True,
        "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
    },
    "vision_config": {
        **MODELS["gemma4_e4b"]["vision_config"], "hidden_size": 1152, "intermediate_size": 4304,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72,
        "use_clipped_linears": False,
    },
}  # fmt: skip
MODELS["internvl3-2b"] = {
    **MODELS["internvl3-8b"], "tie_word_embeddings": False,
    "text_config": {
        **MODELS["internvl3-8b"]["text_config"], "hidden_size": 1536, "intermediate_size": 8960,
        "num_attention_heads": 12, "num_key_value_heads": 2,
    },
}  # fmt: skip
MODELS["qwen3vl-2b"] = {
    **MODELS["qwen3vl"],
    "text_config": {
        **MODELS["qwen3vl"]["text_config"], "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "vision_config": {**MODELS["qwen3vl"]["vision_config"], "out_hidden_size": 2048},
}  # fmt: skip
# Sizes for a trial (`full_size.py --tiny`), which the tests run.
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_hidden_layers": 8, "vocab_size": 120, "image_size": 28, "force_image_size": 28, "mm_hidden_size": 64,
    "image_token_index": 100, "image_token_id": 100, "pad_token_id": 101, "scale_factor": 2,
    "short_factor": [1.1] * 8, "long_factor": [32.0] * 8,
}  # fmt: skip


def shrink(config: Any) -> Any:
    """Return a copy of a model config with all sizes replaced by those of `TINY`."""
    if not isinstance(config, dict):
        return config
    return {key: TINY.get(key, shrink(value)) if value is not None else None for key, value in config.items()}
