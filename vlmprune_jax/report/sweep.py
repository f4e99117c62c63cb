"""`sweep.json`: what the runs of a sweep found, of `make_sweep`, read by `read_sweep`; this page is its schema.

Version 1 (paths are relative to the sweep's workdir):

    version    1
    config     the config file as it was given, with its variant
    sets       {set: what was measured there}, as in `result.json` (report/result.py); the same of all runs
    unpruned   {model: parameters, bytes, forward_flops, evaluation (scores, groups)}: the models that were pruned, by
               the folder that the config names. Usually one
    models     one object per evaluated model, in the order of the runs; and one for each run that has none yet

Of every object in `models`:

    name       unique: the run's name, for a model that is not its last one "RUN/pruned" or "RUN/reconstructed"
    run        the run, whose folder is runs/RUN
    group      the name without the run's seeds: what is equal here differs in seeds only
    labels     {label: value} that the run's name is made of: {"method": "depth", "decoder": "15", "recovery": "sft_l2"}
    overrides  {setting: value} of the run, as {"prune.method": "depth"}
    seed       the run's seed where it overrides any, and all are the same, else null
    status     "done"; "failed": it stopped with an error; "pending": it did not run yet, or runs elsewhere
    error      one line of a run that failed, else null

Of those that are done also:

    model            the folder of the model that was pruned, a key of `unpruned`
    method           "depth", "width" or "hybrid"
    criterion        what the plan was made by
    ratio_asked      share of all parameters to remove (null: layers or a budget were asked for); ratio_reached
    decoder_ratio    share of the decoder's parameters that went
    parameters       of this model
    bytes            of its weights, exported
    forward_flops    of a prompt of `speed.prompt_tokens` tokens, with an image where the model sees any
    reconstruct      "none" or "least_squares": whether weights of this model were solved for, before any training
    recovery         "none" where nothing was trained, or the name of the recovery (`recover.name`)
    data_fraction    share of the training records that were trained on, 0.0 where nothing was trained
    seconds          of scoring, pruning, reconstruction and training, by whichever run of the sweep did it
    evaluation_seconds
    evaluation       scores, retained, retained_interval, mean_of_ratios, paper_average, groups: as in `result.json`
    training_records, training_steps   where something was trained
    prefill_tokens_per_second, decode_tokens_per_second   where they were measured; of runs at other times and loads
    prefill_speedup, decode_speedup   the same as a multiple of the unpruned model's, measured in turns with it
    digest           of the folder's content: equal of equal models
    path             the folder

A model that several runs have in common before their last step is listed once, under the first of them. `sweep.csv` is
the same, flat: a line per object, `SET.score`, `SET.retained`, `SET.low` and `SET.high` of every set.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec

from vlmprune_jax.core.errors import UserError, printable
from vlmprune_jax.core.files import Count, Finite, checked, read_json
from vlmprune_jax.evaluation.statistics import interval_of_mean
from vlmprune_jax.report.result import Evaluation, RunEvaluation, Set, main_value, shown

Json = dict[str, Any]
VERSION = 1
FILE = "sweep.json"
MOST_SETS = 4  # with columns of their own in a terminal
MAX_BYTES = 2**28  # ten thousand models with groups
DONE, FAILED, PENDING = "done", "failed", "pending"
SPEEDS = ("prefill", "decode")
_TODO = "run `vlmprune sweep` again, or restore it"


class Unpruned(TypedDict):
    """What is known of a model that was pruned."""

    parameters: Count
    bytes: Count
    forward_flops: Finite
    evaluation: Evaluation


class Found(TypedDict):
    """What is known of a model that was evaluated."""

    model: str
    method: str
    criterion: str
    ratio_asked: Finite | None
    ratio_reached: Finite
    decoder_ratio: Finite
    parameters: Count
    bytes: Count
    forward_flops: Finite
    reconstruct: str
    recovery: str
    data_fraction: Finite
    seconds: Finite
    evaluation_seconds: Finite
    evaluation: RunEvaluation
    training_records: NotRequired[Count]
    training_steps: NotRequired[Count]
    prefill_tokens_per_second: NotRequired[Finite]
    decode_tokens_per_second: NotRequired[Finite]
    prefill_speedup: NotRequired[Finite]
    decode_speedup: NotRequired[Finite]
    digest: str
    path: str


class _Entry(TypedDict):
    """One of `models`; `Found` as well where it is done."""

    name: str
    run: str
    group: str
    labels: dict[str, str]
    overrides: dict[str, Any]
    seed: int | None
    status: Literal["done", "failed", "pending"]
    error: str | None


class _Sweep(TypedDict):
    config: str
    sets: dict[str, Set]
    unpruned: dict[str, Unpruned]
    models: Annotated[list[_Entry], msgspec.Meta(min_length=1, max_length=100_000)]


class _Version(TypedDict):
    version: int


def make_sweep(config: str, sets: Json, unpruned: Json, models: Sequence[Json]) -> Json:
    """The whole object."""
    return {"version": VERSION, "config": config, "sets": sets, "unpruned": unpruned, "models": list(models)}


def read_sweep(workdir: Path) -> Json:
    """`sweep.json` of a workdir.

    Raises:
      UserError: it is missing, damaged, or of a later version; or a model lacks what it is compared by.
    """
    path = workdir / FILE
    missing = "no such file: run `vlmprune sweep` first"
    sweep = read_json(path, _Version, missing=missing, todo=_TODO, most=MAX_BYTES, unicode=False)
    if sweep["version"] != VERSION:
        raise UserError(f"{path}: is of version {sweep['version']}, this is {VERSION}: update vlmprune-jax")
    checked(sweep, _Sweep, str(path), _TODO)
    for one in done(sweep):
        checked(one, Found, f"{path}: {one['name']}", _TODO)
        missing_sets = [name for name, of in sweep["sets"].items() if main_value(one, name, sweep["sets"]) is None]
        if one["model"] not in sweep["unpruned"] or missing_sets:
            lacks = missing_sets[0] if missing_sets else one["model"]
            raise UserError(f"{path}: {one['name']}: nothing is known of {lacks!r}: {_TODO}")
    return sweep


def done(sweep: Json) -> list[Json]:
    """The models that were evaluated."""
    return [one for one in sweep["models"] if one["status"] == DONE]


@dataclass(frozen=True)
class Group:
    """Models that differ in seeds only; `retained`: the mean of what they retain in %, and its 95 % interval."""

    name: str
    labels: Mapping[str, str]
    models: Sequence[Json]
    retained: tuple[float, float, float] | None

    @property
    def first(self) -> Json:
        """One of them, for what they have in common."""
        return self.models[0]

    def mean(self, field: str) -> float:
        """Of a number that each has."""
        return sum(one[field] for one in self.models) / len(self.models)


def groups_of(sweep: Json) -> list[Group]:
    """The models that were evaluated, those together that differ in seeds only."""
    found: dict[str, list[Json]] = {}
    for one in done(sweep):
        found.setdefault(one["group"], []).append(one)
    return [_group(name, models) for name, models in found.items()]


def _group(name: str, models: Sequence[Json]) -> Group:
    labels = {label: value for label, value in models[0]["labels"].items() if label.rpartition(".")[2] != "seed"}
    kept = [one["evaluation"]["mean_of_ratios"] for one in models]
    return Group(name, labels, models, None if None in kept else interval_of_mean(kept))


def table_of(sweep: Json) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows) for a terminal: a row for what differs in more than seeds, the unpruned models first."""
    groups, sets = groups_of(sweep), sweep["sets"]
    seeds = max((len(group.models) for group in groups), default=1)
    counted = ("seeds",) if seeds > 1 else ()
    labels = tuple(dict.fromkeys(label for group in groups for label in group.labels)) or ("model",)
    named = tuple(sets) if len(sets) <= MOST_SETS else ()
    header = (*labels, "parameters", "reached", *named, "retained", *counted)
    rows = []
    for name, model in sweep["unpruned"].items():
        label = "unpruned" if len(sweep["unpruned"]) == 1 else Path(name).name
        values = (shown(main_value(model, key, sets), sets[key], unit=False) for key in named)
        blank = ("" for _ in labels[1:])
        rows.append((label, *blank, f"{model['parameters']:,}", "", *values, "100.00", *("" for _ in counted)))
    for group in groups:
        own = [group.labels.get(label, "") for label in labels] if group.labels else [group.name]
        if "/" in group.name:  # not the last model of its run
            own[0] = f"{own[0]} ({group.name.partition('/')[2]})"
        values = (_mean_value(group, key, sets) for key in named)
        row = (f"{group.mean('parameters'):,.0f}", f"{group.mean('ratio_reached'):.3f}", *values, _worth(group))
        rows.append((*map(printable, own), *row, *(str(len(group.models)) for _ in counted)))
    return header, rows


