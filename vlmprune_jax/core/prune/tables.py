"""Tables about plans: what each layer lost and why, and what two plans have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import stack_title
from vlmprune_jax.core.models.flops import layer_costs
from vlmprune_jax.core.part import AXES, LAYERS, Key
from vlmprune_jax.core.plans.kept import KeptLayer, KeptStack, Sizes
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.core.prune.config import PlanConfig
from vlmprune_jax.core.prune.routing import Routing
from vlmprune_jax.core.prune.scores import Scores
from vlmprune_jax.core.prune.select import merge_scores

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows
NONE = "-"


def explain(
    plan: PrunePlan, cfg: ModelConfig, spec: PlanConfig, scores: Sequence[Scores], routing: Routing | None = None
) -> list[Table]:
    """Return a table per pruned stack with each layer's removed units, and the reason for its widths.

    Args:
      cfg: config of the unpruned model.
      spec: the pruning settings of the plan.
      scores: scores of every pruned stack (for hybrid pruning, depth and width scores), see `make_plan`.
      routing: routing of the unpruned model, for the table of tokens that lose an expert.

    Raises UserError if the plan is for another model.
    """
    plan.check_sizes(cfg)
    tables = []
    for name, kept in plan.stacks.items():
        if not kept.is_whole or len(plan.stacks) == 1:
            merged = merge_scores([part for part in scores if name in part.components], plan.method)
            tables.append(_explain_stack(plan, cfg, spec, merged, name))
    return tables if routing is None else [*tables, affected_tokens(plan, routing)]


def affected_tokens(plan: PrunePlan, routing: Routing) -> Table:
    """Return a table of the calibration tokens that lose an expert, by layer and token type, without a forward pass.

    `routing` is that of the plan's model (`Routing.of_plan`).
    """
    before = plan.stacks["text"].sizes_before
    pruned = [x for x in plan.layers if len(x.kept.get("experts", ())) < before[x.index].get("experts", 0)]
    shares = {layer.index: routing.affected(layer.index, layer.kept["experts"]) for layer in pruned}
    header = ["layer", *(f"{name} tokens" for name in routing.occurring)]
    rows = [[str(i), *(f"{100 * share:.1f} %" for share in of_layer.values())] for i, of_layer in shares.items()]
    means = np.mean([[*of_layer.values()] for of_layer in shares.values()], axis=0)
    title = f"decoder: share of {len(routing.token_types):,} calibration tokens that lose an expert in a layer"
    return title, header, [*rows, ["mean", *(f"{100 * mean:.1f} %" for mean in means)]]


def _explain_stack(plan: PrunePlan, cfg: ModelConfig, spec: PlanConfig, scores: Scores, name: str) -> Table:
    stack, cost = plan.stacks[name], layer_costs(cfg, name).of
    entries = {layer.index: layer for layer in stack.layers}
    layers = [(i, layer, entries.get(i)) for i, layer in enumerate(cfg.stack(name).layers)]
    columns = [("layer", [*(str(i) for i, *_ in layers), "all"])]
    for axis in _shown(stack.sizes_before):
        left = [0 if entry is None else entry.sizes.get(axis, 0) for *_, entry in layers]
        sizes = [layer.sizes.get(axis) for _, layer, _ in layers]
        cells = [NONE if size is None else f"{kept:,} of {size:,}" for kept, size in zip(left, sizes, strict=True)]
        columns.append((_heading(axis), [*cells, NONE]))
    before = [cost(layer) for _, layer, _ in layers]
    after = [0 if entry is None else cost(layer.resized(entry.sizes)) for _, layer, entry in layers]
    costs = [*zip(before, after, strict=True), (sum(before), sum(after))]
    columns.append(("parameters lost", [f"{whole - kept:,}" for whole, kept in costs]))
    columns.append(("share", [f"{100 * (whole - kept) / whole:.1f} %" for whole, kept in costs]))
    importance = scores.values.get(Key(name, None, LAYERS))
    if importance is not None:
        ranks = np.argsort(np.argsort(importance, kind="stable"))
        columns.append(("score", [*(f"{score:.4g}" for score in importance), NONE]))
        columns.append(("rank", [*(f"{rank + 1} of {len(ranks)}" for rank in ranks), NONE]))
    for axis in scores.axes:
        cells = [_score_lost(scores, Key(name, i, axis), entry) for i, _, entry in layers]
        columns.append((f"score lost, {_heading(axis)}", [*cells, NONE]))
    reasons = [_why(i, entry, spec, plan.method) for i, _, entry in layers]
    columns.append(("why", [*reasons, f"{len(entries)} layers kept"]))
    rounds = f", scores of the first of {plan.options['steps']} rounds" if plan.options.get("steps", 1) > 1 else ""
    title = f"{stack_title(name)}: what each layer lost ({plan.method} by {plan.criterion}{rounds})"
    return title, [header for header, _ in columns], [[*row] for row in zip(*(x for _, x in columns), strict=True)]


def _shown(sizes: Sequence[Sizes]) -> list[str]:
    """Return the names of the axes that tables show: all except groups of heads (key/value heads)."""
    axes = dict.fromkeys(axis for layer in sizes for axis in layer)
    groups = {AXES[axis].parent for axis in axes if AXES[axis].channels}
    return [axis for axis in axes if axis not in groups]


def _heading(axis: str) -> str:
    return AXES[axis].title if AXES[axis].parent and not AXES[axis].channels else AXES[axis].title.split()[-1]


def _score_lost(scores: Scores, key: Key, layer: KeptLayer | None) -> str:
    """Return a table cell with the share of a layer's scores along an axis that pruning removes."""
    if layer is None or key not in scores.values:
        return NONE
    values = scores.values[key]
    total = float(values.sum())
    return f"{100 * (1 - float(values[list(layer.kept[key.axis])].sum()) / total):.1f} %" if total > 0 else NONE


