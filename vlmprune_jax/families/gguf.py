"""What llama.cpp computes: its architectures for decoders, its graphs for towers, and what each has no place for.

Source: llama.cpp of October 2026, src/models/*.cpp (which tensors are created, of which shapes), src/llama-model.cpp
(which way each architecture rotates) and tools/mtmd (clip.cpp, models/llava.cpp, models/internvl.cpp,
models/siglip.cpp, models/qwen2vl.cpp, models/qwen3vl.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.core.config import ModelConfig, ProjectorConfig, Stack, TextConfig, VisionConfig

NAME, WHEEL = "llama.cpp", "xllamacpp"  # the wheel has it ready to be loaded
ENGINE = "llama_cpp"  # among `--backends`


@dataclass(frozen=True)
class Architecture:
    """A decoder of llama.cpp by its name in files (`general.architecture`).

    `tensors`: module in `params["text"]` -> the tensor it lies in, both with the layer as `{i}`; several modules of one
    tensor are its rows, one after the other. `interleaved`: a rotary pair are neighbours there, halves of a head in
    Hugging Face's files. `per_layer`: every layer may have widths of its own. `free_heads`: the heads need not make up
    the hidden size. `partial`: a part of each head may be rotated. `sections`: by time, row and column. `own_head`: the
    head and its bias are tensors of their own, also where embeddings are tied or there is no bias. `activations`,
    `ropes` (beside "default") and `biases` (fields of `TextConfig`) are those that it computes. No architecture has a
    sliding window that works.
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
        """What of a decoder it does not compute, whatever the widths; None where it does."""
        absent = [name for name in ("qkv_bias", "out_bias", "mlp_bias") if getattr(text, name)]
        absent = [name for name in absent if name not in self.biases]
        if text.activation not in self.activations:
            return f"activation {text.activation} (its own is {' or '.join(self.activations)})"
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
        """What widths of a decoder it does not hold, and zero heads and neurons would mend; None where it does."""
        if not (text.even or self.per_layer):
            return "layers of unequal width"
        if not (self.free_heads or _whole(text)):
            return f"other numbers of heads than make up the hidden size ({text.hidden_size // text.head_dim})"
        return None


def _whole(stack: Stack) -> bool:
    return all(shape.q_heads * stack.head_dim == stack.hidden_size for shape in stack.layers)


_BLOCK = "layers/{i}/"
_LLAMA_TENSORS = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    **{
        f"{_BLOCK}{ours}": f"blk.{{i}}.{theirs}"
        for ours, theirs in {
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
        }.items()
    },
}
_PHI2_TENSORS = {
    "embed_tokens": "token_embd",
    "final_layernorm": "output_norm",
    "lm_head": "output",
    **{
        f"{_BLOCK}{ours}": f"blk.{{i}}.{theirs}"
        for ours, theirs in {
            "input_layernorm": "attn_norm",
            "self_attn/q_proj": "attn_q",
            "self_attn/k_proj": "attn_k",
            "self_attn/v_proj": "attn_v",
            "self_attn/dense": "attn_output",
            "mlp/fc1": "ffn_up",
            "mlp/fc2": "ffn_down",
        }.items()
    },
}
_PHI3_TENSORS = {
    **_LLAMA_TENSORS,
    **{f"{_BLOCK}self_attn/{name}_proj": "blk.{i}.attn_qkv" for name in "qkv"},
    **{f"{_BLOCK}mlp/{name}_proj": "blk.{i}.ffn_up" for name in ("gate", "up")},
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
DECI = Architecture(
    "deci",
    _LLAMA_TENSORS,
    ropes=("linear", "yarn", "llama3", "longrope"),
    biases=_BIASES,
    interleaved=True,
    free_heads=True,
    per_layer=True,
)
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
    **{
        f"{_BLOCK}{ours}": f"v.blk.{{i}}.{theirs}"
        for ours, theirs in {
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
        }.items()
    },
}
_JOINED_QKV = {f"{_BLOCK}self_attn/{name}_proj": "v.blk.{i}.attn_qkv" for name in "qkv"}
_PROJECTORS = {
    "mlp": {"linear_1": "mm.0", "linear_2": "mm.2"},
    "pixel_shuffle": {"layer_norm": "mm.model.mlp.0", "linear_1": "mm.model.mlp.1", "linear_2": "mm.model.mlp.3"},
    "linear": {"linear": "mm.model.fc"},
    "merger": {"patch_norm": "v.post_ln", "linear_1": "mm.0", "linear_2": "mm.2"},
}
# What it calls the graph of each kind.
_GRAPHS = {"mlp": "mlp", "pixel_shuffle": "internvl", "linear": "idefics3"}
_WINDOWS, _DEEPSTACK = "qwen2.5vl_merger", "qwen3vl_merger"
# It has the tanh approximation only, which is within 5e-4 of the error function's.
_GELU = ("gelu", *_TANH_GELU)
_NORM_EPS = 1e-5  # of the projector's norm
# Qwen's graphs: copies of an image and patches a side of a token, the rotary base, and pixels a side of a window.
_PATCHES, _TURNS, _WINDOW = 2, 10000.0, 112


