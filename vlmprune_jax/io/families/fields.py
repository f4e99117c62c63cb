"""Types and bounds of config.json fields, checked before anything is built from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError

# More layers than any real model has; a larger number in a file would allocate as many layer shapes.
MAX_LAYERS = 1000
# Experts of a layer, more than any real model has; every expert has places in the checkpoint (`hf.layout.make_slots`).
MAX_EXPERTS = 4096
# Pixels per side, more than any real tower has; images are resized before the config is compared with the weights.
MAX_SIDE = 4096
_MAX = 2**31 - 1


def _whole(value: Any, most: int = _MAX) -> bool:
    return type(value) is int and 1 <= value <= most


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1e30  # neither infinite nor NaN


def _positive(value: Any) -> bool:
    return _number(value) and value >= 1e-9


def _integer(value: Any) -> bool:
    return type(value) is int and abs(value) <= _MAX


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX


def _name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _list_of(kind: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and all(map(kind, value))


# (expected value in words, its test, names of fields; "?": the field may also be null)
_KINDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "a whole number above 0",
        _whole,
        "vocab_size hidden_size intermediate_size num_attention_heads max_position_embeddings num_channels "
        "scale_factor min_dynamic_patch max_dynamic_patch num_heads in_channels spatial_merge_size "
        "temporal_patch_size window_size out_hidden_size num_position_embeddings linear_conv_kernel_dim "
        "linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads conv_L_cache "
        "projector_hidden_size downsample_factor num_patches block_multiple_of num_key_value_heads? head_dim? "
        "sliding_window? original_max_position_embeddings? sliding_window_pattern? mm_tokens_per_image? "
        "global_head_dim? num_global_key_value_heads? vocab_size_per_layer_input? pooling_kernel_size? "
        "position_embedding_size? block_ff_dim? num_experts_per_tok? top_k_experts? moe_intermediate_size? "
        "decoder_sparse_step? full_attention_interval?",
    ),
    (
        f"a whole number from 1 to {MAX_EXPERTS}",
        lambda v: _whole(v, MAX_EXPERTS),
        "num_experts? num_local_experts?",
    ),
    (f"a whole number from 1 to {MAX_LAYERS}", lambda v: _whole(v, MAX_LAYERS), "num_hidden_layers depth"),
    (
        f"a whole number from 1 to {MAX_SIDE}, or a pair of them",
        lambda v: all(_whole(side, MAX_SIDE) for side in (v if isinstance(v, list) and len(v) == 2 else [v])),
        "image_size patch_size force_image_size?",
    ),
    ("a number", _number, "rms_norm_eps layer_norm_eps norm_eps final_logit_softcapping?"),
    ("a whole number from 0", _natural, "num_kv_shared_layers? hidden_size_per_layer_input? mtp_num_hidden_layers?"),
    ("true, false or a name", lambda v: isinstance(v, bool) or _name(v), "use_bidirectional_attention?"),
    (
        "an object of objects by layer number",
        lambda v: isinstance(v, dict) and all(k.isdecimal() and isinstance(entry, dict) for k, entry in v.items()),
        "per_layer_config?",
    ),
    (
        "a number above 0",
        _positive,
        "rope_theta downsample_ratio factor low_freq_factor high_freq_factor partial_rotary_factor? attention_factor? "
        "beta_fast? beta_slow? rope_local_base_freq? query_pre_attn_scalar? block_ffn_dim_multiplier?",
    ),
    ("an integer", _integer, "mm_vision_select_layer select_layer max_window_layers? mm_hidden_size?"),
    ("an integer", lambda v: _integer(v) or _list_of(_integer, v), "vision_feature_layer"),
    ("a token id", _integer, "image_token_id image_token_index video_token_id bos_token_id? pad_token_id?"),
    ("a token id or a list of them", lambda v: _integer(v) or _list_of(_integer, v), "eos_token_id?"),
    (
        "a list of whole numbers from 0",
        lambda v: _list_of(_natural, v),
        "deepstack_visual_indexes fullatt_block_indexes mrope_section mlp_only_layers? full_attn_idxs?",
    ),
    ("a list of numbers above 0", lambda v: _list_of(_positive, v), "short_factor long_factor"),
    (
        "a list of [query heads, key/value heads, neurons]",
        lambda v: _list_of(lambda row: _list_of(_whole, row) and len(row) == 3, v),
        "per_layer_shapes?",
    ),
    ("a list of names", lambda v: _list_of(_name, v), "layer_types? architectures?"),
    ("an object of names", lambda v: isinstance(v, dict) and _list_of(_name, [*v]), "auto_map?"),
    (
        "true or false",
        lambda v: isinstance(v, bool),
        "tie_word_embeddings? attention_bias? mlp_bias? qkv_bias? use_sliding_window? qk_layernorm? "
        "multimodal_projector_bias? use_s2? qk_normalization? use_qk_norm? use_mean_pooling? "
        "use_absolute_position_embeddings? vision_use_head? dynamic_image_size? use_thumbnail? pad2square? "
        "attention_k_eq_v? use_double_wide_mlp? use_clipped_linears? standardize? enable_moe_block? norm_topk_prob? "
        "conv_bias? tie_embedding? projector_bias? projector_use_layernorm? block_auto_adjust_ff_dim?",
    ),
    (
        "a text",
        lambda v: isinstance(v, str),
        "model_type hidden_act hidden_activation projector_hidden_act rope_type type ps_version template? "
        "mm_projector_type? mm_vision_tower? norm_type? mm_vision_select_feature? vision_feature_select_strategy? "
        "image_aspect_ratio? transformers_version?",
    ),
    (
        "an object",
        lambda v: isinstance(v, dict),
        "text_config? llm_config? vision_config? rope_scaling? rope_parameters? full_attention? sliding_attention?",
    ),
)
# {field: (expected value in words, its test, True if it may be null)}
_EXPECTED = {
    name.rstrip("?"): (text, test, name.endswith("?")) for text, test, names in _KINDS for name in names.split()
}
_SECTIONS = [name for name, (text, _, _) in _EXPECTED.items() if text == "an object"]


def check_fields(config: Mapping[str, Any], location: str, prefix: str = "") -> None:
    """Raise UserError if a known field of config.json has an unsupported value.

    Args:
      config: content of a config.json or generation_config.json, or of its section `prefix`.
      location: name of the file, for messages.
    """
    for name, value in config.items():
        text, test, nullable = _EXPECTED.get(name, ("", lambda value: True, True))
        if not (test(value) or (nullable and value is None)):
            shown = repr(value)
            shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
            raise UserError(
                f"{location}: field {prefix}{name} is {shown}, expected {text}: correct or restore the file"
            )
        if name in _SECTIONS and value is not None:
            check_fields(value, location, f"{prefix}{name}.")
