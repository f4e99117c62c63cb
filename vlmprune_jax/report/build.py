"""From a workdir's result.json to `report.html` and `report.png`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vlmprune_jax.checked_files import read_text, replacing
from vlmprune_jax.errors import UserError, printable
from vlmprune_jax.prune import PrunePlan, Scores
from vlmprune_jax.recovery.config import LossConfig
from vlmprune_jax.recovery.metrics import read_metrics
from vlmprune_jax.report import fit, kinds, plots
from vlmprune_jax.report.result import averaged_sets, main_value, read_result, shown

Json = dict[str, Any]
MOST_UNITS = 1_000_000  # cells of a figure
MOST_DRAWN = 20  # figures of a kind, curves in one; the tables have everything
NOTES = (
    "Data: share of the training records used for recovery. Asked, reached: share of all parameters to remove. "
    "Retained: share of the unpruned model's score, in percent{averages}. Seconds: scoring, pruning and training, "
    "without evaluation."
)
AVERAGES = (
    ", of several evaluation sets the mean. Paper avg: the sum of all scores, each divided by a perfect model's, as a "
    "share of the unpruned model's sum"
)


@dataclass(frozen=True)
class Table:
    """One table of text; the first column names the models, the unpruned one first."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables_of(result: Json) -> list[Table]:
    """The summary of all models; of several evaluation sets also the scores, and what was retained of each."""
    sets, models = result["sets"], [{"name": "unpruned", **result["teacher"]}, *result["runs"]]
    rows = [_summary(model, result["teacher"], sets) for model in models]
    summary = Table(
        f"{_columns_title(sets)}; asked, reached: shares of all parameters",
        ("model", "data", "parameters", "asked", "reached", *_columns(sets), "seconds"),
        tuple(rows),
    )
    if len(sets) == 1:
        return [summary]
    header = ("model", *sets)
    scores = [
        (printable(m["name"]), *(shown(main_value(m, name, sets), of, unit=False) for name, of in sets.items()))
        for m in models
    ]
    kept = [
        (printable(m["name"]), *(_percent(m["evaluation"]["retained"].get(name)) for name in sets)) for m in models[1:]
    ]
    return [
        summary,
        Table(", ".join(f"{name}: {_label(of)}" for name, of in sets.items()), header, tuple(scores)),
        Table("Retained of each, in %", header, tuple(kept)),
    ]


def _columns(sets: Json) -> tuple[str, str]:
    """The two columns that say how good a model is."""
    return (next(iter(sets.values()))["main"], "retained") if len(sets) == 1 else ("retained", "paper avg")


def _columns_title(sets: Json) -> str:
    if len(sets) == 1:
        return f"{_upper(_label(next(iter(sets.values()))))}, retained in %"
    return f"Retained {_over(sets)}, and the paper's average, in %"


def _summary(model: Json, teacher: Json, sets: Json) -> tuple[str, ...]:
    if "ratio_reached" not in model:
        what = ("", f"{model['parameters']:,}", "", "")
        averages, seconds = (100.0, 100.0), ""
    else:
        asked = model["ratio_asked"]
        what = (
            f"{100 * model['data_fraction']:g} %" if model["data_fraction"] else "",
            f"{model['parameters']:,}",
            "" if asked is None else f"{asked:.3f}",
            f"{model['ratio_reached']:.3f}",
        )
        averages = (model["evaluation"]["mean_of_ratios"], model["evaluation"]["paper_average"])
        seconds = f"{model['seconds']:.1f}"
    worth = tuple(map(_percent, averages))
    if len(sets) == 1:
        name, of = next(iter(sets.items()))
        worth = (shown(main_value(model, name, sets), of, unit=False), worth[0])
    return printable(model["name"]), *what, *worth, seconds


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _label(described: Json) -> str:
    """ "accuracy in %": the main value of a set and its unit."""
    return described["main"] + (f" in {described['unit']}" if described["unit"] else "")


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def build_report(workdir: Path) -> Path:
    """Write `report.html` (one file, nothing external) and `report.png`; returns the page's path.

    Raises:
      UserError: `result.json` is missing or damaged.
    """
    result = read_result(workdir)
    measured = _measured(result)
    first = plots.score_figure(result, measured[0])
    plots.write_png(first, workdir / "report.png")
    page = (
        _environment()
        .get_template("template.html")
        .render(
            title="Structural pruning report",
            lead=_lead(result),
            tables=tables_of(result),
            best=printable(result["best"]),
            notes=NOTES.format(averages=AVERAGES if len(result["sets"]) > 1 else ""),
            sections=[
                {
                    "title": f"{measured[0].name} and size",
                    "figures": [_figure(first, "The dashed line is the unpruned model.")],
                },
                *_set_section(result, measured[1:]),
                *_importance_section(workdir, result),
                *_kinds_section(workdir, result),
                *_loss_section(workdir, result),
            ],
            groups=list(_groups(result)),
            planned=fit.read_planned(workdir),
            planned_notes=fit.NOTES,
            export=_export_line(result),
            result_json=read_text(workdir / "result.json"),
        )
    )
    out = workdir / "report.html"
    with replacing(out) as file:
        file.write(page.encode(errors="backslashreplace"))
    return out