def _why(index: int, layer: KeptLayer | None, spec: PlanConfig, method: str) -> str:
    """Return the reason for a layer's widths as text, such as "protected", "heads kept" or "by score"."""
    if layer is None:
        return "removed"
    if index in spec.protect:
        return "protected"
    if method == "depth":
        return "kept"
    heads, neurons = (not layers or layers[0] <= index < layers[1] for layers in (spec.attn_layers, spec.mlp_layers))
    reasons = ["heads kept"] if spec.heads == "keep" else [] if heads else ["heads out of range"]
    reasons += [] if neurons else ["neurons out of range"]
    multiples = ("align_to", "tensor_parallel", "heads_multiple", "neurons_multiple")
    if len(reasons) < 2:
        reasons += [f"{name}={value}" for name in multiples if (value := getattr(spec, name)) not in (None, 1)]
    return ", ".join(reasons) or "by score"


def compare(first: PrunePlan, second: PrunePlan) -> list[Table]:
    """Compare two plans layer by layer: Jaccard overlap of the heads, neurons and layers that they keep.

    Raises UserError if the plans are for different models.
    """
    if first.fingerprint != second.fingerprint:
        raise UserError(
            f"these plans are for different models (fingerprints {first.fingerprint} and {second.fingerprint}): "
            "compare plans for one model"
        )
    names = [name for name in first.stacks if name in second.stacks]
    tables = [_compare_stack(name, first.stacks[name], second.stacks[name]) for name in names]
    trimmed = [plan.vocabulary for plan in (first, second) if plan.vocabulary is not None]
    if trimmed:
        whole = np.arange(trimmed[0].rows_before)
        kept = [whole if plan.vocabulary is None else plan.vocabulary.kept for plan in (first, second)]
        tables.append(
            ("vocabulary: tokens that both plans keep, as a share of what either keeps",
             ["", "tokens A / B", "in both"], [["vocabulary", *_cells(_overlap(*kept))]])
        )  # fmt: skip
    return tables


def _compare_stack(name: str, first: KeptStack, second: KeptStack) -> Table:
    a, b = ({layer.index: layer.kept for layer in stack.layers} for stack in (first, second))
    axes = _shown(first.sizes_before)
    rows, totals = [], [(0, 0, 0)] * len(axes)
    for i in range(len(first.sizes_before)):
        counts = [_overlap(*(side.get(i, {}).get(axis, ()) for side in (a, b))) for axis in axes]
        totals = [(x + n, y + m, z + both) for (x, y, z), (n, m, both) in zip(totals, counts, strict=True)]
        if i in a and i in b:
            rows.append([str(i), "both", *(cell for count in counts for cell in _cells(count))])
        else:
            rows.append([str(i), "A" if i in a else "B" if i in b else NONE, *[NONE] * 2 * len(axes)])
    layers = _cells(_overlap([*a], [*b]))[1]
    rows.append(["all", f"both: {layers}", *(cell for count in totals for cell in _cells(count))])
    header = ["layer", "kept by", *(cell for axis in axes for cell in (f"{_heading(axis)} A / B", "in both"))]
    return f"{name}: what both plans keep, as a share of what either keeps", header, rows


def _overlap(first: ArrayLike, second: ArrayLike) -> tuple[int, int, int]:
    """Return how many units the first plan keeps, the second plan keeps, and both keep."""
    a, b = np.asarray(first, np.int64), np.asarray(second, np.int64)
    return len(a), len(b), len(np.intersect1d(a, b, assume_unique=True))


def _cells(counts: Sequence[int]) -> list[str]:
    """Return table cells with the counts that two plans keep, and the Jaccard overlap of their choices."""
    first, second, both = counts
    either = first + second - both
    return [f"{first:,} / {second:,}", f"{100 * both / either:.1f} %" if either else NONE]