def _graph(cfg: ModelConfig) -> str:
    vision, projector = _seeing(cfg)
    if projector.kind != "merger":
        return _GRAPHS[projector.kind]
    return _WINDOWS if vision.norm == "rms" else _DEEPSTACK


def _seeing(cfg: ModelConfig) -> tuple[VisionConfig, ProjectorConfig]:
    assert cfg.vision is not None
    assert cfg.projector is not None
    return cfg.vision, cfg.projector


def tower_tensors(cfg: ModelConfig) -> Mapping[str, str]:
    """Module in `params["vision"]` -> the tensor it lies in, with the layer as `{i}`."""
    return _TOWER_TENSORS | _JOINED_QKV if _graph(cfg) == _DEEPSTACK else _TOWER_TENSORS


def projector_tensors(cfg: ModelConfig) -> Mapping[str, str]:
    """Module in `params["projector"]` -> the tensor it lies in."""
    vision, projector = _seeing(cfg)
    return _PROJECTORS[projector.kind] | {
        f"deepstack/{number}/{ours}": f"v.deepstack.{block}.{theirs}"
        for number, block in enumerate(vision.deepstack)
        for ours, theirs in {"layer_norm": "norm", "linear_1": "fc1", "linear_2": "fc2"}.items()
    }


def tower_lacks(cfg: ModelConfig) -> str | None:
    """What of a model's tower or projector llama.cpp does not compute, whatever the widths; None where it does."""
    vision, projector = _seeing(cfg)
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
    return next((what for what, so in wrong.items() if so), None)


def _square_lacks(cfg: ModelConfig) -> dict[str, bool]:
    """What a tower for images of one size may have that is not computed -> whether it has."""
    vision, projector = _seeing(cfg)
    kept = "patch" if vision.class_token else "full"
    wrong = {
        f"features of kind {cfg.feature_select!r} of such a tower ({kept!r})": cfg.feature_select != kept,
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
    """The same of a tower for images of any size."""
    whole = [i for i, shape in enumerate(vision.layers) if shape.window is None]
    sides = sorted({shape.window for shape in vision.layers if shape.window is not None})
    window = _WINDOW // vision.patch_size // vision.merge
    return {
        f"patches of {vision.temporal} copies of an image ({_PATCHES})": vision.temporal != _PATCHES,
        f"tokens of {vision.merge} x {vision.merge} patches ({_PATCHES} x {_PATCHES})": vision.merge != _PATCHES,
        f"rotary base {vision.rope_theta:g} in a tower ({_TURNS:g})": vision.rope_theta != _TURNS,
        f"blocks {whole} of {len(vision.layers)} that see whole images (every n-th)": _every(vision) is None,
        f"windows of {', '.join(map(str, sides))} tokens a side ({window})": sides not in ([], [window]),
    }


def _every(vision: VisionConfig) -> int | None:
    """n where every n-th block sees a whole image and the others windows of it; None where it is otherwise."""
    whole, count = [shape.window is None for shape in vision.layers], len(vision.layers)
    return next((n for n in range(1, count + 2) if whole == [(i + 1) % n == 0 for i in range(count)]), None)


def tower_misfit(vision: VisionConfig) -> str | None:
    """What widths of a tower it does not hold, and zero heads would mend: each layer may have neurons of its own."""
    return None if _whole(vision) else "a vision tower whose heads do not make up its width"


def tower_fields(cfg: ModelConfig, cut: Mapping[str, int]) -> dict[str, Any]:
    """Metadata of a tower and its projector, named as methods `add_NAME` of `gguf.GGUFWriter`, or by a key's own name.

    `cut`: how an image becomes pieces, in a family that cuts, in the same names.
    """
    vision, projector = _seeing(cfg)
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
            fields["vision_n_wa_pattern"] = _every(vision)
        else:
            fields["vision_is_deepstack_layers"] = [i in vision.deepstack for i in range(len(vision.layers))]
    elif projector.shuffles:
        fields["vision_projector_scale_factor"] = projector.downsample
    else:  # without it LLaVA's graph leaves the last block out
        fields["clip.vision.feature_layer"] = [len(vision.layers)]
    return {**fields, **cut}


# Tokenizers -----------------------------------------------------------------------------------------------------------

# What llama.cpp calls tokenizers whose words begin with a space mark, and those of bytes.
SPACED, BYTE_LEVEL = "llama", "gpt2"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SUFFIX|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SUFFIX|"
)
_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Rules of a byte-level tokenizer, as export/gguf_tokenizer.py spells them -> what llama.cpp calls them.
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
# Words that are tokens as a whole are taken as such there, whatever the merges say.
WHOLE_WORDS = ("llama-bpe", "tekken")
# The split of a tokenizer whose words all are such.
OF_WORDS = "llama-bpe"
# In a model with this in its name all marks but these drop the white space behind them, as in Phi-3's tokenizer.
DROPPING_NAME, KEEPING_MARKS = re.compile("phi-?3", re.IGNORECASE), {"<unk>", "<s>", "<|endoftext|>"}
