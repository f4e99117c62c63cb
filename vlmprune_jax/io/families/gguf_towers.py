"""llama.cpp's graphs for towers and projectors (tools/mtmd of October 2026), and the models that each cannot represent.

Source: clip.cpp, models/llava.cpp, models/internvl.cpp, models/siglip.cpp, models/qwen2vl.cpp, models/qwen3vl.cpp and
models/gemma4v.cpp there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.io.families.gguf import BLOCK, TANH_GELU, full_attention_period
from vlmprune_jax.io.families.table import in_layers
from vlmprune_jax.io.families.towers import projector_of, vision_of

TOWER = "clip"  # general.architecture
_TOWER_TENSORS = {
    "class_embedding": "v.class_embd",
    "patch_embedding": "v.patch_embd",
    "position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
    "post_layernorm": "v.post_ln",
    **in_layers(
        {
            **BLOCK,
            "layer_norm1": "ln1",
            "self_attn/out_proj": "attn_out",
            "attention_output_norm": "attn_post_norm",
            "mlp_output_norm": "ffn_post_norm",
            "layer_scale1": "ls1",
            "layer_norm2": "ln2",
            "layer_scale2": "ls2",
        },
        "v.blk",
    ),
}
_JOINED_QKV = in_layers({f"self_attn/{name}_proj": "attn_qkv" for name in "qkv"}, "v.blk")
_PROJECTORS = {
    "mlp": {"linear_1": "mm.0", "linear_2": "mm.2"},
    "pixel_shuffle": {"layer_norm": "mm.model.mlp.0", "linear_1": "mm.model.mlp.1", "linear_2": "mm.model.mlp.3"},
    "linear": {"linear": "mm.model.fc"},
    "merger": {"patch_norm": "v.post_ln", "linear_1": "mm.0", "linear_2": "mm.2"},
    "pool": {
        "pool_norm": "mm.soft_emb_norm",
        "linear": "mm.input_projection",
        "std_bias": "v.std_bias",
        "std_scale": "v.std_scale",
    },
}
# Endings of tensor names to which llama.cpp does not append ".weight".
WITHOUT_LEAF = ("v.class_embd", "v.std_bias", "v.std_scale", ".scale", ".bias", ".ssm_a")
# llama.cpp's name of the graph for each projector kind.
_GRAPHS = {"mlp": "mlp", "pixel_shuffle": "internvl", "linear": "idefics3"}
_UNSHUFFLE = "lfm2"
_WINDOWS, _DEEPSTACK = "qwen2.5vl_merger", "qwen3vl_merger"
_POOLED, _POOLED_ANY_SIZE = "gemma3", "gemma4v"
# llama.cpp has only the tanh approximation, which is within 5e-4 of the exact GELU.
_GELU = ("gelu", *TANH_GELU)
_NORM_EPS = 1e-5  # of the projector's norm
# Constants of Qwen's graphs: image copies per patch (also patches per side of a token), rotary base, window side (px).
_PATCHES, _ROPE_BASE, _WINDOW = 2, 10000.0, 112
_POOLED_ROPE_BASE, LEAST_TOKENS = 100.0, 70  # constants of Gemma 4's graph: rotary base, minimum tokens per image


def _graph(cfg: ModelConfig) -> str:
    vision, projector = vision_of(cfg), projector_of(cfg)
    if projector.pools:
        return _POOLED_ANY_SIZE if vision.dynamic_resolution else _POOLED
    if projector.kind == "pixel_shuffle" and vision.dynamic_resolution:
        return _UNSHUFFLE
    if projector.kind != "merger":
        return _GRAPHS[projector.kind]
    return _WINDOWS if vision.block.norm == "rms" else _DEEPSTACK


def tower_tensors(cfg: ModelConfig) -> Mapping[str, str]:
    """Return {module path in `params["vision"]`: GGUF tensor name}, with `{i}` for the layer number."""
    return _TOWER_TENSORS | _JOINED_QKV if _graph(cfg) == _DEEPSTACK else _TOWER_TENSORS


def projector_tensors(cfg: ModelConfig) -> Mapping[str, str]:
    """Return {module path in `params["projector"]`: GGUF tensor name}."""
    vision, projector = vision_of(cfg), projector_of(cfg)
    if _graph(cfg) == _UNSHUFFLE:
        return {"layer_norm": "mm.input_norm", "linear_1": "mm.1", "linear_2": "mm.2"}
    return _PROJECTORS[projector.kind] | {
        f"deepstack/{number}/{ours}": f"v.deepstack.{block}.{theirs}"
        for number, block in enumerate(vision.deepstack)
        for ours, theirs in {"layer_norm": "norm", "linear_1": "fc1", "linear_2": "fc2"}.items()
    }


def tower_lacks(cfg: ModelConfig) -> str | None:
    """Return a feature of tower or projector that llama.cpp does not implement; None if it has all."""
    vision, projector = vision_of(cfg), projector_of(cfg)
    wrong = {
        f"tower with activation {vision.channel.activation}": vision.channel.activation
        not in (*_GELU, "quick_gelu", "silu"),
        f"images of {vision.channels} channels (3)": vision.channels != 3,
        **(_patches_lack(cfg) if vision.dynamic_resolution else _square_lacks(cfg)),
    }
    if projector.kind == "linear":
        wrong["projector with a bias"] = projector.bias
    elif not projector.pools:
        wrong[f"projector with activation {projector.activation}"] = projector.activation not in _GELU
        wrong["projector without biases"] = not projector.bias
    return next((feature for feature, present in wrong.items() if present), None)


def _square_lacks(cfg: ModelConfig) -> dict[str, bool]:
    """Return {unsupported feature: True if the model has it}, for towers with one image size."""
    vision, projector = vision_of(cfg), projector_of(cfg)
    select = "patch" if vision.class_token else "full"
    size = 0 if vision.positions is None else vision.positions.image_size
    wrong = {
        f"feature selection {cfg.feature_select!r} with such a tower ({select!r})": cfg.feature_select != select,
        f"images of another size ({vision.image_size}) than its tower's positions ({size})": (
            size not in (0, vision.image_size)
        ),
    }
    if projector.kind == "mlp":
        wrong["layer scales under LLaVA's projector"] = vision.block.layer_scale
    elif projector.kind == "linear":
        wrong["one linear map behind a tower with a class token"] = vision.class_token
    elif not projector.pools:
        wrong["pixel shuffle over a tower without class token"] = not vision.class_token
        wrong[f"projector with layer norm eps {projector.norm_eps:g} ({_NORM_EPS:g})"] = projector.norm_eps != _NORM_EPS
    if projector.shuffles:
        wrong[f"pixel shuffle {projector.shuffle_version} (v2)"] = projector.shuffle_version != "v2"
    return wrong


def _patches_lack(cfg: ModelConfig) -> dict[str, bool]:
    vision, projector = vision_of(cfg), projector_of(cfg)
    if _graph(cfg) == _UNSHUFFLE:
        eps = projector.norm_eps
        return {f"projector with layer norm eps {eps:g} ({_NORM_EPS:g})": projector.input_norm and eps != _NORM_EPS}
    base = _POOLED_ROPE_BASE if projector.pools else _ROPE_BASE
    theta = 0.0 if vision.attention.rope is None else vision.attention.rope.theta
    wrong = {f"rotary base {theta:g} in a tower ({base:g})": theta != base}
    if projector.pools:
        grouped = any(shape.mixer.q_heads != shape.mixer.kv_heads for shape in vision.layers)
        return wrong | {"towers with grouped-query attention": grouped}
    whole = [i for i, shape in enumerate(vision.layers) if shape.mixer.window is None]
    sides = sorted({shape.mixer.window for shape in vision.layers if shape.mixer.window is not None})
    window = _WINDOW // vision.patch_size // vision.merge
    return wrong | {
        f"patches of {vision.patches.temporal} copies of an image ({_PATCHES})": vision.patches.temporal != _PATCHES,
        f"tokens of {vision.merge} x {vision.merge} patches ({_PATCHES} x {_PATCHES})": vision.merge != _PATCHES,
        f"full attention in blocks {whole} of {len(vision.layers)} (every n-th)": full_attention_period(vision.layers)
        is None,
        f"windows of {', '.join(map(str, sides))} tokens per side ({window})": sides not in ([], [window]),
    }


def tower_fields(cfg: ModelConfig) -> dict[str, Any]:
    """Return GGUF metadata of vision tower and projector.

    A name in the result is a GGUF key, or the NAME of a method `add_NAME` of `gguf.GGUFWriter`.
    """
    vision, projector = vision_of(cfg), projector_of(cfg)
    size = (vision.dynamic_resolution and vision.positions and vision.positions.image_size) or vision.image_size
    fields: dict[str, Any] = {
        "clip_has_vision_encoder": True,
        "clip_projector_type": _graph(cfg),
        "vision_image_size": size,
        "vision_patch_size": vision.patch_size,
        "vision_embedding_length": vision.hidden_size,
        "vision_feed_forward_length": max(shape.sizes["mlp"] for shape in vision.layers),
        "vision_block_count": len(vision.layers),
        "vision_head_count": vision.hidden_size // vision.attention.head_dim,
        "vision_projection_dim": cfg.text.hidden_size,
        "vision_attention_layernorm_eps": vision.block.norm_eps,
        "vision_use_gelu": vision.channel.activation in _GELU,
        "vision_use_silu": vision.channel.activation == "silu",
    }
    if projector.pools or _graph(cfg) == _UNSHUFFLE or (projector.shuffles and not vision.dynamic_resolution):
        fields["vision_projector_scale_factor"] = projector.downsample
    elif vision.dynamic_resolution:
        fields["vision_spatial_merge_size"] = vision.merge
        if _graph(cfg) == _WINDOWS:
            fields["vision_n_wa_pattern"] = full_attention_period(vision.layers)
        else:
            fields["vision_is_deepstack_layers"] = [i in vision.deepstack for i in range(len(vision.layers))]
    else:  # otherwise LLaVA's graph skips the last block
        fields["clip.vision.feature_layer"] = [len(vision.layers)]
    return fields
