"""Tables about plans: what each layer lost and why, and what two plans have in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.stack import LayerShape
from vlmprune_jax.prune.config import PlanConfig
from vlmprune_jax.prune.kept import KeptLayer, KeptStack
from vlmprune_jax.prune.plan import PrunePlan
from vlmprune_jax.prune.scores import Scores
from vlmprune_jax.prune.solver import layer_costs

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows
NONE = "-"


def explain(plan: PrunePlan, cfg: ModelConfig, spec: PlanConfig, scores: Sequence[Scores]) -> list[Table]:
    """Return a table per pruned stack with each layer's removed units, and the reason for its widths.

    Args:
      cfg: the unpruned model. spec: what was asked for. scores: as `make_plan` takes
        them, of every stack that was pruned, of hybrid both.

    Raises UserError if the plan is of another model.
    """
    tables = []
    for name, kept in plan.stacks.items():
        if kept.layers_before != tuple(LayerShape(*shape.widths) for shape in cfg.stack(name).layers):
            raise UserError("this plan is for another model than the config's: plan again")
        if kept != KeptStack.whole(kept.layers_before) or len(plan.stacks) == 1:
            own = [one for one in scores if one.stack == name]
            tables.append(_explain_stack(plan, cfg, spec, own, name))
    return tables


def _explain_stack(plan: PrunePlan, cfg: ModelConfig, spec: PlanConfig, scores: Sequence[Scores], name: str) -> Table:
    kept, cost = plan.stacks[name], layer_costs(cfg, name).of
    layers = {layer.index: layer for layer in kept.layers}
    depth, width = None if plan.method == "width" else scores[0], None if plan.method == "depth" else scores[-1]
    header = ["layer", "heads", "neurons", "parameters lost", "share"]
    order = [] if depth is None else np.argsort(depth.layers, kind="stable").tolist()
    header += [] if depth is None else ["score", "rank"]
    header += [] if width is None else ["heads' score lost", "neurons'"]
    shapes = cfg.stack(name).layers
    rows, before = [], [cost(shape) for shape in shapes]
    left = {i: cost(shapes[i].with_widths(*layer.shape.widths)) for i, layer in layers.items()}
    for i, shape in enumerate(kept.layers_before):
        layer = layers.get(i)
        heads, neurons = (len(layer.q_heads), len(layer.neurons)) if layer else (0, 0)
        row = [str(i), f"{heads} of {shape.q_heads}", f"{neurons:,} of {shape.mlp:,}"]
        row += _loss(before[i], left.get(i, 0))
        row += [] if depth is None else [f"{depth.layers[i]:.4g}", f"{order.index(i) + 1} of {len(order)}"]
        row += [] if width is None else _scores_lost(width, i, layer)
        rows.append([*row, _why(i, layer, spec, plan.method)])
    total = _loss(sum(before), sum(left.values()))
    rows.append(["all", NONE, NONE, *total, *[NONE] * (len(header) - 5), f"{len(kept.layers)} layers stay"])
    rounds = f", scores of the first of {plan.options['steps']} rounds" if plan.options.get("steps", 1) > 1 else ""
    return f"{name}: what each layer lost ({plan.method} by {plan.criterion}{rounds})", [*header, "why"], rows


def _loss(before: int, after: int) -> list[str]:
    return [f"{before - after:,}", f"{100 * (before - after) / before:.1f} %"]


def _scores_lost(scores: Scores, index: int, layer: KeptLayer | None) -> list[str]:
    """Return table cells with the shares of a layer's head and neuron scores that pruning removes."""
    if layer is None:
        return [NONE, NONE]
    heads, neurons = (values[index] for values in scores.widths)
    kept = layer.q_heads if scores.options.get("gqa") == "q_heads" else layer.kv_heads
    shares = []
    for values, units in ((heads, kept), (neurons, layer.neurons)):
        total = float(values.sum())
        shares.append(f"{100 * (1 - float(values[list(units)].sum()) / total):.1f} %" if total > 0 else NONE)
    return shares


def _why(index: int, layer: KeptLayer | None, spec: PlanConfig, method: str) -> str:
    """Return why a layer has its widths, if not because of its scores; "" otherwise."""
    if layer is None:
        return "goes"
    if index in spec.protect:
        return "protected"
    if method == "depth":
        return "stays"
    heads, neurons = (not layers or layers[0] <= index < layers[1] for layers in (spec.attn_layers, spec.mlp_layers))
    found = ["heads kept"] if spec.heads == "keep" else [] if heads else ["heads out of range"]
    found += [] if neurons else ["neurons out of range"]
    multiples = ("snap_for", "tensor_parallel", "heads_multiple", "neurons_multiple")
    if len(found) < 2:
        found += [f"{name}={value}" for name in multiples if (value := getattr(spec, name)) not in (None, 1)]
    return ", ".join(found) or "in range"


def read_plan(place: str) -> PrunePlan:
    """Read a prune plan from a file, workdir or model folder."""
    path = Path(place)
    return PrunePlan.from_json(path / "plan.json" if path.is_dir() else path)


def compare(first: PrunePlan, second: PrunePlan) -> list[Table]:
    """Compare two plans layer by layer: Jaccard overlap of the heads, neurons and layers that they keep.

    Raises UserError if the plans are of different models.
    """
    if first.fingerprint != second.fingerprint:
        raise UserError(
            f"these plans are for different models (fingerprints {first.fingerprint} and {second.fingerprint}): "
            "compare plans for one model"
        )
    tables = [
        _compare_stack(name, first.stacks[name], second.stacks[name]) for name in first.stacks if name in second.stacks
    ]
    trimmed = [plan.vocabulary for plan in (first, second) if plan.vocabulary is not None]
    if trimmed:
        whole = range(trimmed[0].rows_before)
        kept = [whole if plan.vocabulary is None else plan.vocabulary.kept for plan in (first, second)]
        tables.append(
            ("vocabulary: tokens that both plans keep, as a share of what either keeps",
             ["", "tokens A / B", "in both"], [["vocabulary", *_overlap(*kept)]])
        )  # fmt: skip
    return tables


def _compare_stack(name: str, first: KeptStack, second: KeptStack) -> Table:
    a, b = ({layer.index: layer for layer in stack.layers} for stack in (first, second))
    rows = []
    for i in range(len(first.layers_before)):
        if i in a and i in b:
            heads, neurons = _overlap(a[i].q_heads, b[i].q_heads), _overlap(a[i].neurons, b[i].neurons)
            rows.append([str(i), "both", *heads, *neurons])
        else:
            rows.append([str(i), "A" if i in a else "B" if i in b else NONE, *[NONE] * 4])
    heads, neurons = (
        _overlap(*([(i, unit) for i, layer in side.items() for unit in getattr(layer, kind)] for side in (a, b)))
        for kind in ("q_heads", "neurons")
    )
    rows.append(["all", f"both: {_overlap(a, b)[1]}", *heads, *neurons])
    header = ["layer", "kept by", "heads A / B", "in both", "neurons A / B", "in both"]
    return f"{name}: what both plans keep, as a share of what either keeps", header, rows


def _overlap(first: Collection[object], second: Collection[object]) -> list[str]:
    """Return table cells with the counts that two plans keep, and the Jaccard overlap of their choices."""
    a, b = set(first), set(second)
    return [f"{len(a):,} / {len(b):,}", f"{100 * len(a & b) / len(a | b):.1f} %"]
