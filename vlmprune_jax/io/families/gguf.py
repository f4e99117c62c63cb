"""llama.cpp's decoder architectures and tokenizers, and the models that each of them cannot represent.

Source: llama.cpp of October 2026, src/models/*.cpp (which tensors are created, of which shapes) and src/llama-model.cpp
(which way each architecture rotates).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from vlmprune_jax.core.channels import Experts, ExpertsAndShared, ExpertsBesideDense
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.mixers import Attention, DeltaNet, Mixer, ShortConv

NAME, WHEEL = "llama.cpp", "xllamacpp"  # the wheel contains the compiled library
ENGINE = "llama_cpp"  # its name in `--backends`


def in_layers(names: Mapping[str, str], layers: str = "layers") -> dict[str, str]:
    """Return {path of a module: key} of all layers, from those inside a layer; `layers`: key of the list of layers."""
    return {f"layers/{{i}}/{path}": f"{layers}.{{i}}.{key}" for path, key in names.items()}


# {module of a layer: GGUF tensor} of decoders and vision towers.
BLOCK = {
    **{f"self_attn/{name}_proj": f"attn_{name}" for name in "qkv"},
    **{f"self_attn/{name}_norm": f"attn_{name}_norm" for name in "qk"},
    **{f"mlp/{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
    "mlp/fc1": "ffn_up",
    "mlp/fc2": "ffn_down",
}
# {module in `params["text"]`: GGUF tensor}, with the layer as `{i}`, of most architectures.
_TENSORS = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "final_layernorm": "output_norm",
    "lm_head": "output",
    **in_layers(
        {
            **BLOCK,
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn/o_proj": "attn_output",
            "self_attn/dense": "attn_output",
            **{f"mlp/experts/{name}_proj": f"ffn_{name}_exps" for name in ("gate", "up", "down")},
            "attention_output_norm": "post_attention_norm",
            "mlp_output_norm": "post_ffw_norm",
            "layer_scalar": "layer_output_scale",
            "extra/gate": "inp_gate",
            "extra/project": "proj",
            "extra/norm": "post_norm",
            "mlp/router": "ffn_gate_inp",
            "mlp/dense_gate": "ffn_gate_inp_shexp",
            **{f"mlp/dense/{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")},
            "mlp/dense_output_norm": "post_ffw_norm_1",
            "mlp/experts_norm": "pre_ffw_norm_2",
            "mlp/experts_output_norm": "post_ffw_norm_2",
            "mlp/router_scale": "ffn_gate_inp.scale",
            "mlp/expert_scale": "ffn_down_exps.scale",
            **{f"linear_attn/{name}_proj": "attn_qkv" for name in "qkv"},
            **{f"linear_attn/{name}_conv": "ssm_conv1d" for name in "qkv"},
            "linear_attn/z_proj": "attn_gate",
            "linear_attn/b_proj": "ssm_beta",
            "linear_attn/a_proj": "ssm_alpha",
            "linear_attn/decay": "ssm_a",
            "linear_attn/step": "ssm_dt.bias",
            "linear_attn/norm": "ssm_norm",
            "linear_attn/out_proj": "ssm_out",
            **{f"short_conv/{name}_proj": "shortconv.in_proj" for name in "bcx"},
            "short_conv/conv": "shortconv.conv",
            "short_conv/out_proj": "shortconv.out_proj",
        },
        "blk",
    ),
    "extra_inputs/table": "per_layer_token_embd",
    "extra_inputs/project": "per_layer_model_proj",
    "extra_inputs/norm": "per_layer_proj_norm",
}


@dataclass(frozen=True)
class Architecture:
    """Decoder architecture of llama.cpp (`general.architecture` in GGUF files) and its limits."""

    name: str

    own: Mapping[str, str] = field(default_factory=dict)
    """{module in `params["text"]`: GGUF tensor} that `_TENSORS` lacks; modules with one tensor are its rows."""

    activations: tuple[str, ...] = ("silu",)
    """Activations that the architecture supports."""

    ropes: tuple[str, ...] = ("linear", "yarn")
    """Rotary types that the architecture supports besides "default"."""

    biases: tuple[str, ...] = ()
    """Biases that the architecture supports, of `_BIASES`."""

    interleaved: bool = False
    """True if rotary pairs are neighbouring channels (in Hugging Face files: channels of both halves of a head)."""

    per_layer: bool = False
    """True if layers may have different widths."""

    free_heads: bool = False
    """True if heads x head_dim may differ from the hidden size."""

    partial: bool = False
    """True if rotary embedding may rotate only part of each head."""

    sections: bool = False
    """True for rotary positions by time, row and column (M-RoPE)."""

    own_head: bool = False
    """True if output head and bias are always stored, even if the model has tied embeddings or no bias."""

    experts: type[Experts] | None = None
    """Channel mixer with experts, which all layers must then have; None: no experts."""

    windows: Callable[[TextConfig], str | None] | None = None
    """Return why the layers' sliding windows and shared keys are unsupported, or None; without it, no windows."""

    scale: Callable[[TextConfig], float] | None = None
    """Return llama.cpp's factor on attention scores (None: head_dim ** -0.5); query norms absorb the difference."""

    tokenizer: str = ""
    """llama.cpp's name of the architecture's own tokenizer; "" for `SPACED` or `BYTE_LEVEL`."""

    recurrent: type[Mixer] | None = None
    """Recurrent mixer of some layers, such as delta nets; None if all layers have attention."""

    gated: bool = False
    """True if attention has a gate per channel."""

    @property
    def tensors(self) -> Mapping[str, str]:
        """{module in `params["text"]`: GGUF tensor}, with the layer as `{i}`."""
        return {**_TENSORS, **self.own}

    def context_length(self, text: TextConfig) -> int:
        """Return the longest context for which llama.cpp computes the model exactly."""
        sizes = {shape.mixer.window for shape in text.layers if shape.mixer.window is not None and self.windows is None}
        return min([text.max_positions, *sizes])

    def query_gain(self, text: TextConfig) -> float:
        """Return the factor on query norm weights that makes llama.cpp's attention scale equal the model's."""
        return 1.0 if self.scale is None else (text.attention.scale or text.attention.head_dim**-0.5) / self.scale(text)

    def lacks(self, text: TextConfig) -> str | None:
        """Return a decoder feature that llama.cpp's architecture does not implement; None if it has all."""
        biases = (text.attention.bias, text.attention.out_bias, text.channel.bias)
        absent = [name for name, has in zip(_BIASES, biases, strict=True) if has and name not in self.biases]
        if text.channel.activation not in self.activations:
            return f"activation {text.channel.activation} (it has {' or '.join(self.activations)})"
        if absent:
            return f"biases ({', '.join(absent)})"
        if text.rope.kind not in ("default", *self.ropes):
            return f"{text.rope.kind} rope"
        local = text.local_attention.rope or text.rope
        if local != text.rope and local.kind != "default":
            return f"{local.kind} rope in layers with windows"
        if bool(text.rope.sections) != self.sections:
            return f"rotary embedding {'by rows and columns' if text.rope.sections else 'by one position'}"
        parts = {type(layer.channel): layer.channel for layer in text.layers}
        mixed = [part for part in parts.values() if isinstance(part, Experts)]
        if any(type(part) is not self.experts for part in mixed) or not all(part.renormalise for part in mixed):
            return "experts of this kind"
        if mixed and len(parts) > 1:
            return "dense layers among those of experts"
        if text.attention.gated != self.gated:
            return f"attention {'with' if text.attention.gated else 'without'} gates"
        recurrent = [layer.mixer for layer in text.layers if not isinstance(layer.mixer, Attention)]
        if any(type(mixer) is not self.recurrent for mixer in recurrent):
            return "layers with such a recurrence"
        if self.recurrent is not None and not recurrent:
            return "decoders of attention alone: keep one layer of the other kind"
        if unequal := next((x for x in recurrent if isinstance(x, DeltaNet) and x.key_dim != x.value_dim), None):
            return f"delta nets with keys of {unequal.key_dim} and values of {unequal.value_dim} channels"
        if text.attention.rotated != text.attention.head_dim and not self.partial:
            return f"rotary embedding of {text.attention.rotated} of {text.attention.head_dim} channels"
        return None


