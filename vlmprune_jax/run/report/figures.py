"""The figures of a report, section by section: which data they show, and their text alternatives."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from markupsafe import Markup

from vlmprune_jax.base.errors import UserError, printable
from vlmprune_jax.core.layer import stack_title
from vlmprune_jax.core.part import AXES, LAYERS, WRITERS
from vlmprune_jax.core.plans.kept import KeptStack
from vlmprune_jax.core.prune import PrunePlan, Scores
from vlmprune_jax.core.prune.scores import Values
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.metrics import read_metrics
from vlmprune_jax.run.report import plots
from vlmprune_jax.run.report.page import Figure, Section
from vlmprune_jax.run.report.plots import INK, LARGEST, Cost, curves_figure, pareto_figure, styled
from vlmprune_jax.run.report.tables import speedup_of
from vlmprune_jax.run.workdir.groups import Comparison, ModelGroup
from vlmprune_jax.run.workdir.result import Result, Run
from vlmprune_jax.run.workdir.vocabulary import vocabulary_size

T = TypeVar("T")
MOST_UNITS = 1_000_000  # maximum cells of a figure
MOST_DRAWN = 20  # maximum figures of a kind, and curves per figure; tables are complete
MOST_CURVES = 6  # maximum figures of curves over the ratio, and over the data
MOST_LISTED = 40  # maximum numbers in a sentence
BANDS = "Bands: 95 % intervals over questions, and over seeds if there are three or more."


def drawable(groups: Sequence[ModelGroup]) -> list[ModelGroup]:
    """Return the groups whose retention is known and within the plot's axis."""
    return [group for group in groups if group.retained is not None and abs(group.retained[0]) < LARGEST]


def mean_of(value_of: Callable[[Run], float]) -> Callable[[ModelGroup], tuple[float, float, float]]:
    """Return a `Cost.place_of` without a range: the mean of a group's values."""
    return lambda group: (float(np.mean([value_of(model) for model in group.models])),) * 3


def _speedup(part: str) -> Callable[[ModelGroup], tuple[float, float, float]]:
    def place_of(group: ModelGroup) -> tuple[float, float, float]:
        speedup = speedup_of(group.models, part)
        return (1.0, 1.0, 1.0) if speedup is None else (speedup.ratio, speedup.low, speedup.high)

    return place_of


REMOVED = Cost("parameters removed (% of the model)", mean_of(lambda model: 100 * model.actual_ratio))
DATA = Cost("data trained on (%)", mean_of(lambda model: 100 * model.data_fraction))
PARAMETERS = Cost("parameters (millions)", mean_of(lambda model: model.parameters / 1e6))
COSTS = (
    PARAMETERS,
    Cost("weights (MiB)", mean_of(lambda model: model.costs.file_bytes / 2**20 if model.costs else np.nan)),
    Cost(
        "FLOPs of a prompt (GFLOPs)", mean_of(lambda model: model.costs.forward_flops / 1e9 if model.costs else np.nan)
    ),
)
SPEEDS = {
    part: Cost(f"{title} (times the unpruned model's tokens/s)", _speedup(part), rising=True)
    for part, title in (("prefill_speedup", "prefill"), ("decode_speedup", "decoding"))
}


def figure_of(drawn: Any, alt: str, caption: str) -> Figure:
    """Convert a matplotlib figure to a report `Figure`: an `<svg>` element in the page's text colour, with caption."""
    text = io.StringIO()
    with styled():
        drawn.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :].replace(INK, "currentColor"))
    digest = hashlib.sha256(svg.encode()).hexdigest()[:8]  # ids are of the page, not of a figure
    svg = re.sub(r'\bid="|href="#|url\(#', lambda match: f"{match[0]}f{digest}-", svg)
    return Figure(Markup(svg), printable(alt), caption)


