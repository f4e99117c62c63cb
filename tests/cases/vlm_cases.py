"""Tiny vision-language folders: every decoder under every tower, in the layouts of transformers and of the hub."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmprune_jax.io.data.encoding import Encoder, Shape
from vlmprune_jax.io.data.records import Record

# Every hyper-parameter differs from its default.
_COMMON = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
    "max_position_embeddings": 64, "rope_theta": 500.0, "bos_token_id": 3, "eos_token_id": 5, "pad_token_id": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
_RMS = {**_COMMON, "num_key_value_heads": 3, "rms_norm_eps": 3e-5, "hidden_act": "gelu_pytorch_tanh"}
TEXTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_RMS, "head_dim": 12, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **_RMS, "head_dim": 12, "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", **_RMS},
    "qwen3": {"model_type": "qwen3", **_RMS, "head_dim": 12},
    "phi": {
        "model_type": "phi", **_COMMON, "num_key_value_heads": 6, "layer_norm_eps": 3e-4, "hidden_act": "quick_gelu",
        "partial_rotary_factor": 0.5,
    },
    "phi3": {
        "model_type": "phi3", **_RMS, "sliding_window": 99, "original_max_position_embeddings": 24,
        "rope_scaling": {"type": "longrope", "short_factor": [1.1, 1.3, 1.7, 2.9], "long_factor": [1.0, 1.9, 4.0, 6.0]},
    },
}  # fmt: skip
_TOWER = {
    "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_hidden_layers": 3, "image_size": 18,
    "patch_size": 4, "layer_norm_eps": 2e-4,
}  # fmt: skip
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", **_TOWER, "hidden_act": "gelu", "projection_dim": 24},
    "siglip": {"model_type": "siglip_vision_model", **_TOWER, "hidden_act": "gelu"},
}


def llava_config(text: str, tower: str) -> dict[str, Any]:
    """A LlavaForConditionalGeneration; a SigLIP tower has no class token to drop."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 90,
        "image_seq_length": 16,
        "projector_hidden_act": "relu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full" if tower == "siglip" else "default",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "text_config": dict(TEXTS[text]),
        "vision_config": dict(TOWERS[tower]),
    }


def internvl_config(text: str, **changes: Any) -> dict[str, Any]:
    """An InternVLForConditionalGeneration."""
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": 90,
        "image_seq_length": 4,
        "projector_hidden_act": "relu",
        "downsample_ratio": 0.5,
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "text_config": dict(TEXTS[text]),
        "vision_config": {
            **_TOWER, "model_type": "internvl_vision", "hidden_act": "gelu_new", "attention_bias": True,
            "image_size": [18, 18], "patch_size": [4, 4],
        },
        **changes,
    }  # fmt: skip


def smolvlm_config(text: str) -> dict[str, Any]:
    """A SmolVLMForConditionalGeneration."""
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "image_token_id": 90,
        "scale_factor": 4,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "text_config": dict(TEXTS[text]),
        "vision_config": {**_TOWER, "model_type": "smolvlm_vision", "hidden_act": "gelu"},
    }


def gemma3_config() -> dict[str, Any]:
    """A Gemma3ForConditionalGeneration, as the hub's folders of version 4.50 describe it."""
    text = {name: value for name, value in _RMS.items() if name not in ("hidden_act", "rope_theta")}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "image_token_index": 90,
        "boi_token_index": 91,
        "eoi_token_index": 92,
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.50.0",
        "text_config": {
            **text, "model_type": "gemma3_text", "head_dim": 10, "query_pre_attn_scalar": 18, "sliding_window": 7,
            "num_hidden_layers": 4, "sliding_window_pattern": 3, "rope_theta": 5000.0, "rope_local_base_freq": 300.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        "vision_config": {**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
    }  # fmt: skip


def qwen_vl_config(name: str) -> dict[str, Any]:
    """A Qwen3-VL or Qwen2.5-VL (`name`: its model_type), as the hub's folders of version 4 nest or do not nest it."""
    text = {
        **_RMS, "num_hidden_layers": 4, "rope_theta": 700.0, "max_position_embeddings": 96,
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 3, 2] if name == "qwen3_vl" else [2, 3, 1]},
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 24, "intermediate_size": 36, "num_heads": 3, "in_channels": 3, "patch_size": 3,
        "spatial_merge_size": 2, "temporal_patch_size": 1, "out_hidden_size": 48, "model_type": name,
    }  # fmt: skip
    outer = {
        "model_type": name, "image_token_id": 90, "video_token_id": 92, "vision_start_token_id": 91,
        "vision_end_token_id": 93, "tie_word_embeddings": False, "torch_dtype": "float32",
        "transformers_version": "4.57.0",
    }  # fmt: skip
    if name == "qwen3_vl":
        vision |= {"hidden_act": "gelu", "num_position_embeddings": 36, "deepstack_visual_indexes": [1]}
        text |= {"model_type": "qwen3_vl_text", "head_dim": 12, "attention_bias": True}
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"], **outer, "text_config": text, "vision_config": vision
        }  # fmt: skip
    vision |= {"hidden_act": "relu", "window_size": 13, "fullatt_block_indexes": [1]}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {"architectures": ["Qwen2_5_VLForConditionalGeneration"], **outer, **text, "vision_config": vision}


def internvl_chat_config(text: str) -> dict[str, Any]:
    """The hub layout of InternVL-Chat, which transformers cannot load by itself."""
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "force_image_size": 16,
        "ps_version": "v1",
        "select_layer": -2,
        "torch_dtype": "float32",
        "llm_config": dict(TEXTS[text]),
        "vision_config": {
            **_TOWER, "model_type": "intern_vit_6b", "hidden_act": "gelu_new", "qkv_bias": True,
            "qk_normalization": False, "norm_type": "layer_norm", "image_size": 24,
        },
    }  # fmt: skip


def images_of(encoder: Encoder, record: Record, shape: Shape | None = None) -> dict[str, np.ndarray]:
    """A record's tiles or patches, and their grids, with the padding of a packed row."""
    (packed,) = encoder.packed([encoder.images(record)], shape or encoder.shape_of([record]), 1).values()
    return {"pixel_values": packed.values[0]} | ({} if packed.grid is None else {"image_grid_thw": packed.grid[0]})


def row_of(encoder: Encoder, record: Record) -> dict[str, np.ndarray]:
    """A record's training row with its images."""
    return encoder.training_row(record) | images_of(encoder, record)