# GGUF layouts of tensors around experts (a family's files may have others), and tensors that are never quantised.
LAYOUTS = {
    "mlp/dense_gate": "embed",
    "mlp/experts/gate_proj": "experts expert_mlp embed",
    "mlp/experts/up_proj": "experts expert_mlp embed",
    "mlp/experts/down_proj": "experts embed expert_mlp",
}
UNQUANTISED = ("ffn_gate_inp.weight", "ssm_conv1d.weight", "shortconv.conv.weight")
_BIASES = ("qkv_bias", "out_bias", "mlp_bias")  # of queries, keys and values; of attention's output; of the MLP
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")

LLAMA = Architecture(
    "llama",
    ropes=("linear", "yarn", "llama3", "longrope"),
    biases=_BIASES,
    interleaved=True,
    free_heads=True,
)
DECI = replace(LLAMA, name="deci", per_layer=True)
QWEN2 = Architecture("qwen2", biases=("qkv_bias",))
QWEN3 = Architecture("qwen3", free_heads=True)
QWEN3MOE = replace(QWEN3, name="qwen3moe", experts=Experts)
QWEN2VL = Architecture("qwen2vl", biases=("qkv_bias",), ropes=(), sections=True)
QWEN3VL = Architecture("qwen3vl", ropes=(), free_heads=True, sections=True)
QWEN35 = replace(
    QWEN3VL,
    name="qwen35",
    own=in_layers({"post_attention_layernorm": "post_attention_norm"}, "blk"),
    partial=True,
    recurrent=DeltaNet,
    gated=True,
)
QWEN35MOE = replace(QWEN35, name="qwen35moe", experts=ExpertsAndShared)
LFM2 = Architecture("lfm2", {"norm": "token_embd_norm"}, recurrent=ShortConv)
QWEN3VLMOE = replace(QWEN3VL, name="qwen3vlmoe", experts=Experts)
PHI2 = Architecture("phi2", activations=TANH_GELU, biases=_BIASES, partial=True, own_head=True)
_27B = 62  # layers by which llama.cpp recognises Gemma 3 27B, which has another attention scale


