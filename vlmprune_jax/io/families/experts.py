"""Config fields and weight names of mixture-of-experts layers, shared by several families."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import ChannelMixer, Experts, ExpertsBesideDense
from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.io.families.llama_like import llama_like_weights
from vlmprune_jax.io.families.shapes import PER_LAYER, layers_to_hf
from vlmprune_jax.io.families.table import Family, JsonDict, Weight, checked_table

_COUNTS = ("num_experts", "num_local_experts")  # the hub's name, and the one that transformers 5 writes


def expert_count(config: Mapping[str, Any]) -> int:
    """Return the number of experts per layer, from either of two config fields; raise UserError if they disagree."""
    counts = {name: int(config[name]) for name in _COUNTS if config.get(name) is not None}
    if len(set(counts.values())) != 1:
        values = " but ".join(f"{name} is {count}" for name, count in counts.items()) or "num_experts is missing"
        raise UserError(f"{values}: set num_experts to the number of experts per layer in the weights")
    return next(iter(counts.values()))


def with_expert_count(config: JsonDict, default: int) -> JsonDict:
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


def beside_dense(config: Mapping[str, Any], neurons: int, activation: str) -> ExpertsBesideDense:
    """Return a channel mixer of experts plus a dense MLP with `neurons`; raise UserError for unequal layers."""
    unequal = next((name for name in ("use_double_wide_mlp", PER_LAYER) if config.get(name)), None)
    if unequal is not None:
        raise UserError(f"{unequal} is not supported with experts: give all layers equal widths and remove the field")
    count = expert_count(config)
    total = count * int(config["moe_intermediate_size"])
    return ExpertsBesideDense(count, total, int(config["top_k_experts"]), mlp=neurons, activation=activation)


def with_channels(text: TextConfig, channels: Sequence[ChannelMixer | None]) -> TextConfig:
    """Return the decoder config with another channel mixer in each layer; None leaves a layer unchanged."""
    pairs = zip(text.layers, channels, strict=True)
    return text.with_layers([Layer(layer.mixer, channel or layer.channel) for layer, channel in pairs])


def has_experts(text: TextConfig) -> bool:
    """Return True if any decoder layer is a mixture of experts."""
    return any(isinstance(layer.channel, Experts) for layer in text.layers)


def expert_sizes(text: TextConfig) -> JsonDict:
    """Return the config.json fields for the number of experts per layer and of neurons per expert."""
    part = next(layer.channel for layer in text.layers if isinstance(layer.channel, Experts))
    return {"num_experts": part.experts, "moe_intermediate_size": part.neurons}


def experts_to_hf(text: TextConfig, source: Mapping[str, Any]) -> JsonDict:
    """Return a Qwen config with experts, its layer counts and widths updated, with the hub's field names."""
    config = {name: value for name, value in layers_to_hf(text, source).items() if name != "num_local_experts"}
    dense = [i for i, layer in enumerate(text.layers) if not isinstance(layer.channel, Experts)]
    return {**config, **expert_sizes(text), "mlp_only_layers": dense, "decoder_sparse_step": 1}


def experts_problem(text: TextConfig) -> str | None:
    """Return why the transformers class does not support these layers with experts, with advice; None if it does."""
    if not has_experts(text):
        return "its class needs a layer with experts: keep one"
    return None if text.uniform else "its class needs equal numbers of experts and heads per layer: prune layers alike"


# (Layouts of gate and up projection, and of the down projection; keys of the three below the experts' prefix.)
FUSED = (("experts expert_mlp embed", "experts embed expert_mlp"), ("gate_up_proj", "gate_up_proj", "down_proj"))
TRANSPOSED = (("experts embed expert_mlp", "experts expert_mlp embed"), FUSED[1])
SEPARATE = (
    ("expert_mlp embed", "embed expert_mlp"),
    tuple(f"{{experts}}.{name}_proj.weight" for name in ("gate", "up", "down")),
)


def expert_weights(layer: str, experts: str, files: tuple[tuple[str, ...], tuple[str, ...]] = FUSED) -> list[Weight]:
    """Return the weight table entries of a layer's experts, with paths under `layer`/mlp/experts.

    `experts`: prefix of the checkpoint keys. `files`: layouts and keys, such as `FUSED`.
    """
    (inner, down), keys = files
    lines = zip(("gate_proj", "up_proj", "down_proj"), keys, (inner, inner, down), strict=True)
    return [Weight(f"{layer}/mlp/experts/{name}/weight", experts + key, layout) for name, key, layout in lines]


def with_separate_experts(family: Family) -> Family:
    """Return the family for quantised checkpoints, which store one matrix [out, in] per expert and projection."""

    def separated(line: Weight) -> Weight:
        before, experts, _ = line.key.rpartition("experts.")
        name = line.path.split("/")[-2]
        layout = SEPARATE[0][name == "down_proj"]
        return Weight(line.path, f"{before}{experts}{{experts}}.{name}.weight", layout)

    return _with_fused_experts(family, separated)


def as_stored(family: Family, cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Family:
    """Return the family with the layout that the experts' fused matrices have in a checkpoint.

    Transformers 5 saves those of Qwen3-VL transposed. One of the two matrices of an expert may be square, so the others
    decide for all.

    Args:
      family: family of the checkpoint, whose weight table has the hub's layout.
      shapes: {checkpoint key: shape}.
    """
    shapes = {family.canonical(key): shape for key, shape in shapes.items()} if has_experts(cfg.text) else {}
    transposed = set[bool]()
    for line in family.weights(cfg) if shapes else ():
        for shape in [shapes.get(line.at(i).key, ()) for i in range(len(cfg.text.layers))]:
            if _is_fused_expert(line) and len(shape) == 3 and shape[1] != shape[2]:
                transposed.add(shape[line.layout.split().index("embed")] != cfg.text.hidden_size)

    def turned(line: Weight) -> Weight:
        experts, rows, columns = line.layout.split()
        return dataclasses.replace(line, layout=f"{experts} {columns} {rows}")

    return _with_fused_experts(family, turned) if transposed == {True} else family


def _is_fused_expert(line: Weight) -> bool:
    """Return True for a matrix of each expert that is stored in one tensor with those of the others."""
    return "/experts/" in line.path and "{experts}" not in line.key


def _with_fused_experts(family: Family, change: Callable[[Weight], Weight]) -> Family:
    """Return the family with changed entries of experts that share a tensor."""

    def weights(cfg: ModelConfig) -> list[Weight]:
        table = checked_table(family.weights, family.weights(cfg))
        return [change(line) if _is_fused_expert(line) else line for line in table]

    return dataclasses.replace(family, weights=weights)


def qwen_expert_weights(
    text: TextConfig, prefix: str, head: str, files: tuple[tuple[str, ...], tuple[str, ...]]
) -> list[Weight]:
    """Return the weight table of a Qwen decoder with experts; `files` as in `expert_weights`."""
    layer, key = "text/layers/{i}", prefix + "layers.{i}.mlp"
    table = llama_like_weights(text, prefix, head)
    if not any("mlp" in layer.sizes for layer in text.layers):  # no dense layer
        table = [line for line in table if "/mlp/" not in line.path]
    router = Weight(f"{layer}/mlp/router/weight", f"{key}.gate.weight", "experts embed")
    return [*table, router, *expert_weights(layer, f"{key}.experts.", files)]