def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("vlmprune_jax.report", ".")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)


def _lead(result: Json) -> str:
    run = next(run for run in result["runs"] if run["name"] == result["best"])
    teacher = result["teacher"]
    smaller = 1 - run["parameters"] / teacher["parameters"]
    recovery = "without recovery" if run["recovery"] == "none" else f"{run['recovery']}, without training,"
    if run["data_fraction"]:
        recovery = f"after recovery ({run['recovery']}) on {100 * run['data_fraction']:g} % of the training data"
    among = f"Best of {len(result['runs'])} models: " if len(result["runs"]) > 1 else ""
    return (
        f"{among}{run['name']} has {run['parameters']:,} of {teacher['parameters']:,} parameters "
        f"({100 * smaller:.1f} % fewer) and {_worth(run, result)} {recovery}{_unpruned(result)}."
    )


def _worth(run: Json, result: Json) -> str:
    sets = result["sets"]
    if len(sets) > 1:
        kept = _percent(run["evaluation"]["mean_of_ratios"])
        share = f"{kept} % of the unpruned model's score" if kept else "an unknown share of the score"
        return f"retains {share} {_over(sets)}"
    name, of = next(iter(sets.items()))
    return f"reaches {_reached(run, name, sets)} {of['main']} on {_count(of)}"


def _over(sets: Json) -> str:
    averaged = averaged_sets(sets)
    return f"on {averaged[0]}" if len(averaged) == 1 else f"on average over {len(averaged)} evaluation sets"


def _unpruned(result: Json) -> str:
    sets = result["sets"]
    return (
        "" if len(sets) > 1 else f"; the unpruned model reaches {_reached(result['teacher'], next(iter(sets)), sets)}"
    )


def _reached(model: Json, name: str, sets: Json) -> str:
    return shown(main_value(model, name, sets), sets[name])


def _count(described: Json) -> str:
    counted = "questions" if "questions" in described else "tokens"
    return f"{described[counted]:,} {counted}"


def _measured(result: Json) -> list[plots.Measured]:
    """What figures show: the value of the only evaluation set; of several first what was retained, then each."""
    sets, teacher, runs = result["sets"], result["teacher"], result["runs"]
    each = []
    for name, of in sets.items():
        values = [main_value(model, name, sets) for model in (teacher, *runs)]
        scaled = [None if value is None else of["scale"] * value for value in values]
        label = of["main"] + (f" ({of['unit']})" if of["unit"] else "")
        title = f"{_upper(of['main'])} on {_count(of)}"
        full = None if of["full"] is None else of["scale"] * of["full"]
        each.append(
            plots.Measured(_upper(of["main"]), title if len(sets) == 1 else f"{name}: {title}", label, full, scaled)
        )
    if len(sets) == 1:
        return each
    kept = [100.0, *(run["evaluation"]["mean_of_ratios"] for run in runs)]
    return [plots.Measured("Retained", f"Retained {_over(sets)}", "retained (%)", 100.0, kept), *each]


def _set_section(result: Json, measured: Sequence[plots.Measured]) -> Iterator[Json]:
    if measured:
        better = [
            "Higher is better." if of["higher_is_better"] else "Lower is better." for of in result["sets"].values()
        ]
        drawn = (plots.score_figure(result, one) for one in measured[:MOST_DRAWN])
        figures = [_figure(figure, caption) for figure, caption in zip(drawn, better, strict=False)]
        yield {"title": "Every evaluation set", "figures": figures}


def _figure(figure: Any, caption: str) -> Json:
    return {"svg": Markup(plots.to_svg(figure)), "caption": caption}