def width_fields(layers: Sequence[Layer]) -> dict[str, int | list[int]]:
    """Return GGUF metadata with the widths of the channel mixers: one number, or one per layer."""
    columns: dict[str, list[int]] = {}
    for layer in layers:
        part = layer.channel
        if "mlp" in part.sizes:
            name = "expert_shared_feed_forward_length" if isinstance(part, ExpertsAndShared) else "feed_forward_length"
            columns.setdefault(name, []).append(part.sizes["mlp"])
        if isinstance(part, Experts):
            values = {"count": part.experts, "used_count": part.top_k, "feed_forward_length": part.neurons}
            for name, value in values.items():
                columns.setdefault(f"expert_{name}", []).append(value)
    return {name: column[0] if len(set(column)) == 1 else column for name, column in columns.items()}


def recurrent_fields(text: TextConfig, name: str) -> dict[str, int | list[int] | list[bool]]:
    """Return GGUF metadata of recurrent layers (sizes and layer numbers) for architecture `name`; {} without any."""
    recurrent = [not isinstance(layer.mixer, Attention) for layer in text.layers]
    if not any(recurrent):
        return {}
    if name == LFM2.name:
        return {
            "shortconv_l_cache": text.layers[recurrent.index(True)].mixer.taps,
            "head_count_kv": [layer.sizes.get("kv_heads", 0) for layer in text.layers],
        }
    mixer, period = text.layers[recurrent.index(True)].mixer, full_attention_period(text.layers)
    return {
        **({} if period is None else {"full_attention_interval": period}),
        "ssm_conv_kernel": mixer.taps,
        "ssm_state_size": mixer.key_dim,
        "ssm_group_count": mixer.delta_groups,
        "ssm_time_step_rank": mixer.delta_heads,
        "ssm_inner_size": mixer.delta_heads * mixer.value_dim,
        f"{name}.attention.recurrent_layers": recurrent,
    }


