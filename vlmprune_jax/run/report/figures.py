"""The figures of a report, section by section, each with a text alternative, and importance by token type."""

from __future__ import annotations

import itertools
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
from vlmprune_jax.core.prune.routing import ROUTING, Routing
from vlmprune_jax.core.prune.scores import Values
from vlmprune_jax.core.prune.tables import AFFECTED, affected_tokens
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.metrics import read_metrics
from vlmprune_jax.core.stack import stack_title
from vlmprune_jax.run.report import plots
from vlmprune_jax.run.report.page import Figure, Section, Table
from vlmprune_jax.run.report.style import to_svg, write_png
from vlmprune_jax.run.report.tables import over, upper
from vlmprune_jax.run.report.vocabulary import vocabulary_size
from vlmprune_jax.run.workdir.evaluation import UNPRUNED
from vlmprune_jax.run.workdir.result import Result, Run
from vlmprune_jax.run.workdir.steps import Variant

T = TypeVar("T")
MOST_UNITS = 1_000_000  # maximum cells of a figure
MOST_DRAWN = 20  # maximum figures of a kind, and curves per figure; tables are complete
MOST_LISTED, MOST_SERVING = 40, 5  # maximum numbers in a sentence, and layers or heads named for images


def figure_of(drawn: Any, alt: str, caption: str) -> Figure:
    """Convert a matplotlib figure to a report `Figure` (SVG with caption)."""
    return Figure(Markup(to_svg(drawn)), printable(alt), caption)


def score_sections(workdir: Path, result: Result) -> Iterator[Section]:
    """Yield report sections that plot retention against speed or size, and scores per evaluation set."""
    sets, runs = result.sets, [run.evaluation for run in result.runs]
    title = f"Retained {over(sets)}"
    intervals: list[tuple[float, float] | None] = []
    if len(sets) == 1:
        [(name, metric)] = sets.items()
        title = f"Retained {metric.main} on {metric.size}"
        intervals = [None, *(run.retained_interval.get(name) for run in runs)]
    kept = [100.0, *(run.mean_of_ratios for run in runs)]
    first = plots.Measured("Retained", title, "retained (%)", kept, intervals, retention=True)
    write_png(plots.score_figure(result, first), workdir / "report.png")
    caption = "The dashed line is the unpruned model; the axis is logarithmic in the distance from 100 %."
    yield Section("Retention, size and speed", figures=(_score_panels(result, first, caption),), folded=False)
    if len(sets) > 1:
        figures, models = [], [result.teacher.evaluation, *runs]
        for name, metric in itertools.islice(sets.items(), MOST_DRAWN):
            values = [model.main(name, sets) for model in models]
            scaled = [None if value is None else metric.scale * value for value in values]
            label = metric.main + (f" ({metric.unit})" if metric.unit else "")
            measured = plots.Measured(
                upper(metric.main), f"{name}: {upper(metric.main)} on {metric.size}", label, scaled
            )
            better = "Higher is better." if metric.higher_is_better else "Lower is better."
            figures.append(_score_panels(result, measured, better))
        yield Section("Every evaluation set", figures=tuple(figures))


def _score_panels(result: Result, measured: plots.Measured, caption: str) -> Figure:
    """Return the panels of a score figure, which narrow screens show below each other."""
    alt = _score_alt(result, measured)
    points, rows = (figure_of(plots.score_figure(result, measured, (p,)), alt, caption) for p in plots.PANELS)
    return replace(points, svg=points.svg + rows.svg)


def _score_alt(result: Result, measured: plots.Measured) -> str:
    names = [result.labels[name] for name in (UNPRUNED, *(run.name for run in result.runs))]
    values = zip(names[:MOST_LISTED], measured.values, strict=False)
    listing = ", ".join(f"{name} {'unknown' if value is None else f'{value:.1f}'}" for name, value in values)
    return f"{measured.title}, against speed or size and in rows, in {measured.label}: {listing}"


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


def affected_section(workdir: Path, variants: Sequence[Variant]) -> Iterator[Section]:
    """Yield a report section with the calibration tokens that lose an expert, for each plan that removes experts."""
    tables = dict[tuple[Any, ...], Table]()
    for plan, name in {(run.plan, name): None for run in variants if run.plan for name in run.scores}:
        kept = PrunePlan.from_json(workdir / plan)
        routing = Routing.of_plan((workdir / name).with_name(ROUTING), kept)
        if routing is not None:
            title, header, rows = affected_tokens(kept, routing)
            tables.setdefault(tuple(map(tuple, rows)), Table(title, tuple(header), tuple(map(tuple, rows))))
    if tables:
        yield Section("Tokens that lose an expert", tables=tuple(tables.values()), notes=(AFFECTED,))


