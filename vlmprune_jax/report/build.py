"""From a workdir's result.json to `report.html` and `report.png`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vlmprune_jax.errors import UserError
from vlmprune_jax.prune import PrunePlan, Scores
from vlmprune_jax.report import fit, plots

Json = dict[str, Any]
HEADER = ("model", "data", "parameters", "asked", "reached", "accuracy", "retained", "seconds")
NOTES = (
    "Data: share of the training records used for recovery. Asked, reached: share of all parameters to remove. "
    "Accuracy and retained (accuracy as a share of the unpruned model's) in percent. Seconds: scoring, pruning and "
    "training, without evaluation."
)


def table_of(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the one table: the unpruned model first, then every run."""
    teacher = result["teacher"]
    rows: list[tuple[str, ...]] = [
        ("unpruned", "", f"{teacher['parameters']:,}", "", "", f"{100 * teacher['accuracy']:.2f}", "100.00", "")
    ]
    for run in result["runs"]:
        asked, kept = run["ratio_asked"], run["retained"]
        rows.append(
            (
                run["name"],
                "" if run["recovery"] == "none" else f"{100 * run['data_fraction']:g} %",
                f"{run['parameters']:,}",
                "" if asked is None else f"{asked:.3f}",
                f"{run['ratio_reached']:.3f}",
                f"{100 * run['accuracy']:.2f}",
                "" if kept is None else f"{kept:.2f}",
                f"{run['seconds']:.1f}",
            )
        )
    return HEADER, rows


def build_report(workdir: Path) -> Path:
    """Write `report.html` (one file, nothing external) and `report.png`; returns the page's path.

    Raises:
      UserError: `result.json` is missing or damaged.
    """
    result = read_result(workdir)
    accuracy = plots.accuracy_figure(result)
    plots.write_png(accuracy, workdir / "report.png")
    header, rows = table_of(result)
    names = [None, *(run["name"] for run in result["runs"])]
    page = (
        _environment()
        .get_template("template.html")
        .render(
            title="Structural pruning report",
            lead=_lead(result),
            header=header,
            rows=[{"cells": row, "best": name == result["best"]} for row, name in zip(rows, names, strict=True)],
            notes=NOTES,
            sections=[
                {
                    "title": "Accuracy and size",
                    "figures": [_figure(accuracy, "The dashed line is the unpruned model.")],
                },
                *_importance_section(workdir, result),
                *_loss_section(workdir, result),
            ],
            answers=_answers(result),
            planned=fit.read_planned(workdir),
            planned_notes=fit.NOTES,
            export=_export_line(result),
            result_json=json.dumps(result, indent=2),
        )
    )
    out = workdir / "report.html"
    partial = workdir / ".report.html.partial"
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, out)
    return out


def read_result(workdir: Path) -> Json:
    """`result.json` of a workdir.

    Raises:
      UserError: it is missing, not JSON, or lacks its main keys.
    """
    path = workdir / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        for key in ("teacher", "runs", "best", "export"):
            result[key]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: run `vlmprune run` first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a result of `vlmprune run` ({error!r}): run it again") from None
    return dict(result)


def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("vlmprune_jax.report", ".")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)


def _lead(result: Json) -> str:
    run = next(run for run in result["runs"] if run["name"] == result["best"])
    teacher = result["teacher"]
    smaller = 1 - run["parameters"] / teacher["parameters"]
    recovery = "without recovery"
    if run["recovery"] != "none":
        recovery = f"after recovery ({run['recovery']}) on {100 * run['data_fraction']:g} % of the training data"
    among = f"Best of {len(result['runs'])} models: " if len(result["runs"]) > 1 else ""
    return (
        f"{among}{run['name']} has {run['parameters']:,} of {teacher['parameters']:,} "
        f"parameters ({100 * smaller:.1f} % fewer) and answers {100 * run['accuracy']:.2f} % of "
        f"{teacher['questions']:,} questions {recovery}; the unpruned model answers {100 * teacher['accuracy']:.2f} %."
    )


def _figure(figure: Any, caption: str) -> Json:
    return {"svg": Markup(plots.to_svg(figure)), "caption": caption}


def _importance_section(workdir: Path, result: Json) -> Iterator[Json]:
    """One figure per scores file; variants that share one are drawn once per plan."""
    figures, seen = [], set()
    for run in result["runs"]:
        if run["plan"] in seen:
            continue
        seen.add(run["plan"])
        plan = PrunePlan.from_json(workdir / run["plan"])
        for name in run["scores"]:
            scores = Scores.load(workdir / name)
            figures.append(_figure(_importance_figure(scores, plan), f"{run['method']}: {name}"))
    if figures:
        yield {"title": "Importance and what was removed", "figures": figures}


def _importance_figure(scores: Scores, plan: PrunePlan) -> Any:
    if scores.heads is None or (scores.importance is not None and plan.method == "depth"):
        assert scores.importance is not None
        return plots.layer_importance_figure(f"{scores.criterion} per layer", scores.importance, plan.removed_layers)
    by_query = scores.options.get("gqa", "groups") != "groups"
    kept = {
        layer.index: (
            set(layer.q_heads if by_query else layer.kv_heads),
            len(layer.neurons),
            plan.layers_before[layer.index].mlp,
        )
        for layer in plan.layers
    }
    return plots.width_importance_figure(f"{scores.criterion} per attention head", scores.heads, kept)


def _loss_section(workdir: Path, result: Json) -> Iterator[Json]:
    curves = {}
    for run in result["runs"]:
        path = workdir / run["metrics"] if run.get("metrics") else None
        if path is not None and path.is_file():
            curves[run["name"]] = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    figure = plots.loss_figure(curves)
    if figure is not None:
        yield {"title": "Recovery training", "figures": [_figure(figure, "Mean over each logged batch; logarithmic.")]}


def _answers(result: Json) -> Json | None:
    """Accuracy by reference answer, of the unpruned model and every run; None where they are too many for a table."""
    groups = result["teacher"].get("by_answer") or {}
    if not 0 < len(groups) <= 40:
        return None
    runs = result["runs"]
    rows = []
    for answer, group in groups.items():
        models = [group, *(run["by_answer"].get(answer) for run in runs)]
        rows.append(
            [answer, f"{group['questions']:,}", *("" if m is None else f"{100 * m['accuracy']:.1f}" for m in models)]
        )
    return {"models": ["unpruned", *(run["name"] for run in runs)], "rows": rows}


def _export_line(result: Json) -> str:
    export = result["export"]
    return (
        f"Exported: {export['path']} (the model {result['best']}), reloaded and compared: largest difference of any "
        f"logit {export['max_abs_logit_difference']:.2g}."
    )
