"""The README.md of an exported folder: what was removed, what is left, how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmprune_jax.config import LayerShape, ModelConfig
from vlmprune_jax.models.params import count_params

_PARTS = (("language model", "text"), ("projector", "projector"), ("vision tower (computed part)", "vision"))


def model_card(cfg: ModelConfig, written: ModelConfig, config: dict[str, Any], source: str, plan_file: Path) -> str:
    """Markdown of one model card.

    `written` is `cfg` with the blocks as they are in the files (wider than the model's where layers were padded),
    `config` the config.json beside it, `source` the name of the folder it came from, `plan_file` its plan, if any.
    """
    plan = json.loads(plan_file.read_text(encoding="utf-8")) if plan_file.is_file() else None
    return f"""---
library_name: transformers
tags: [vlmprune-jax, pruned]
---

# {source}{", pruned" if plan else ""}

Made from `{source}` by vlmprune-jax (structural pruning of the language model; arXiv 2604.24380).

{_removed(plan)}

{_table(cfg, plan)}

Decoder layers: {len(cfg.text.layers)}, {_shapes(cfg.text.layers)}.

## Loading

{_loading(cfg, written, config)}
"""


def _removed(plan: dict[str, Any] | None) -> str:
    if plan is None:
        return "No prune plan came with this model."
    before = plan["layers_before"]
    gone = sorted(set(range(len(before))) - set(plan["kept_layers"]))
    asked = "" if plan["asked"] is None else f" ({plan['asked']:.1%} asked)"
    return (
        f"Method: {plan['method']}, criterion: {plan['criterion']}. Removed: {plan['reached']:.1%} of "
        f"{plan['parameters_total']:,} parameters{asked}; {len(gone)} of {len(before)} layers"
        f"{' (numbers ' + ', '.join(map(str, gone)) + ')' if gone else ''}. The kept heads and neurons are listed in "
        f"`plan.json`. Plan fingerprint: `{plan['fingerprint']}`."
    )


def _table(cfg: ModelConfig, plan: dict[str, Any] | None) -> str:
    parts = [(name, part) for name, part in _PARTS if count_params(cfg, part)] + [("total", "")]
    if plan is None:
        rows = [f"| {name} | {count_params(cfg, part):,} |" for name, part in parts]
        return "\n".join(["| part | parameters |", "|---|---|", *rows])
    original = cfg.with_layers([LayerShape(*shape) for shape in plan["layers_before"]])
    rows = [f"| {name} | {count_params(original, part):,} | {count_params(cfg, part):,} |" for name, part in parts]
    return "\n".join(["| parameters | before | after |", "|---|---|---|", *rows])


def _shapes(layers: tuple[LayerShape, ...]) -> str:
    shapes = [LayerShape(*widths) for widths in sorted({shape.widths for shape in layers})]
    if len(shapes) == 1:
        shape = shapes[0]
        return f"each with {shape.q_heads} query heads, {shape.kv_heads} key/value heads and {shape.mlp} MLP neurons"
    return "of unequal width: " + "; ".join(f"{s.q_heads}/{s.kv_heads} heads and {s.mlp} neurons" for s in shapes)


def _loading(cfg: ModelConfig, written: ModelConfig, config: dict[str, Any]) -> str:
    if not written.text.even:
        return (
            "The layers have unequal widths and are stored at their true size (`per_layer_shapes` in config.json). "
            "Load with `vlmprune_jax.load(folder)`. There is no PyTorch loader for this form yet; for stock "
            'transformers export with `uneven="pad"`.'
        )
    padded = ""
    if written.text.layers != cfg.text.layers:
        padded = (
            "\n\nUnequal layers were padded with zero heads and neurons to "
            f"{_shapes(written.text.layers)}: the same function as the pruned model, without its savings."
        )
    if cfg.layout == "original":
        return (
            f"`vlmprune_jax.load(folder, vision_dir=...)` or the original LLaVA code (`LlavaLlamaForCausalLM`).{padded}"
        )
    name = (config.get("architectures") or ["AutoModelForCausalLM"])[0]
    return f"```python\nfrom transformers import {name}\n\nmodel = {name}.from_pretrained(folder)\n```{padded}"
