"""llama.cpp's architectures for decoders and graphs for towers, and the models that each cannot represent.

Source: llama.cpp of October 2026, src/models/*.cpp (which tensors are created, of which shapes), src/llama-model.cpp
(which way each architecture rotates) and tools/mtmd (clip.cpp, models/llava.cpp, models/internvl.cpp,
models/siglip.cpp, models/qwen2vl.cpp, models/qwen3vl.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlmprune_jax.core.config import ModelConfig, TextConfig, VisionConfig
from vlmprune_jax.core.projector import ProjectorConfig

NAME, WHEEL = "llama.cpp", "xllamacpp"  # the wheel contains the compiled library
ENGINE = "llama_cpp"  # its name in `--backends`


@dataclass(frozen=True)
class Architecture:
    """Decoder architecture of llama.cpp and its limits; named as in GGUF files (`general.architecture`).

    `tensors` maps a module in `params["text"]` to the tensor that holds it, both with the layer as `{i}`; modules that
    share a tensor are its rows, in order. Features of the architecture: `activations`, `ropes` (beside "default") and
    `biases` (fields of `TextConfig`) that it computes; `interleaved`: a rotary pair are neighbouring channels (in
    Hugging Face files they are halves of a head); `per_layer`: layers may have different widths; `free_heads`: heads x
    head_dim may differ from the hidden size; `partial`: only part of each head may be rotated; `sections`: rotary
    positions by time, row and column; `own_head`: output head and bias are always stored, even if tied or absent in the
    model. Sliding windows work in none of them.
    """

    name: str
    tensors: Mapping[str, str]
    activations: tuple[str, ...] = ("silu",)
    ropes: tuple[str, ...] = ("linear", "yarn")
    biases: tuple[str, ...] = ()
    interleaved: bool = False
    per_layer: bool = False
    free_heads: bool = False
    partial: bool = False
    sections: bool = False
    own_head: bool = False

    def lacks(self, text: TextConfig) -> str | None:
        """Return a decoder feature that this architecture does not implement; None if it implements all."""
        absent = [name for name in _BIASES if getattr(text, name) and name not in self.biases]
        if text.activation not in self.activations:
            return f"activation {text.activation} (it has {' or '.join(self.activations)})"
        if absent:
            return f"biases ({', '.join(absent)})"
        if text.rope.kind not in ("default", *self.ropes):
            return f"{text.rope.kind} rope"
        if bool(text.rope.sections) != self.sections:
            return f"rotary embedding {'by rows and columns' if text.rope.sections else 'by one position'}"
        if text.rotary_dim != text.head_dim and not self.partial:
            return f"rotary embedding of {text.rotary_dim} of {text.head_dim} channels"
        return None

    def misfit(self, text: TextConfig) -> str | None:
        """Return the layer widths that this architecture cannot hold without zero-padding; None if all fit."""
        if not (text.even or self.per_layer):
            return "layers of unequal width"
        heads = text.hidden_size // text.head_dim
        if not self.free_heads and any(shape.q_heads * text.head_dim != text.hidden_size for shape in text.layers):
            return f"other numbers of heads than hidden_size / head_dim ({heads})"
        return None


def _block_tensors(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"layers/{{i}}/{module}": f"{prefix}.{{i}}.{tensor}" for module, tensor in names.items()}


_LLAMA_TENSORS = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    **_block_tensors(
        "blk",
        {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn/q_proj": "attn_q",
            "self_attn/k_proj": "attn_k",
            "self_attn/v_proj": "attn_v",
            "self_attn/o_proj": "attn_output",
            "self_attn/q_norm": "attn_q_norm",
            "self_attn/k_norm": "attn_k_norm",
            "mlp/gate_proj": "ffn_gate",
            "mlp/up_proj": "ffn_up",
            "mlp/down_proj": "ffn_down",
        },
    ),
}
_PHI2_TENSORS = {
    "embed_tokens": "token_embd",
    "final_layernorm": "output_norm",
    "lm_head": "output",
    **_block_tensors(
        "blk",
        {
            "input_layernorm": "attn_norm",
            "self_attn/q_proj": "attn_q",
            "self_attn/k_proj": "attn_k",
            "self_attn/v_proj": "attn_v",
            "self_attn/dense": "attn_output",
            "mlp/fc1": "ffn_up",
            "mlp/fc2": "ffn_down",
        },
    ),
}
_PHI3_TENSORS = {
    **_LLAMA_TENSORS,
    **_block_tensors("blk", {f"self_attn/{name}_proj": "attn_qkv" for name in "qkv"}),
    **_block_tensors("blk", {"mlp/gate_proj": "ffn_up", "mlp/up_proj": "ffn_up"}),
}
_BIASES = ("qkv_bias", "out_bias", "mlp_bias")
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")

LLAMA = Architecture(
    "llama",
    _LLAMA_TENSORS,
    ropes=("linear", "yarn", "llama3", "longrope"),
    biases=_BIASES,
    interleaved=True,
    free_heads=True,
)
DECI = replace(LLAMA, name="deci", per_layer=True)
QWEN2 = Architecture("qwen2", _LLAMA_TENSORS, biases=("qkv_bias",))
QWEN3 = Architecture("qwen3", _LLAMA_TENSORS, free_heads=True)
QWEN2VL = Architecture("qwen2vl", _LLAMA_TENSORS, biases=("qkv_bias",), ropes=(), sections=True)
QWEN3VL = Architecture("qwen3vl", _LLAMA_TENSORS, ropes=(), free_heads=True, sections=True)
PHI2 = Architecture("phi2", _PHI2_TENSORS, activations=_TANH_GELU, biases=_BIASES, partial=True, own_head=True)
PHI3 = Architecture("phi3", _PHI3_TENSORS, ropes=("linear", "yarn", "longrope"), partial=True)


# Towers ---------------------------------------------------------------------------------------------------------------

TOWER = "clip"  # general.architecture
_TOWER_TENSORS = {
    "class_embedding": "v.class_embd",
    "patch_embedding": "v.patch_embd",
    "position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
    "post_layernorm": "v.post_ln",
    **_block_tensors(
        "v.blk",
        {
            "layer_norm1": "ln1",
            "self_attn/q_proj": "attn_q",
            "self_attn/k_proj": "attn_k",
            "self_attn/v_proj": "attn_v",
            "self_attn/out_proj": "attn_out",
            "layer_scale1": "ls1",
            "layer_norm2": "ln2",
            "mlp/fc1": "ffn_up",
            "mlp/fc2": "ffn_down",
            "mlp/gate_proj": "ffn_gate",
            "mlp/up_proj": "ffn_up",
            "mlp/down_proj": "ffn_down",
            "layer_scale2": "ls2",
        },
    ),
}
_JOINED_QKV = _block_tensors("v.blk", {f"self_attn/{name}_proj": "attn_qkv" for name in "qkv"})
_PROJECTORS = {
    "mlp": {"linear_1": "mm.0", "linear_2": "mm.2"},
    "pixel_shuffle": {"layer_norm": "mm.model.mlp.0", "linear_1": "mm.model.mlp.1", "linear_2": "mm.model.mlp.3"},
    "linear": {"linear": "mm.model.fc"},
    "merger": {"patch_norm": "v.post_ln", "linear_1": "mm.0", "linear_2": "mm.2"},
}
# llama.cpp's name of the graph for each projector kind.
_GRAPHS = {"mlp": "mlp", "pixel_shuffle": "internvl", "linear": "idefics3"}
_WINDOWS, _DEEPSTACK = "qwen2.5vl_merger", "qwen3vl_merger"
# llama.cpp has only the tanh approximation, which is within 5e-4 of the exact GELU.
_GELU = ("gelu", *_TANH_GELU)
_NORM_EPS = 1e-5  # of the projector's norm
# Constants of Qwen's graphs: image copies per patch (also patches per side of a token), rotary base, window side (px).
_PATCHES, _ROPE_BASE, _WINDOW = 2, 10000.0, 112


def _graph(cfg: ModelConfig) -> str:
    vision, projector = _vision_and_projector(cfg)
    if projector.kind != "merger":
        return _GRAPHS[projector.kind]
    return _WINDOWS if vision.norm == "rms" else _DEEPSTACK


def _vision_and_projector(cfg: ModelConfig) -> tuple[VisionConfig, ProjectorConfig]:
    assert cfg.vision is not None
    assert cfg.projector is not None
    return cfg.vision, cfg.projector


def tower_tensors(cfg: ModelConfig) -> Mapping[str, str]:
    """Return {module in `params["vision"]`: name of its GGUF tensor, with `{i}` for the layer}."""
    return _TOWER_TENSORS | _JOINED_QKV if _graph(cfg) == _DEEPSTACK else _TOWER_TENSORS


def projector_tensors(cfg: ModelConfig) -> Mapping[str, str]:
    """Return {module in `params["projector"]`: name of its GGUF tensor}."""
    vision, projector = _vision_and_projector(cfg)
    return _PROJECTORS[projector.kind] | {
        f"deepstack/{number}/{ours}": f"v.deepstack.{block}.{theirs}"
        for number, block in enumerate(vision.deepstack)
        for ours, theirs in {"layer_norm": "norm", "linear_1": "fc1", "linear_2": "fc2"}.items()
    }


def tower_lacks(cfg: ModelConfig) -> str | None:
    """Return a feature of tower or projector that llama.cpp does not implement; None if it implements all."""
    vision, projector = _vision_and_projector(cfg)
    wrong = {
        f"tower with activation {vision.activation}": vision.activation not in (*_GELU, "quick_gelu", "silu"),
        f"images of {vision.channels} channels (3)": vision.channels != 3,
        **(_patches_lack(vision) if vision.any_size else _square_lacks(cfg)),
    }
    if projector.kind == "linear":
        wrong["projector with a bias"] = projector.bias
    else:
        wrong[f"projector with activation {projector.activation}"] = projector.activation not in _GELU
        wrong["projector without biases"] = not projector.bias
    return next((feature for feature, present in wrong.items() if present), None)


def _square_lacks(cfg: ModelConfig) -> dict[str, bool]:
    """Return {unsupported feature: True if the model has it} for towers with one image size."""
    vision, projector = _vision_and_projector(cfg)
    select = "patch" if vision.class_token else "full"
    wrong = {
        f"feature selection {cfg.feature_select!r} with such a tower ({select!r})": cfg.feature_select != select,
        f"images of another size ({vision.image_size}) than its tower's positions ({vision.position_size})": (
            vision.position_size not in (0, vision.image_size)
        ),
    }
    if projector.kind == "mlp":
        wrong["layer scales under LLaVA's projector"] = vision.layer_scale
    elif projector.kind == "linear":
        wrong["one linear map behind a tower with a class token"] = vision.class_token
    else:
        wrong["pixel shuffle over a tower without class token"] = not vision.class_token
        wrong[f"projector with layer norm eps {projector.norm_eps:g} ({_NORM_EPS:g})"] = projector.norm_eps != _NORM_EPS
    if projector.shuffles:
        wrong[f"pixel shuffle {projector.shuffle_version} (v2)"] = projector.shuffle_version != "v2"
    return wrong


def _patches_lack(vision: VisionConfig) -> dict[str, bool]:
    """Return {unsupported feature: True if the model has it} for towers with images of any size."""
    whole = [i for i, shape in enumerate(vision.layers) if shape.window is None]
    sides = sorted({shape.window for shape in vision.layers if shape.window is not None})
    window = _WINDOW // vision.patch_size // vision.merge
    return {
        f"patches of {vision.temporal} copies of an image ({_PATCHES})": vision.temporal != _PATCHES,
        f"tokens of {vision.merge} x {vision.merge} patches ({_PATCHES} x {_PATCHES})": vision.merge != _PATCHES,
        f"rotary base {vision.rope_theta:g} in a tower ({_ROPE_BASE:g})": vision.rope_theta != _ROPE_BASE,
        f"full attention in blocks {whole} of {len(vision.layers)} (every n-th)": _full_attention_period(vision)
        is None,
        f"windows of {', '.join(map(str, sides))} tokens per side ({window})": sides not in ([], [window]),
    }


def _full_attention_period(vision: VisionConfig) -> int | None:
    """Return n if exactly every n-th block has full attention and all others have windows; None otherwise."""
    whole, count = [shape.window is None for shape in vision.layers], len(vision.layers)
    return next((n for n in range(1, count + 2) if whole == [(i + 1) % n == 0 for i in range(count)]), None)


def tower_misfit(vision: VisionConfig) -> str | None:
    """Return the tower widths that llama.cpp cannot hold without adding zero heads; None if all fit."""
    return None if vision.whole_heads else "a vision tower whose heads x head_dim differ from its width"


def tower_fields(cfg: ModelConfig, cut: Mapping[str, int]) -> dict[str, Any]:
    """Return GGUF metadata of tower and projector, by `add_NAME` methods of `gguf.GGUFWriter` or by key.

    `cut`: further metadata about the tiles or pieces that images are cut into.
    """
    vision, projector = _vision_and_projector(cfg)
    size = vision.position_size if vision.any_size and vision.table else vision.image_size
    fields: dict[str, Any] = {
        "clip_has_vision_encoder": True,
        "clip_projector_type": _graph(cfg),
        "vision_image_size": size,
        "vision_patch_size": vision.patch_size,
        "vision_embedding_length": vision.hidden_size,
        "vision_feed_forward_length": max(shape.mlp for shape in vision.layers),
        "vision_block_count": len(vision.layers),
        "vision_head_count": vision.hidden_size // vision.head_dim,
        "vision_projection_dim": cfg.text.hidden_size,
        "vision_attention_layernorm_eps": vision.norm_eps,
        "vision_use_gelu": vision.activation in _GELU,
        "vision_use_silu": vision.activation == "silu",
    }
    if vision.any_size:
        fields["vision_spatial_merge_size"] = vision.merge
        if _graph(cfg) == _WINDOWS:
            fields["vision_n_wa_pattern"] = _full_attention_period(vision)
        else:
            fields["vision_is_deepstack_layers"] = [i in vision.deepstack for i in range(len(vision.layers))]
    elif projector.shuffles:
        fields["vision_projector_scale_factor"] = projector.downsample
    else:  # otherwise LLaVA's graph skips the last block
        fields["clip.vision.feature_layer"] = [len(vision.layers)]
    return {**fields, **cut}


# Tokenizers -----------------------------------------------------------------------------------------------------------

# llama.cpp's names of SentencePiece and of byte-level BPE tokenizers.
SPACED, BYTE_LEVEL = "llama", "gpt2"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SUFFIX|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SUFFIX|"
)
_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Pre-tokenizer rules of a byte-level tokenizer, as export/gguf_tokenizer.py spells them -> llama.cpp's name for them.
WORDS, BYTES = "ByteLevel words", "ByteLevel"
PRE: dict[tuple[str, ...], str] = {
    (WORDS,): "gpt-2",
    ("Digits", WORDS): "smollm",
    (
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        BYTES,
    ): "llama-bpe",
    (
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        BYTES,
    ): "qwen2",
    (_CASED.replace("SUFFIX", "") + r"\p{N}" + _ENDS, BYTES): "tekken",
    (_CASED.replace("SUFFIX", f"{_CONTRACTIONS}?") + r"\p{N}{1,3}" + _ENDS, BYTES): "gpt-4o",
}
# Pre-tokenizers with which llama.cpp takes a word that is a token as that token, without applying merges.
WHOLE_WORDS = ("llama-bpe", "tekken")
# Pre-tokenizer for a vocabulary in which every word is a token.
OF_WORDS = "llama-bpe"
# In models with this name all special tokens but these strip the white space after them, as in Phi-3's tokenizer.
DROPPING_NAME, KEEPING_MARKS = re.compile("phi-?3", re.IGNORECASE), {"<unk>", "<s>", "<|endoftext|>"}
