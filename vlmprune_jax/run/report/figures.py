"""The figures of a report, section by section, each with a text alternative."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from markupsafe import Markup

from vlmprune_jax.base.errors import UserError, printable
from vlmprune_jax.core.part import AXES, LAYERS, WRITERS, Key
from vlmprune_jax.core.plans.kept import KeptStack
from vlmprune_jax.core.prune import PrunePlan, Scores
from vlmprune_jax.core.prune.scores import Values
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.metrics import read_metrics
from vlmprune_jax.core.stack import stack_title
from vlmprune_jax.run.report import plots
from vlmprune_jax.run.report.page import Figure, Section
from vlmprune_jax.run.report.style import to_svg, write_png
from vlmprune_jax.run.report.tables import over
from vlmprune_jax.run.report.vocabulary import vocabulary_size
from vlmprune_jax.run.workdir.result import Result, Run
from vlmprune_jax.run.workdir.steps import Variant

T = TypeVar("T")
MOST_UNITS = 1_000_000  # maximum cells of a figure
MOST_DRAWN = 20  # maximum figures of a kind, and curves per figure; tables are complete
MOST_LISTED = 40  # maximum numbers in a sentence


def figure_of(drawn: Any, alt: str, caption: str) -> Figure:
    """Convert a matplotlib figure to a report `Figure` (SVG with caption)."""
    return Figure(Markup(to_svg(drawn)), printable(alt), caption)


def score_section(workdir: Path, result: Result) -> Section:
    """Return a report section that plots retention against speed or size, and write it as `report.png`."""
    title = f"Retained {over(result.sets)}"
    if len(result.sets) == 1:
        [metric] = result.sets.values()
        title = f"Retained {metric.main} on {metric.size}"
    write_png(plots.score_figure(result, title), workdir / "report.png")
    values = []
    for run in result.runs[:MOST_LISTED]:
        kept = run.evaluation.mean_of_ratios
        values.append(f"{result.labels[run.name]} {'unknown' if kept is None else f'{kept:.1f}'}")
    alt = f"{title}, against speed or size and in rows, in %: {', '.join(values)}"
    caption = "The dashed line is the unpruned model; the axis is logarithmic in the distance from 100 %."
    # Narrow screens show the panels below each other.
    points, rows = (figure_of(plots.score_figure(result, title, (panel,)), alt, caption) for panel in plots.PANELS)
    return Section("Retention, size and speed", figures=(replace(points, svg=points.svg + rows.svg),), folded=False)


def removed_section(workdir: Path, variants: Sequence[Variant]) -> Iterator[Section]:
    """Yield report sections with maps of removed layers, heads and neurons."""
    plans = list[tuple[list[str], PrunePlan]]()  # plans that keep the same units share an entry
    for name in dict.fromkeys(run.plan for run in variants if run.plan):
        plan = PrunePlan.from_json(workdir / name)
        names = next((names for names, known in plans if known.stacks == plan.stacks), None)
        if names is None:
            plans.append((names := [], plan))
        names.append(name)
    figures = list[Figure]()
    for names, plan in plans:
        for stack, kept in plan.stacks.items():
            if not kept.is_whole and len(figures) < MOST_DRAWN:
                layers = {layer.index: _by_branch(layer.kept, ()) for layer in kept.layers}
                widths = [_by_branch(sizes, 0) for sizes in kept.sizes_before]
                component = stack_title(stack)
                drawn = plots.removed_figure(f"{plan.method}: what is left of the {component}", widths, layers)
                caption = f"{', '.join(names[:MOST_LISTED])}, by {plan.criterion}"
                figures.append(figure_of(drawn, _removed_alt(component, kept), caption))
    if figures:
        yield Section("What was removed", figures=tuple(figures))


def _by_branch(values: Mapping[str, T], absent: T) -> tuple[T, T]:
    """Split a layer's values by axis into those of its mixer and of its channel mixer, without parent axes."""
    parents = {AXES[axis].parent for axis in values}
    branches = {WRITERS[axis]: value for axis, value in values.items() if axis not in parents}
    return branches.get("o_proj", absent), branches.get("down_proj", absent)


def _removed_alt(component: str, kept: KeptStack) -> str:
    before = kept.sizes_before
    gone = ", ".join(map(str, kept.removed_layers[:MOST_LISTED])) or "none"
    left, whole = ([_by_branch(sizes, 0) for sizes in layers] for layers in (kept.sizes, before))
    heads, neurons = (
        f"{sum(sizes[branch] for sizes in left):,} of {sum(sizes[branch] for sizes in whole):,}" for branch in (0, 1)
    )
    return (
        f"Map of the {component}: {len(kept.layers)} of {len(before)} layers stay, removed layers: {gone}; "
        f"{heads} heads and {neurons} neurons stay"
    )


