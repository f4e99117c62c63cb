"""Tables of all models and evaluation sets, for the terminal and the page, and sentences about the best."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlmprune_jax.core.errors import printable
from vlmprune_jax.report.page import Table
from vlmprune_jax.report.result import averaged_sets, main_value, shown

Json = dict[str, Any]


def tables_of(result: Json) -> list[Table]:
    """The summary of all models; of several evaluation sets also the scores, and what was retained of each."""
    sets, models = result["sets"], [{"name": "unpruned", **result["teacher"]}, *result["runs"]]
    told = len(sets) == 1 and _has_intervals(models)
    rows = [_summary(model, sets, told) for model in models]
    columns = (*_columns(sets), *(("95 % interval",) if told else ()))
    summary = Table(
        f"{_columns_title(sets)}; asked, reached: shares of all parameters",
        ("model", "data", "parameters", "asked", "reached", *columns, "seconds"),
        tuple(rows),
    )
    if len(sets) == 1:
        return [summary]
    header, intervals = ("model", *sets), _has_intervals(models)
    scores = [
        (printable(m["name"]), *(shown(main_value(m, name, sets), of, unit=False) for name, of in sets.items()))
        for m in models
    ]
    kept = [(printable(m["name"]), *(_kept(m["evaluation"], name) for name in sets)) for m in models[1:]]
    return [
        summary,
        Table(", ".join(f"{name}: {_label(of)}" for name, of in sets.items()), header, tuple(scores)),
        Table(f"Retained of each, in %{', and 95 % intervals' if intervals else ''}", header, tuple(kept)),
    ]


def _columns(sets: Json) -> tuple[str, str]:
    """The two columns that say how good a model is."""
    return (next(iter(sets.values()))["main"], "retained") if len(sets) == 1 else ("retained", "paper avg")


def _columns_title(sets: Json) -> str:
    if len(sets) == 1:
        return f"{upper(_label(next(iter(sets.values()))))}, retained in %"
    return f"Retained {over(sets)}, and the paper's average, in %"


def _has_intervals(models: list[Json]) -> bool:
    return any(model["evaluation"].get("retained_interval") for model in models)


def _kept(evaluation: Json, name: str) -> str:
    """What was retained of a set, and its interval in brackets."""
    interval = interval_of(evaluation, name)
    return _percent(evaluation["retained"].get(name)) + (interval and f" ({interval})")


def interval_of(evaluation: Json, name: str) -> str:
    """ "95.1 to 97.3": what a run retained of a set, as other questions of the kind would have it; "" if unknown."""
    interval = evaluation.get("retained_interval", {}).get(name)
    return "" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"


def _summary(model: Json, sets: Json, interval: bool) -> tuple[str, ...]:
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
        seconds = "" if model["seconds"] is None else f"{model['seconds']:.1f}"
    worth = tuple(map(_percent, averages))
    if len(sets) == 1:
        name, of = next(iter(sets.items()))
        worth = (shown(main_value(model, name, sets), of, unit=False), worth[0])
        worth += (interval_of(model["evaluation"], name),) if interval else ()
    return printable(model["name"]), *what, *worth, seconds


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _label(described: Json) -> str:
    """ "accuracy in %": the main value of a set and its unit."""
    return described["main"] + (f" in {described['unit']}" if described["unit"] else "")


def upper(text: str) -> str:
    """With a capital."""
    return text[:1].upper() + text[1:]


def lead(result: Json) -> str:
    """The best model in a sentence."""
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
        return f"retains {share} {over(sets)}"
    name, of = next(iter(sets.items()))
    return f"reaches {_reached(run, name, sets)} {of['main']} on {count(of)}"


def over(sets: Json) -> str:
    """What an average is over."""
    averaged = averaged_sets(sets)
    return f"on {averaged[0]}" if len(averaged) == 1 else f"on average over {len(averaged)} evaluation sets"


def _unpruned(result: Json) -> str:
    sets = result["sets"]
    return (
        "" if len(sets) > 1 else f"; the unpruned model reaches {_reached(result['teacher'], next(iter(sets)), sets)}"
    )


def _reached(model: Json, name: str, sets: Json) -> str:
    return shown(main_value(model, name, sets), sets[name])


def count(described: Json) -> str:
    """ "9,673 questions"."""
    counted = "questions" if "questions" in described else "tokens"
    return f"{described[counted]:,} {counted}"


def groups_of(result: Json) -> Iterator[Table]:
    """Values by group of questions, of the unpruned model and every run, of every set that has groups."""
    runs, sets = result["runs"], result["sets"]
    for name, groups in result["teacher"]["evaluation"]["groups"].items():
        of, rows = sets[name], []
        for group, values in groups.items():
            models = [values, *(run["evaluation"]["groups"].get(name, {}).get(group, {}) for run in runs)]
            cells = [model.get(of["main"]) for model in models]
            shares = ("" if c is None else f"{of['scale'] * c:.1f}" for c in cells)
            rows.append((group, f"{values['questions']:,}", *shares))
        title = f"{upper(of['main'])} by {of['grouped_by']}"
        header = (of["grouped_by"], "questions", "unpruned", *(run["name"] for run in runs))
        yield Table(title if len(sets) == 1 else f"{name}: {title}", header, tuple(rows))


def benchmark_rows(run: Json, teacher: Json, sets: Json) -> list[tuple[str, str, str, str, str]]:
    """For a model card, of every evaluation set: what was asked, unpruned score, a run's, retained in %, interval.

    Behind them the speeds, where the run measured any.
    """
    rows = [
        (
            f"{name} ({of['name']}): {_label(of)}, {count(of)}",
            shown(main_value(teacher, name, sets), of, unit=False),
            shown(main_value(run, name, sets), of, unit=False),
            _percent(run["evaluation"]["retained"].get(name)),
            interval_of(run["evaluation"], name),
        )
        for name, of in sets.items()
    ]
    if "speed" in run and "speed" in teacher:
        for name, what in (("prefill", "prompt"), ("decode", "generated")):
            before, after = teacher["speed"][name], run["speed"][name]
            label = f"{what} tokens per second, our forward on the machine of the run"
            rows.append((label, f"{before:,.0f}", f"{after:,.0f}", _percent(100 * after / before), ""))
    return rows