def cost_section(comparison: Comparison, png: Path | None) -> Iterator[Section]:
    """Yield a report section that plots retention against costs and measured speed.

    `png`: file for the first figure.
    """
    pruned = drawable(comparison.groups)
    if not pruned:
        return
    groups = [*comparison.unpruned.values(), *pruned]
    costs = COSTS if all(model.costs for group in groups for model in group.models) else (PARAMETERS,)
    figure = pareto_figure(groups, costs)
    if png is not None:
        plots.write_png(figure, png)
    known = [f"{group.title} {group.retained[0]:.1f}" for group in pruned[:MOST_LISTED] if group.retained is not None]
    alt = (
        f"{len(pruned)} models: percent retained against {', '.join(cost.label for cost in costs)}: {', '.join(known)}"
    )
    front = "The line is the Pareto front"
    figures = [figure_of(figure, alt, f"Shape: pruning method; colour: recovery. {front}.")]
    timed = list[ModelGroup]()
    for group in pruned:
        speedups = [speedup_of(group.models, part) for part in SPEEDS]
        timed += [group] if all(speedup is not None and speedup.measurable for speedup in speedups) else []
    if timed:
        alt = f"{len(timed)} models: percent retained against speed, as a multiple of the unpruned model's."
        caption = (
            f"A shape is measured once, in turns with the unpruned model; bars are intervals over the rounds. {front}, "
            "without models that are faster than a better one by less than this interval."
        )
        figure = pareto_figure([next(iter(comparison.unpruned.values())), *timed], [*SPEEDS.values()])
        figures.append(figure_of(figure, alt, caption))
    yield Section("Retention and cost", figures=tuple(figures), folded=False)


def series_of(groups: Sequence[ModelGroup]) -> dict[str, str]:
    """Return {group: name of its line in plots}, usually the pruning method."""
    criteria = {(group.first.method, group.first.criterion) for group in groups}
    several = {method for method, _ in criteria if sum(method == other for other, _ in criteria) > 1}
    models, limits = {group.first.model for group in groups}, {group.first.image_tokens for group in groups}
    series, places = dict[str, str](), dict[tuple[Any, ...], list[ModelGroup]]()
    for group in groups:
        first = group.first
        name = f"{first.method}, {first.criterion}" if first.method in several else first.method
        name = f"{name} of {first.model.rstrip('/').rpartition('/')[2]}" if len(models) > 1 else name
        if len(limits) > 1:
            name = f"{name}, {first.image_tokens or 'all'} image tokens"
        series[group.name] = name
        asked = first.target_ratio  # None if the target was a number of layers
        share = round(group.mean("decoder_ratio"), 3) if asked is None else asked
        places.setdefault((name, group.recovery, first.data_fraction, share, first.image_tokens), []).append(group)
    extra = dict[str, None]()  # labels that tell groups of one place apart
    for same in places.values():
        labels = dict.fromkeys(label for group in same for label in group.labels)
        extra |= {label: None for label in labels if len({group.labels.get(label) for group in same}) > 1}
    for group in groups:
        values = (group.labels[label] for label in extra if label in group.labels)
        series[group.name] = ", ".join((series[group.name], *values))
    return series


def ratio_section(groups: Sequence[ModelGroup]) -> Iterator[Section]:
    """Yield a report section with curves of retention over the pruning ratio, if there are several ratios."""
    groups = drawable(groups)
    if len({_ratio(group) for group in groups}) < 2:
        return
    series, figures = series_of(groups), []
    for fraction in sorted({group.first.data_fraction for group in groups})[:MOST_CURVES]:
        some = [group for group in groups if group.first.data_fraction == fraction]
        training = f"Trained on {100 * fraction:g} % of the data" if fraction else "Without training"
        figure = curves_figure(some, lambda group: group.recovery, lambda group: series[group.name], REMOVED, "linear")
        alt = f"{training}: percent retained over the share of parameters removed, {len(some)} points."
        figures.append(figure_of(figure, alt, f"{training}. {BANDS}"))
    yield Section("Over the ratio", figures=tuple(figures))