def _mean_value(group: Group, key: str, sets: Json) -> str:
    values = [value for one in group.models if (value := main_value(one, key, sets)) is not None]
    return shown(sum(values) / len(values), sets[key], unit=False) if values else ""


def _worth(group: Group) -> str:
    if group.retained is None:
        return ""
    mean, low, high = group.retained
    return f"{mean:.2f}" + (f" ±{(high - low) / 2:.2f}" if len(group.models) > 1 else "")


def as_csv(sweep: Json) -> str:
    """`sweep.csv`: a line for every object of `models`."""
    labels = list(dict.fromkeys(label for one in sweep["models"] for label in one["labels"]))
    plain = [name for name in (*_Entry.__annotations__, *Found.__annotations__) if name not in _NESTED]
    parts = [f"{name}.{part}" for name in sweep["sets"] for part in ("score", "retained", "low", "high")]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*plain, *(f"label.{label}" for label in labels), "retained", "paper_average", *parts])
    for one in sweep["models"]:
        row = [*(one.get(name) for name in plain), *(one["labels"].get(label) for label in labels)]
        lines.writerow(["" if value is None else value for value in (*row, *_measured(one, sweep["sets"]))])
    return text.getvalue()


_NESTED = ("labels", "overrides", "evaluation")


def _measured(one: Json, sets: Json) -> Iterator[Any]:
    found = one.get("evaluation", {})
    yield from (found.get("mean_of_ratios"), found.get("paper_average"))
    for name in sets:
        low, high = (found.get("retained_interval") or {}).get(name) or (None, None)
        value = main_value(one, name, sets) if found else None
        yield from (value, found.get("retained", {}).get(name), low, high)
