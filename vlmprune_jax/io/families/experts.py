"""Config fields and weight names of mixture-of-experts layers, shared by several families, and Qwen3 with experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import ChannelMixer, Experts
from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import decoder_family
from vlmprune_jax.io.families.llama_like import defaults_of, llama_like
from vlmprune_jax.io.families.shapes import PER_LAYER, layers_to_hf, windows_from_hf
from vlmprune_jax.io.families.table import LLAMA_NAMES, Decoder, Family, JsonDict, Weight, checked_table, in_layers

_COUNTS = ("num_experts", "num_local_experts")  # the hub's name, and the one that transformers 5 writes


def expert_count(config: Mapping[str, Any]) -> int:
    """Return the number of experts per layer, from either of two config fields; raise UserError if they disagree."""
    counts = {name: int(config[name]) for name in _COUNTS if config.get(name) is not None}
    if len(set(counts.values())) != 1:
        values = " but ".join(f"{name} is {count}" for name, count in counts.items()) or "num_experts is missing"
        raise UserError(f"{values}: set num_experts to the number of experts per layer in the weights")
    return next(iter(counts.values()))


def with_expert_count(config: Mapping[str, Any], default: int) -> Mapping[str, Any]:
    """Return a decoder config with the default number of experts if neither of the two fields has one."""
    return config if any(config.get(name) is not None for name in _COUNTS) else {**config, "num_experts": default}


def with_experts(text: TextConfig, config: Mapping[str, Any], *, renormalise: bool) -> TextConfig:
    """Return the decoder config with experts in the layers that Qwen's config fields select."""
    if config.get(PER_LAYER):
        raise UserError(f"{PER_LAYER} is not supported with experts: give all layers equal widths and remove the field")
    n_experts, neurons = expert_count(config), int(config["moe_intermediate_size"])
    active, activation = int(config["num_experts_per_tok"]), text.channel.activation
    part = Experts(n_experts, n_experts * neurons, active, renormalise, activation=activation)
    dense, step = config.get("mlp_only_layers") or (), int(config.get("decoder_sparse_step", 1))
    return with_channels(text, [None if i in dense or (i + 1) % step else part for i in range(len(text.layers))])


def with_channels(text: TextConfig, channels: Sequence[ChannelMixer | None]) -> TextConfig:
    """Return the decoder config with another channel mixer in each layer; None leaves a layer unchanged."""
    pairs = zip(text.layers, channels, strict=True)
    return text.with_layers([Layer(layer.mixer, channel or layer.channel) for layer, channel in pairs])


def has_experts(text: TextConfig) -> bool:
    """Return True if any decoder layer is a mixture of experts."""
    return any(isinstance(layer.channel, Experts) for layer in text.layers)


def experts_to_hf(text: TextConfig, source: Mapping[str, Any]) -> JsonDict:
    """Return a Qwen config with experts, its layer counts and widths updated."""
    dense = [i for i, layer in enumerate(text.layers) if not isinstance(layer.channel, Experts)]
    return {**layers_to_hf(text, source), "mlp_only_layers": dense, "decoder_sparse_step": 1}


def experts_problem(text: TextConfig) -> str | None:
    """Return why the transformers class does not support these layers with experts, with advice; None if it does."""
    if not has_experts(text):
        return "its class needs a layer with experts: keep one"
    return None if text.uniform else "its class needs equal numbers of experts and heads per layer: prune layers alike"


# Layouts of the experts' projections in fused tensors.
_FUSED = dict.fromkeys(("gate_proj", "up_proj"), "experts expert_mlp embed") | {"down_proj": "experts embed expert_mlp"}


def expert_names(experts: str = "mlp.experts", *, separate: bool = False) -> dict[str, str]:
    """Return {path: name in files} of the experts of layers, in fused tensors or in one of each expert."""
    fused = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
    names = {name: f"{{experts}}.{name}.weight" for name in fused} if separate else fused
    return in_layers({f"mlp/experts/{path}/weight": f"{experts}.{name}" for path, name in names.items()})


def transposed_layouts() -> dict[str, str]:
    """Return {path: layout} of fused experts whose matrices are transposed."""
    return {f"layers/{{i}}/mlp/experts/{name}/weight": _transposed(layout) for name, layout in _FUSED.items()}


def _transposed(layout: str) -> str:
    experts, rows, columns = layout.split()
    return f"{experts} {columns} {rows}"


def with_separate_experts(family: Family) -> Family:
    """Return the family for quantised checkpoints, which store one matrix [out, in] per expert and projection."""

    def separated(line: Weight) -> Weight:
        before, experts, _ = line.key.rpartition("experts.")
        name = line.path.split("/")[-2]
        return Weight(line.path, f"{before}{experts}{{experts}}.{name}.weight")

    return _with_fused_experts(family, separated)


def as_stored(family: Family, cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Family:
    """Return the family with the layout that the experts' fused matrices have in a checkpoint; `shapes`: by its keys.

    Transformers 5 saves those of Qwen3-VL transposed. One of the two matrices of an expert may be square, so the others
    decide for all.
    """
    if not has_experts(cfg.text):
        return family
    shapes = {family.canonical(key): shape for key, shape in shapes.items()}
    stored = [
        (shapes.get(line.at(i).key, ()), _layout(line).split().index("embed"))
        for line in filter(_is_fused_expert, family.weights(cfg))
        for i in range(len(cfg.text.layers))
    ]
    matrices = [(shape, axis) for shape, axis in stored if len(shape) == 3 and shape[1] != shape[2]]
    if {shape[axis] != cfg.text.hidden_size for shape, axis in matrices} != {True}:
        return family
    return _with_fused_experts(family, lambda line: dataclasses.replace(line, layout=_transposed(_layout(line))))


def _layout(line: Weight) -> str:
    return line.layout or _FUSED[line.path.split("/")[-2]]


def _is_fused_expert(line: Weight) -> bool:
    """Return True for a matrix of each expert that is stored in one tensor with those of the others."""
    return "/experts/" in line.path and "{experts}" not in line.key


def _with_fused_experts(family: Family, change: Callable[[Weight], Weight]) -> Family:

    def weights(cfg: ModelConfig) -> list[Weight]:
        table = checked_table(family.weights, family.weights(cfg))
        return [change(line) if _is_fused_expert(line) else line for line in table]

    return dataclasses.replace(family, weights=weights)


# Qwen3 with experts (30B-A3B, 235B-A22B), alone and as InternVL3.5's decoder ----------------------------------------

QWEN_EXPERT_NAMES = LLAMA_NAMES | in_layers({"mlp/router": "mlp.gate"})


def _qwen3_moe_from_hf(config: Mapping[str, Any]) -> TextConfig:
    config = with_expert_count(config, 128)
    text = llama_like(config, "qwen3_moe", windows=windows_from_hf, biased=True, attention={"qk_norm": True})
    return with_experts(text, config, renormalise=bool(config.get("norm_topk_prob", False)))


QWEN3_MOE = decoder_family(
    Decoder(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _qwen3_moe_from_hf,
        experts_to_hf,
        QWEN_EXPERT_NAMES | expert_names(separate=True),
        defaults=defaults_of(
            "qwen3_moe", max_position_embeddings=32768, moe_intermediate_size=768, num_experts_per_tok=8
        ),
        gguf=(gguf.QWEN3MOE,),
        runs_in=("vllm", "mlx"),
        vllm_tpu="jax",
        problem=experts_problem,
        reads_quantised_experts=True,
    )
)
