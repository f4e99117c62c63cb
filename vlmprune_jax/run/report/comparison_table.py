"""Table of a sweep's models: retention, size, speed and scores, a row for each group of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vlmprune_jax.base.errors import printable
from vlmprune_jax.run.evaluation.speed.ratio import SpeedUp
from vlmprune_jax.run.report.comparison_plots import Cost, titles_of
from vlmprune_jax.run.report.page import Table
from vlmprune_jax.run.report.tables import IN_BRACKETS, OF_CONTROL
from vlmprune_jax.run.workdir.comparison import show_interval
from vlmprune_jax.run.workdir.sweep import Group, SweepResult, SweptModel, UnprunedModel, unpruned_key

MOST_SETS = 12
DECODE = "decode_speedup"
PARAMETERS = Cost("Parameters", "parameters (millions)", lambda model: model.parameters / 1e6)
COSTS = (
    PARAMETERS,
    Cost("Bytes of the weights", "MiB", lambda model: model.bytes / 2**20),
    Cost("FLOPs of a prompt", "GFLOPs", lambda model: model.forward_flops / 1e9),
)


def _speedup(title: str, part: str) -> Cost:
    label = "times the unpruned model's tokens/s"

    def ends(model: SweptModel) -> tuple[float, float]:
        return getattr(model, part).low, getattr(model, part).high

    return Cost(title, label, lambda model: getattr(model, part).ratio, True, ends)


SPEEDUPS = {part: _speedup(title, part) for part, title in (("prefill_speedup", "Prefill"), (DECODE, "Decoding"))}


def models_table(sweep: SweepResult, groups: Sequence[Group], verdicts: Mapping[str, str]) -> Table:
    sets = sweep.sets
    names, titles = list(sets)[:MOST_SETS], titles_of(groups)
    unpruned = sorted(sweep.unpruned.items(), key=lambda item: -(item[1].image_tokens or 0))
    rows = [_unpruned_row(key, model, sweep, names) for key, model in unpruned]
    if any(speedup_of(group, DECODE) for group in groups):
        rows = [{**row, "decoding, x": "1.00"} for row in rows]
    for group in groups:
        averages = [value for model in group.models if (value := model.evaluation.paper_average) is not None]
        before = sweep.unpruned[group.first.unpruned].parameters
        rows.append(
            {
                "model": titles[group.name],
                "retained, %": _retained(group),
                OF_CONTROL: "" if group.of_control is None else f"{group.of_control[0]:.2f}",
                "size, %": f"{100 * group.mean('parameters') / before:.1f}",
                "decoding, x": "" if (speed := speedup_of(group, DECODE)) is None else speed.show(interval=False),
                "against the best": verdicts.get(group.name, ""),
                "seeds": f"{len(group.models)}",
                "paper avg, %": f"{sum(averages) / len(averages):.2f}" if len(averages) == len(group.models) else "",
                "removed, % (of decoder)": f"{100 * group.mean('actual_ratio'):.1f} "
                f"({100 * group.mean('decoder_ratio'):.1f})",
                "data, %": f"{100 * group.first.data_fraction:g}" if group.first.data_fraction else "",
                **_costs(group.models),
                **{f"{name}: {sets[name].label}": group.show_mean(name, sets) for name in names},
                "seconds": f"{group.mean('seconds'):.1f}",
                "run": printable(group.name),
            }
        )
    header = [name for name in rows[-1] if any(row.get(name) for row in rows)]
    lower = tuple(f"{name}: {sets[name].label}" for name in names if not sets[name].higher_is_better)
    smallest = ("size, %", "parameters", "MiB", "GFLOPs", "seconds", *lower)
    first = len({"model", "retained, %", OF_CONTROL, "size, %", "decoding, x"} & {*header})
    cells = tuple(tuple(row.get(name, "") for name in header) for row in rows)
    title = f"{len(groups)} models, means over seeds{IN_BRACKETS if any(map(interval_of, groups)) else ''}"
    return Table(title, tuple(header), cells, first=first, ascending=smallest)


def _retained(group: Group) -> str:
    """Return a group's mean retention as text, with its interval."""
    ends = interval_of(group)
    return "" if group.retained is None else f"{group.retained[0]:.2f}" + (ends and f" ({ends})")


def unpruned_names(sweep: SweepResult) -> dict[str, str]:
    """Return {key in `sweep.unpruned`: name of the model in tables}, with its folder if there are several models."""
    models = {key: key.removesuffix(unpruned_key("", model.image_tokens)) for key, model in sweep.unpruned.items()}
    several = len({*models.values()}) > 1
    return {key: f"unpruned {printable(model)}" if several else "unpruned" for key, model in models.items()}


def _unpruned_row(key: str, model: UnprunedModel, sweep: SweepResult, names: Sequence[str]) -> dict[str, str]:
    sets, label = sweep.sets, unpruned_names(sweep)[key]
    label += f", {model.image_tokens} image tokens" if model.image_tokens else ""
    scores = {
        f"{name}: {sets[name].label}": sets[name].show(model.evaluation.main(name, sets), unit=False) for name in names
    }
    whole = {"retained, %": "100.00", "size, %": "100.0", "paper avg, %": "100.00"}
    return {"model": label, **whole, **_costs([model]), **scores}


def _costs(models: Sequence[SweptModel | UnprunedModel]) -> dict[str, str]:
    parameters, mib, flops = (sum(map(cost.value_of, models)) / len(models) for cost in COSTS)
    return {"parameters": f"{1e6 * parameters:,.0f}", "MiB": f"{mib:,.2f}", "GFLOPs": f"{flops:,.3f}"}


def retention_of(group: Group) -> float:
    return -math.inf if group.retained is None else group.retained[0]


def interval_of(group: Group) -> str:
    """Return a group's 95 % interval as text, such as "95.1 to 97.3"; "" if it is unknown."""
    _, low, high = group.retained or (0.0, 0.0, 0.0)
    return show_interval(low, high) if low < high else ""


def speedup_of(group: Group, part: str) -> SpeedUp | None:
    """Return a group's mean speed-up over seeds; if a seed's is not measurable, that seed's; None if unknown."""
    speedups: list[SpeedUp | None] = [getattr(model, part) for model in group.models]
    unclear = next((speedup for speedup in speedups if speedup is None or not speedup.measurable), speedups[0])
    if unclear is None or not unclear.measurable:
        return unclear
    return SpeedUp(*SPEEDUPS[part].of_group(group), spread=0.0)