def data_section(groups: Sequence[ModelGroup]) -> Iterator[Section]:
    """Yield a report section with curves of retention over the share of the data, if there are several shares."""
    trained = [group for group in drawable(groups) if group.first.data_fraction]
    if len({group.first.data_fraction for group in trained}) < 2:
        return
    series, figures = series_of(groups), []
    removed = dict[tuple[str, float], str]()
    for group in trained:
        whole, decoder = (100 * group.mean(name) for name in ("actual_ratio", "decoder_ratio"))
        text = f"{whole:.0f} % removed ({decoder:.0f} % of the decoder)"
        removed.setdefault((series[group.name], _ratio(group)), text)
    for name in list(dict.fromkeys(series[group.name] for group in trained))[:MOST_CURVES]:
        some = sorted((group for group in trained if series[group.name] == name), key=_ratio)
        figure = curves_figure(
            some, lambda group: removed[series[group.name], _ratio(group)], lambda group: group.recovery, DATA, "log"
        )
        alt = f"{name}: percent retained over the share of the training data, {len(some)} points."
        figures.append(figure_of(figure, alt, f"{name}. {BANDS}"))
    yield Section("Over the training data", figures=tuple(figures))


def _ratio(group: ModelGroup) -> float:
    """Return the pruning ratio by which a group is compared: the requested one, or the mean ratio reached."""
    asked = group.first.target_ratio
    return round(group.mean("actual_ratio"), 3) if asked is None else asked


def removed_section(workdir: Path, files: Iterable[str]) -> Iterator[Section]:
    """Yield report sections with maps of removed layers, heads and neurons."""
    plans = list[tuple[list[str], PrunePlan]]()  # plans that keep the same units share an entry
    for name in filter(None, files):
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


def importance_section(workdir: Path, plans: Mapping[str, Sequence[str]]) -> Iterator[Section]:
    """Yield report sections with importance scores, one per scores file; `plans`: see `Unfinished`."""
    figures = dict[str, Figure]()
    for plan_file, name in ((plan_file, name) for plan_file, names in plans.items() for name in names):
        if len(figures) < MOST_DRAWN:
            scores = Scores.load(workdir / name)
            plan = PrunePlan.from_json(workdir / plan_file) if plan_file else None
            caption = name if plan is None else f"{plan.method}: {name}"
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
    if len(rows) * (widest := max(map(len, rows))) > MOST_UNITS:
        raise UserError(
            f"{scores.criterion} scores are of {len(rows):,} layers with up to {widest:,} {unit}s, too many for a "
            "figure: score again"
        )
    kept = None
    if kept_of is not None:
        axis_of = {layer.index: next(axis for axis in scores.axes if axis in layer.kept) for layer in kept_of.layers}
        kept = {layer.index: {*layer.kept[axis_of[layer.index]]} for layer in kept_of.layers}
    return plots.unit_importance_figure(f"{what} per {unit}", rows, kept, unit)


def _importance_alt(scores: Scores) -> str:
    if heads := heads_of(scores.values):
        return f"Importance by {scores.criterion} of the attention heads of {len(heads)} layers"
    if experts := scores.along("experts"):
        return f"Importance by {scores.criterion} of the experts of {len(experts)} layers"
    order = sorted(range(len(scores.layers)), key=lambda layer: scores.layers[layer])
    listed = ", ".join(map(str, order[:MOST_LISTED])) + (", ..." if len(order) > MOST_LISTED else "")
    return f"Importance by {scores.criterion} of {len(order)} layers, least first: {listed}"


def loss_section(workdir: Path, result: Result) -> Iterator[Section]:
    """Yield a report section with the training loss curves of each recovery."""
    curves, titles = dict[int | None, dict[str, list[dict[str, Any]]]](), dict[str, str]()
    for run in result.entries:
        titles |= run.loss_terms or {name: name for name in LossConfig().weights()}
        path = workdir / run.metrics if run.metrics else None
        if path is not None and path.is_file() and sum(map(len, curves.values())) < MOST_DRAWN:
            tokens = vocabulary_size((workdir / run.plan).parent) if run.plan else None
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
    return [scores for key, scores in values.items() if key.layer is not None and AXES[key.axis].channels]