def importance_section(workdir: Path, variants: Sequence[Variant]) -> Iterator[Section]:
    """Yield report sections with importance scores, one per scores file and plan."""
    figures = dict[str, Figure]()
    for plan_file, method, name in dict.fromkeys(
        (run.plan, run.method, name) for run in variants for name in run.scores
    ):
        if len(figures) < MOST_DRAWN:
            scores = Scores.load(workdir / name)
            plan = None if plan_file is None else PrunePlan.from_json(workdir / plan_file)
            caption = name if method is None else f"{method}: {name}"
            figure = figure_of(importance_figure(scores, plan), _importance_alt(scores), caption)
            figures.setdefault(figure.svg, figure)  # variants of one plan have equal scores
    if figures:
        yield Section("Importance", figures=tuple(figures.values()))


def importance_figure(scores: Scores, plan: PrunePlan | None) -> Any:
    """Plot importance scores, and mark the layers and heads that a plan removes.

    Raises UserError if there are too many scores for a figure, or the plan has no entry for their stack.
    """
    component = scores.components[0]
    if plan is not None and component not in plan.stacks:
        raise UserError(f"{scores.criterion} scores are for the {component} stack, which the plan does not contain")
    kept_of = None if plan is None else plan.stacks[component]
    what = scores.criterion if component == "text" else f"{scores.criterion} of the tower"
    by_layer = scores.along(LAYERS) and plan is not None and plan.method == "depth"
    heads, experts = heads_of(scores.values), scores.along("experts")
    if not (heads or experts) or by_layer:
        gone = () if kept_of is None else kept_of.removed_layers
        return plots.layer_importance_figure(f"{what} per layer", scores.layers, gone)
    rows, unit = (heads, "attention head") if heads else (experts, "expert")
    _check_drawable(f"{scores.criterion} scores are", list(map(len, rows)))
    if kept_of is None:
        kept = {i: (set(range(len(heads))), 1, 1) for i, heads in enumerate(rows)}
    else:
        kept = {
            layer.index: (
                set(layer.kept[next(axis for axis in scores.axes if axis in layer.kept)]),
                _by_branch(layer.sizes, 0)[1],
                _by_branch(kept_of.sizes_before[layer.index], 0)[1],
            )
            for layer in kept_of.layers
        }
    return plots.width_importance_figure(f"{what} per {unit}", rows, kept, unit)


def _importance_alt(scores: Scores) -> str:
    if heads := heads_of(scores.values):
        return f"Importance by {scores.criterion} of the attention heads of {len(heads)} layers"
    if experts := scores.along("experts"):
        return f"Importance by {scores.criterion} of the experts of {len(experts)} layers"
    order = sorted(range(len(scores.layers)), key=lambda layer: scores.layers[layer])
    return f"Importance by {scores.criterion} of {len(order)} layers, least first: {_listed(order)}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:MOST_LISTED])) + (", ..." if len(numbers) > MOST_LISTED else "")


def _check_drawable(what: str, widths: Sequence[int]) -> None:
    if len(widths) * max(widths) > MOST_UNITS:
        raise UserError(
            f"{what} has {len(widths):,} layers with up to {max(widths):,} heads, too many for a figure: score again"
        )


def loss_section(workdir: Path, result: Result) -> Iterator[Section]:
    """Yield a report section with the training loss curves of each recovery."""
    curves, titles = dict[int | None, dict[str, list[dict[str, Any]]]](), dict[str, str]()
    for run in result.entries:
        titles |= run.loss_terms or {name: name for name in LossConfig().weights()}
        path = workdir / run.metrics if run.metrics else None
        if path is not None and path.is_file() and sum(map(len, curves.values())) < MOST_DRAWN:
            tokens = vocabulary_size((workdir / run.plan).parent) if isinstance(run, Run) else None
            curves.setdefault(tokens, {})[result.labels[run.name]] = read_metrics(path)
    figures = []
    for tokens, lines in curves.items():  # losses are per token, so those of different vocabularies do not compare
        drawn = plots.loss_figure(lines, titles)
        if drawn is not None:
            steps = max(row["step"] for rows in lines.values() for row in rows)
            note = "" if len(curves) == 1 else f" Vocabulary: {'whole' if tokens is None else f'{tokens:,} tokens'}."
            alt = f"Training losses over {steps:,} steps of {', '.join(lines)}.{note}"
            figures.append(figure_of(drawn, alt, f"Mean over each logged batch; logarithmic.{note}"))
    if figures:
        yield Section("Recovery training", figures=tuple(figures))


def heads_of(values: Values) -> list[np.ndarray]:
    """Return the scores of units of several channels (such as attention heads), layer by layer."""
    return [scores for key, scores in values.items() if _is_of_heads(key)]


def _is_of_heads(key: Key) -> bool:
    return key.layer is not None and bool(AXES[key.axis].channels)