def _importance_section(workdir: Path, result: Json) -> Iterator[Json]:
    """One figure per scores file; variants that share one are drawn once per plan."""
    figures, seen = list[Json](), set[str]()
    for run in result["runs"]:
        if run["plan"] in seen or len(figures) >= MOST_DRAWN:
            continue
        seen.add(run["plan"])
        plan = PrunePlan.from_json(workdir / run["plan"])
        for name in run["scores"]:
            scores = Scores.load(workdir / name)
            figures.append(_figure(_importance_figure(scores, plan), f"{run['method']}: {name}"))
    if figures:
        yield {"title": "Importance and what was removed", "figures": figures}


def _kinds_section(workdir: Path, result: Json) -> Iterator[Json]:
    """One figure per scores file that tells kinds of tokens apart."""
    figures = list[Json]()
    for name in dict.fromkeys(name for run in result["runs"] for name in run["scores"]):
        scores = Scores.load(workdir / name)
        if scores.by_kind and len(figures) < MOST_DRAWN:
            _check_drawable(scores)
            shares = {k: (kinds.head_shares(parts), kinds.layer_shares(parts)) for k, parts in scores.by_kind.items()}
            figure = plots.kinds_figure(f"{scores.criterion} by kind of token", shares)
            figures.append(_figure(figure, f"{name}. {kinds.serves_vision(scores)}"))
    if figures:
        yield {"title": "Importance by kind of token", "figures": figures}


def _importance_figure(scores: Scores, plan: PrunePlan) -> Any:
    if scores.stack not in plan.stacks:
        raise UserError(f"{scores.criterion} scores are of the {scores.stack} stack, which the plan says nothing about")
    kept_of = plan.stacks[scores.stack]
    what = scores.criterion if scores.stack == "text" else f"{scores.criterion} of the tower"
    if scores.heads is None or (scores.importance is not None and plan.method == "depth"):
        return plots.layer_importance_figure(f"{what} per layer", scores.layers, kept_of.removed_layers)
    by_query = scores.options.get("gqa", "groups") != "groups"
    kept = {
        layer.index: (
            set(layer.q_heads if by_query else layer.kv_heads),
            len(layer.neurons),
            kept_of.layers_before[layer.index].mlp,
        )
        for layer in kept_of.layers
    }
    _check_drawable(scores)
    return plots.width_importance_figure(f"{what} per attention head", scores.heads, kept)


def _check_drawable(scores: Scores) -> None:
    if scores.heads is not None and len(scores.heads) * max(map(len, scores.heads)) > MOST_UNITS:
        raise UserError(
            f"{scores.criterion} scores are of {len(scores.heads):,} layers with up to "
            f"{max(map(len, scores.heads)):,} heads, too many for a figure: score again"
        )


def _loss_section(workdir: Path, result: Json) -> Iterator[Json]:
    curves, titles = dict[str, list[Json]](), dict[str, str]()
    for run in result["runs"]:
        titles |= run.get("loss_terms") or {name: name for name in LossConfig().weights()}
        path = workdir / run["metrics"] if run.get("metrics") else None
        if path is not None and path.is_file() and len(curves) < MOST_DRAWN:
            curves[run["name"]] = read_metrics(path)
    figure = plots.loss_figure(curves, titles)
    if figure is not None:
        yield {"title": "Recovery training", "figures": [_figure(figure, "Mean over each logged batch; logarithmic.")]}


def _groups(result: Json) -> Iterator[Json]:
    """Values by group of questions, of the unpruned model and every run, of every set that has groups."""
    runs, sets = result["runs"], result["sets"]
    for name, groups in result["teacher"]["evaluation"]["groups"].items():
        of, rows = sets[name], []
        for group, values in groups.items():
            models = [values, *(run["evaluation"]["groups"].get(name, {}).get(group, {}) for run in runs)]
            cells = [model.get(of["main"]) for model in models]
            rows.append(
                [group, f"{values['questions']:,}", *("" if c is None else f"{of['scale'] * c:.1f}" for c in cells)]
            )
        title = f"{_upper(of['main'])} by {of['grouped_by']}"
        yield {
            "title": title if len(sets) == 1 else f"{name}: {title}",
            "header": [of["grouped_by"], "questions", "unpruned", *(run["name"] for run in runs)],
            "rows": rows,
        }


def _export_line(result: Json) -> str:
    if "export" not in result:
        return f"Nothing is exported yet: `vlmprune export` writes {result['best']}."
    export = result["export"]
    return (
        f"Exported: {export['path']} (the model {result['best']}), reloaded and compared: largest difference of any "
        f"logit {export['max_abs_logit_difference']:.2g}."
    )
