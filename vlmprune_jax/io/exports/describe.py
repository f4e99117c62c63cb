"""Describe a Hugging Face folder from its headers: its model, the parts that can be pruned, and engines."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Stack, describe_layers, stack_title
from vlmprune_jax.core.mixers import Attention
from vlmprune_jax.core.models.flops import active_params, layer_costs
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.part import AXES
from vlmprune_jax.core.prune.config import PlanConfig
from vlmprune_jax.core.prune.solver import Component, most_removable, units_of
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.layout import make_slots, match_keys
from vlmprune_jax.io.checkpoints.read import open_weights, read_config, resolve
from vlmprune_jax.io.exports.card import render
from vlmprune_jax.io.families.limits import what_loads

PARTS = ("text", "vision", "projector")


def describe(hf_dir: str | Path, vision_dir: str | Path | None = None) -> dict[str, Any]:
    """Return the content of `vlmprune inspect` as JSON values, without reading weights.

    Raises UserError for an unknown family, missing or truncated shards, or keys or shapes that contradict config.json.
    """
    folder = resolve(hf_dir)
    tower = None if vision_dir is None else resolve(vision_dir)
    family, cfg = read_config(folder, tower)
    own, slots, text, vision = Checkpoint(folder), make_slots(cfg, family), cfg.text, cfg.vision
    open_weights(slots, cfg, family, own, tower)
    entries, unused = own.tensors.values(), match_keys(slots, cfg, family, own).passthrough
    unused = [key for key in unused if not key.endswith(("position_ids", "inv_freq"))]
    sizes = {} if vision is None else dataclasses.asdict(vision)
    sizes = {name: value for name, value in sizes.items() if name not in ("layers", "block")}
    return {
        "folder": str(folder),
        "family": cfg.family,
        "layout": cfg.layout,
        "dtypes": dict(Counter(entry.dtype for entry in entries).most_common()),
        "bytes": sum(entry.n_bytes for entry in entries),
        "shards": len(own.shards),
        "tensors": len(own.tensors),
        "storage": None if own.storage is None else own.storage.name,
        "text": {
            **_stack(text),
            "vocab_size": text.vocab_size,
            "tied_embeddings": text.tie_embeddings,
            "max_positions": text.max_positions,
        },
        "vision": None if vision is None else {**sizes, **_stack(vision)},
        "tokens_per_image": cfg.tokens_per_image,
        "parameters": {
            "total": count_params(cfg),
            **{part: count_params(cfg, part) for part in (*PARTS, *dict(cfg.encoders))},
        },
        "active_parameters": active_params(cfg),
        # parameters that no forward pass uses, such as tower layers after the used features
        "passthrough": sum(math.prod(own.entries[key].shape) for key in unused),
        "prunable": _prunable(cfg, "text"),
        "prunable_tower": None if cfg.vision is None else _prunable(cfg, "vision"),
        "loads": what_loads(cfg),
    }


def _stack(stack: Stack) -> dict[str, Any]:
    layers = stack.layers
    starts = [i for i, layer in enumerate(layers) if i == 0 or layer != layers[i - 1]]
    return {
        "layers": len(layers),
        "runs": [
            {"first": start, "layers": stop - start, **layers[start].sizes, "window": layers[start].mixer.window}
            | ({"shared": True} if layers[start].mixer.source is not None else {})
            for start, stop in itertools.pairwise([*starts, len(layers)])
        ],
        "hidden_size": stack.hidden_size,
        "head_dim": stack.attention.head_dim,
    }


def _prunable(cfg: ModelConfig, stack: str) -> dict[str, Any]:
    """Return the model shares of one layer, head or neuron, and the maximum that each pruning method can remove.

    The maximum is None if features of a tower's blocks enter the decoder, so that nothing can be removed.
    """
    total, costs, layers = count_params(cfg), layer_costs(cfg, stack), cfg.stack(stack).layers
    sizes = [costs.of(shape) for shape in layers]
    most_by_depth = sum(sorted(sizes)[max(1, cfg.deepstack) :]) / total  # features enter as many decoder layers
    kinds = {type(layer.mixer): layer for layer in reversed(layers) if layer.mixer.axes}
    attention, parts = kinds.pop(Attention), [part for layer in layers for part in layer.parts]
    settings = {axis.multiple or part.settings[1]: 1 for part in parts for axis in part.axes}
    component = Component(stack, cfg, cfg, PlanConfig(), total)
    units = units_of(component, dict(enumerate(layers)), {part.root for part in parts}, settings)
    return {
        "layer": max(sizes) / total,
        "head_group": costs.price(attention, attention.mixer.root) / total,
        "query_heads_per_group": attention.mixer.group,
        "other_groups": {
            f"{AXES[layer.mixer.root].title.removesuffix('s')} ({layer.mixer.group} heads)": (
                costs.price(layer, layer.mixer.root) / total
            )
            for layer in kinds.values()
        },
        "neuron": costs.price(layers[0], layers[0].channel.root) / total,
        "unit": AXES[layers[0].channel.root].title.removesuffix("s"),
        "most_by_depth": None if stack == "vision" and cfg.deepstack else most_by_depth,
        "most_by_width": most_removable([*units.values()]) / total,
    }


def as_lines(found: dict[str, Any]) -> list[str]:
    """Return the content of `vlmprune inspect` as lines of text."""
    functions = {"loads": _loads, "runs": _runs, "title_of": stack_title, "share": lambda share: f"{100 * share:.3g} %"}
    return render("inspect", found=found, **functions).split("\n")


def _loads(stacks: dict[str, dict[str, str | None]]) -> str:
    """Return text on the types of pruning after which an engine can load the model."""
    reasons = [*dict.fromkeys(why for kinds in stacks.values() for why in kinds.values())]
    if None not in reasons:
        return f"nothing{' pruned' if len(reasons) > 1 else ''}: {reasons[0]}"
    said = []
    for stack, kinds in stacks.items():
        loads = ", ".join(kind for kind, why in kinds.items() if why is None) or "nothing pruned"
        said.append(loads if stack == "text" else f"tower: {loads}")
    return "; ".join(said)


def _runs(stack: dict[str, Any]) -> str:
    layers = [run for run in stack["runs"] for _ in range(run["layers"])]
    sizes = [{name: size for name, size in layer.items() if name in AXES} for layer in layers]
    return describe_layers(sizes, [layer["window"] for layer in layers])