def kinds_section(workdir: Path, variants: Sequence[Variant]) -> Iterator[Section]:
    """Yield report sections with importance by token type (prompt, image, answer)."""
    figures = dict[str, Figure]()
    for name in dict.fromkeys(name for run in variants for name in run.scores):
        scores = Scores.load(workdir / name)
        if scores.by_token_type and len(figures) < MOST_DRAWN:
            if heads := heads_of(scores.values):
                _check_drawable(f"{scores.criterion} scores are", list(map(len, heads)))
            shares = {k: (head_shares(arrays), layer_shares(arrays)) for k, arrays in scores.by_token_type.items()}
            drawn = plots.kinds_figure(f"{scores.criterion} by token type", shares)
            alt = f"Importance by {scores.criterion} per layer, apart for {', '.join(shares)} tokens"
            figure = figure_of(drawn, alt, f"{name}. {serves_vision(scores)}")
            figures.setdefault(figure.svg, figure)
    if figures:
        yield Section("Importance by token type", figures=tuple(figures.values()))


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


def layer_shares(values: Values) -> np.ndarray:
    """Return each layer's share of all importance for one token type, float64[n_layers] (sum 1).

    Width scores are summed over neurons (most of a layer's parameters). Infinite scores (never removed) have weight 0.
    """
    whole = [scores for key, scores in values.items() if key.axis == LAYERS]
    neurons = {key.layer: float(np.sum(scores)) for key, scores in values.items() if not _is_of_heads(key)}
    return _shares(whole or [np.array([*neurons.values()])])[0]


def head_shares(values: Values) -> list[np.ndarray] | None:
    """Return each attention head's share of the total importance over all layers; None without head scores."""
    heads = heads_of(values)
    return _shares(heads) if heads else None


def heads_of(values: Values) -> list[np.ndarray]:
    """Return the scores of units of several channels (such as attention heads), layer by layer."""
    return [scores for key, scores in values.items() if _is_of_heads(key)]


def _is_of_heads(key: Key) -> bool:
    return key.layer is not None and bool(AXES[key.axis].channels)


def _shares(layers: Sequence[np.ndarray]) -> list[np.ndarray]:
    finite = [np.where(np.isfinite(layer), layer, 0.0) for layer in layers]
    largest = max(float(np.max(np.abs(layer))) for layer in finite) or 1.0  # scaled first: a sum may overflow
    total = sum(float(np.sum(layer / largest)) for layer in finite) or 1.0
    return [layer / largest / total for layer in finite]


def serves_vision(scores: Scores) -> str:
    """Return text naming up to 5 layers and heads that matter more for images than for text; "" if unknown."""
    text = [arrays for kind, arrays in scores.by_token_type.items() if kind != "image"]
    if "image" not in scores.by_token_type or not text:
        return ""
    image = scores.by_token_type["image"]
    leaning = _leaning([layer_shares(image)], [[layer_shares(arrays)] for arrays in text])[0]
    named = [f"layers {_named([(f'{i}', share) for i, share in enumerate(leaning)])}"]
    heads = head_shares(image)
    if heads is not None:
        by_layer = _leaning(heads, [head_shares(arrays) or [] for arrays in text])
        named.append(
            f"heads {_named([(f'{i}.{n}', s) for i, layer in enumerate(by_layer) for n, s in enumerate(layer)])}"
        )
    return (
        f"Most important for images: {'; '.join(named)}. In brackets: importance for images as a share of that for "
        "images and text, each divided by its sum over the model; 0.50 is no preference. A head is named layer.head."
    )


def _leaning(image: Sequence[np.ndarray], text: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Return each layer's image share of importance (1 = only images matter, 0.5 = no importance)."""
    shares = []
    for i, layer in enumerate(image):
        both = layer + np.mean([kind[i] for kind in text], axis=0)
        shares.append(np.where(both > 0, layer / np.where(both > 0, both, 1.0), 0.5))
    return shares


def _named(shares: Sequence[tuple[str, float]]) -> str:
    first = sorted(shares, key=lambda pair: -pair[1])[:MOST_SERVING]
    return ", ".join(f"{name} ({share:.2f})" for name, share in first if share > 0.5) or "none"
