"""What a Hugging Face folder holds, what can be pruned from it and how it can be exported; from its headers alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from vlmprune_jax.config import LayerShape, ModelConfig, runs
from vlmprune_jax.hf.files import Checkpoint
from vlmprune_jax.hf.layout import make_slots
from vlmprune_jax.hf.read import find_weights, read_config, resolve
from vlmprune_jax.models.params import count_params
from vlmprune_jax.prune.solver import layer_costs, most_removable, units_of

PARTS = ("text", "vision", "projector")


def describe(hf_dir: str | Path, vision_dir: str | Path | None = None) -> dict[str, Any]:
    """Everything `vlmprune inspect` tells, as JSON values; no weight is read.

    Raises:
      UserError: unknown family, missing or truncated shards, keys or shapes that do not fit config.json.
    """
    folder = resolve(hf_dir)
    tower = None if vision_dir is None else resolve(vision_dir)
    family, cfg = read_config(folder, tower)
    find_weights(make_slots(cfg, family), cfg, family, folder, tower)
    own = Checkpoint(folder)
    entries = own.entries.values()
    return {
        "folder": str(folder),
        "family": cfg.family,
        "layout": cfg.layout,
        "dtypes": dict(Counter(entry.dtype for entry in entries).most_common()),
        "bytes": sum(entry.end - entry.begin for entry in entries),
        "shards": len(own.shards),
        "tensors": len(own),
        "text": _text(cfg),
        "vision": None if cfg.vision is None else {k: v for k, v in vars(cfg.vision).items() if k != "norm_eps"},
        "tokens_per_image": cfg.tokens_per_image,
        "parameters": {"total": count_params(cfg), **{part: count_params(cfg, part) for part in PARTS}},
        "prunable": _prunable(cfg),
        "export": _export(cfg, family.separate_vision),
    }


def _text(cfg: ModelConfig) -> dict[str, Any]:
    text = cfg.text
    return {
        "layers": len(text.layers),
        "runs": [{"first": first, "layers": n, **vars(shape)} for first, n, shape in runs(text.layers)],
        "hidden_size": text.hidden_size,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size,
        "tied_embeddings": text.tie_embeddings,
        "max_positions": text.max_positions,
    }


def _prunable(cfg: ModelConfig) -> dict[str, Any]:
    """Shares of the whole model: of one unit, and the most that each method can remove."""
    total, costs, layers = count_params(cfg), layer_costs(cfg), cfg.text.layers
    sizes = [costs.of(shape) for shape in layers]
    everywhere = range(len(layers))
    units = units_of(
        layers, costs, gqa="groups", attn_layers=everywhere, mlp_layers=everywhere, heads_multiple=1, neurons_multiple=1
    )
    return {
        "layer": max(sizes) / total,
        "head_group": units[0].head_cost / total,
        "query_heads_per_group": layers[0].q_heads // layers[0].kv_heads,
        "neuron": costs.neuron / total,
        "most_by_depth": (sum(sizes) - min(sizes)) / total,
        "most_by_width": most_removable(units) / total,
    }


def _export(cfg: ModelConfig, separate_vision: bool) -> list[str]:
    """What becomes of a pruned copy of this folder."""
    lines = ["depth: same layout, true size"]
    if cfg.layout == "transformers":
        lines[0] += ", loads in stock transformers"
        lines.append("width, all layers alike: same layout, true size, loads in stock transformers")
        lines.append("width in a range of layers: true size for this package (per_layer), or zero-padded, stock (pad)")
    else:
        lines.append("width: same layout; unequal layers at true size (per_layer) or padded with zeros (pad)")
    if separate_vision:
        lines.append("the vision tower stays in its own folder")
    if not cfg.text.even:
        lines.append("this folder has layers of unequal width already")
    return lines


def as_lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    text, parts, prunable = found["text"], found["parameters"], found["prunable"]
    total = parts["total"]
    lines = [
        f"{found['folder']}: {found['family']}, {found['layout']} layout",
        f"  files       {found['bytes'] / 2**20:,.1f} MiB in {found['shards']} shard(s), {found['tensors']} tensors, "
        f"{', '.join(f'{n} x {kind}' for kind, n in found['dtypes'].items())}",
        f"  parameters  {total:,}: "
        + ", ".join(f"{part} {parts[part]:,} ({100 * parts[part] / total:.1f} %)" for part in PARTS if parts[part]),
        f"  decoder     {text['layers']} layers: {', '.join(_run(run) for run in text['runs'])}",
        f"              hidden size {text['hidden_size']}, heads of {text['head_dim']}, vocabulary "
        f"{text['vocab_size']:,}{' (tied)' if text['tied_embeddings'] else ''}, {text['max_positions']:,} positions",
    ]
    vision = found["vision"]
    if vision is not None:
        lines.append(
            f"  vision      {vision['n_layers']} of {vision['n_layers_total']} layers are computed, width "
            f"{vision['hidden_size']}, images of {vision['image_size']} in patches of {vision['patch_size']}: "
            f"{found['tokens_per_image']} tokens each"
        )
    group = prunable["query_heads_per_group"]
    unit = "head" if group == 1 else f"head group ({group} query heads)"
    lines += [
        f"  can go      a layer is {_percent(prunable['layer'])} of the model, a {unit} "
        f"{_percent(prunable['head_group'])}, a neuron {_percent(prunable['neuron'])}",
        f"              at most {_percent(prunable['most_by_depth'])} by depth, "
        f"{_percent(prunable['most_by_width'])} by width",
    ]
    return lines + [f"  {'export' if i == 0 else '':<11} {line}" for i, line in enumerate(found["export"])]


def _run(run: dict[str, Any]) -> str:
    shape = LayerShape(run["q_heads"], run["kv_heads"], run["mlp"])
    heads = f"{shape.q_heads} heads" if shape.q_heads == shape.kv_heads else f"{shape.q_heads}/{shape.kv_heads} heads"
    return f"{run['layers']} x ({heads}, {shape.mlp:,} neurons)"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
