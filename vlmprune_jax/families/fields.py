"""What the fields of a config.json may hold: a damaged one is refused by the field's name, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlmprune_jax.errors import UserError

# More layers than any model has: a number beyond would be a list of as many shapes.
MAX_LAYERS = 1000
_MAX = 2**31 - 1


def _whole(value: Any, most: int = _MAX) -> bool:
    return type(value) is int and 1 <= value <= most


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1e30  # neither infinite nor NaN


def _integer(value: Any) -> bool:
    return type(value) is int and abs(value) <= _MAX


def _list_of(kind: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and all(map(kind, value))


# What is expected -> how to tell, the fields, and those that may be null as well.
_Kind = tuple[str, Callable[[Any], bool], tuple[str, ...], tuple[str, ...]]
_KINDS: tuple[_Kind, ...] = (
    (
        "a whole number above 0",
        _whole,
        ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings",
         "num_channels", "min_dynamic_patch", "max_dynamic_patch"),
        ("num_key_value_heads", "head_dim", "sliding_window", "original_max_position_embeddings", "force_image_size"),
    ),
    (f"a whole number from 1 to {MAX_LAYERS}", lambda v: _whole(v, MAX_LAYERS), ("num_hidden_layers",), ()),
    (
        "a whole number above 0, or a pair of them",
        lambda v: _whole(v) or (_list_of(_whole, v) and len(v) == 2),
        ("image_size", "patch_size"),
        (),
    ),
    (
        "a number",
        _number,
        ("rms_norm_eps", "layer_norm_eps", "rope_theta", "downsample_ratio", "factor", "low_freq_factor",
         "high_freq_factor"),
        ("partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow"),
    ),
    ("an integer", _integer, (), ("max_window_layers", "mm_hidden_size")),
    ("a token id", _integer, ("image_token_id", "image_token_index"), ("bos_token_id", "pad_token_id")),
    ("a token id or a list of them", lambda v: _integer(v) or _list_of(_integer, v), (), ("eos_token_id",)),
    ("a list of numbers", lambda v: _list_of(_number, v), ("short_factor", "long_factor"), ()),
    (
        "a list of [query heads, key/value heads, neurons]",
        lambda v: _list_of(lambda row: _list_of(_whole, row) and len(row) == 3, v),
        (),
        ("per_layer_shapes",),
    ),
    ("a list of names", lambda v: _list_of(lambda one: isinstance(one, str), v), (), ("layer_types", "architectures")),
    (
        "true or false",
        lambda v: isinstance(v, bool),
        (),
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias", "use_sliding_window"),
    ),
    (
        "a text",
        lambda v: isinstance(v, str),
        ("model_type", "hidden_act", "projector_hidden_act", "rope_type", "type", "ps_version"),
        ("template", "mm_projector_type", "mm_vision_tower"),
    ),
    (
        "an object",
        lambda v: isinstance(v, dict),
        (),
        ("text_config", "llm_config", "vision_config", "rope_scaling", "rope_parameters", "auto_map"),
    ),
)  # fmt: skip
_EXPECTED = {
    name: (text, test, name in nullable) for text, test, required, nullable in _KINDS for name in (*required, *nullable)
}
_SECTIONS = ("text_config", "llm_config", "vision_config", "rope_scaling", "rope_parameters")


def check_fields(config: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Refuse a config whose known fields hold something else than they can.

    Args:
      config: the content of a config.json or generation_config.json, or (`prefix`) one of its sections.
      where: the file, for messages.

    Raises:
      UserError: names the file, the field and what it may hold.
    """
    for name, value in config.items():
        text, test, nullable = _EXPECTED.get(name, ("", lambda value: True, True))
        if not (test(value) or (nullable and value is None)):
            shown = repr(value)
            shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
            raise UserError(f"{where}: {prefix}{name} is {shown}, expected {text}: is the file damaged?")
        if name in _SECTIONS and value is not None:
            check_fields(value, where, f"{prefix}{name}.")