def full_attention_period(layers: Sequence[Layer]) -> int | None:
    """Return n if every n-th layer has full attention, and all others a window or no attention; None otherwise."""
    full, count = [isinstance(x.mixer, Attention) and x.mixer.window is None for x in layers], len(layers)
    return next((n for n in range(1, count + 2) if full == [(i + 1) % n == 0 for i in range(count)]), None)


def _gemma3_scale(text: TextConfig) -> float:
    heads = text.layers[0].mixer.q_heads
    return float(text.hidden_size // heads if len(text.layers) == _27B else text.attention.head_dim) ** -0.5


def _gemma3_windows(text: TextConfig) -> str | None:
    if full_attention_period(text.layers) is not None:
        return None
    full = [i for i, shape in enumerate(text.layers) if shape.mixer.window is None]
    return (
        f"full attention in layers {full} of {len(text.layers)}, only in every n-th: remove n consecutive layers, 6 of "
        "a released model (criterion angular), or the last ones, or neurons"
    )


def _gemma4_windows(text: TextConfig) -> str | None:
    windowed = [shape.mixer.window is not None for shape in text.layers if shape.mixer.source is None]
    if len(windowed) < len(text.layers) and windowed[-2:] != [True, False]:
        return (
            "shared keys and values unless the last two layers with their own are sliding, full: keep both "
            "(producers='keep')"
        )
    return None if any(windowed) else "Gemma 4 without sliding layers: keep one"


GEMMA3 = Architecture(
    "gemma3",
    activations=TANH_GELU,
    ropes=("linear",),
    free_heads=True,
    windows=_gemma3_windows,
    scale=_gemma3_scale,
)
GEMMA4 = Architecture(
    "gemma4",
    in_layers(
        {
            **{f"mlp/dense/{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
            **{f"mlp/experts/{name}_proj": "ffn_gate_up_exps" for name in ("gate", "up")},
        },
        "blk",
    ),
    TANH_GELU,
    ("proportional",),
    per_layer=True,
    free_heads=True,
    windows=_gemma4_windows,
    scale=lambda text: 1.0,
    tokenizer="gemma4",
    experts=ExpertsBesideDense,
)
PHI3 = Architecture(
    "phi3",
    in_layers(
        {
            **{f"self_attn/{name}_proj": "attn_qkv" for name in "qkv"},
            **{f"mlp/{name}_proj": "ffn_up" for name in ("gate", "up")},
        },
        "blk",
    ),
    ropes=("linear", "yarn", "longrope"),
    partial=True,
)


# Tokenizers -----------------------------------------------------------------------------------------------------------

# llama.cpp's names of SentencePiece and of byte-level BPE tokenizers.
SPACED, BYTE_LEVEL = "llama", "gpt2"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SUFFIX|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SUFFIX|"
)
_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Pre-tokenizer rules of a byte-level tokenizer, as exports/gguf_tokenizer.py spells them -> llama.cpp's name for them.
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
    (
        _CONTRACTIONS
        + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        BYTES,
    ): "qwen35",
    (_CASED.replace("SUFFIX", "") + r"\p{N}" + _ENDS, BYTES): "tekken",
    (_CASED.replace("SUFFIX", f"{_CONTRACTIONS}?") + r"\p{N}{1,3}" + _ENDS, BYTES): "gpt-4o",
}
# Pre-tokenizers with which llama.cpp keeps a word that is itself a token, without applying merges.
WHOLE_WORDS = ("llama-bpe", "tekken")
# Pre-tokenizer for a vocabulary in which every word is a token.
OF_WORDS = "llama-bpe"
# In models with this name all special tokens but these strip the white space after them, as in Phi-3's tokenizer.
DROPPING_NAME, KEEPING_MARKS = re.compile("phi-?3", re.IGNORECASE), {"<unk>", "<s>", "<|endoftext|>"}
