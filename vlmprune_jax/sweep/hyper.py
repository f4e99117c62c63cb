"""The runs of a sweep: what each overrides in one experiment, as `get_hyper` of a config file says, and its name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.core.checks import suggest
from vlmprune_jax.core.errors import UserError, differences, error_context
from vlmprune_jax.core.settings import hints_of, override
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.experiment.variants import prefer_explicit

SEED = "seed"  # the last part of the settings that are seeds
MOST_RUNS = 10_000
LONGEST_NAME, LONGEST_VALUE = 120, 40  # letters; a folder's name may have 255
ONLY = "only"  # the name of a run that differs from none

# Setting, or a label of the file's own -> value, or what that stands for.
Point = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One of several named ways to set some settings."""

    name: str
    overrides: Mapping[str, Any]


class Hyper:
    """What `get_hyper(hyper)` puts runs together with, as sweeps of ml_collections configs (big_vision, XManager) do.

    Settings are named as on the command line, with or without `config.` before them.
    """

    def sweep(self, setting: str, values: Iterable[Any]) -> list[Point]:
        """A run for each value of a setting."""
        return [{setting.removeprefix("config."): value} for value in values]

    def fixed(self, setting: str, value: Any) -> list[Point]:
        """The one run that has this value."""
        return self.sweep(setting, [value])

    def named(self, label: str, choices: Mapping[str, Mapping[str, Any]]) -> list[Point]:
        """A run for each of several ways to set some settings, which names of runs tell as `label=CHOICE`."""
        return [{label: Choice(str(name), _bare(overrides))} for name, overrides in choices.items()]

    def product(self, sweeps: Sequence[Sequence[Mapping[str, Any]]]) -> list[Point]:
        """Every run of one with every run of the others; the last varies fastest."""
        points: list[Point] = [{}]
        for runs in sweeps:
            points = [_joined(point, run) for point in points for run in runs]
        return points

    def zipit(self, sweeps: Sequence[Sequence[Mapping[str, Any]]]) -> list[Point]:
        """The first runs together, the second ones, and so on.

        Raises:
          UserError: they are not of one length.
        """
        lengths = [len(runs) for runs in sweeps]
        if len(set(lengths)) > 1:
            raise UserError(f"hyper.zipit: sweeps of {', '.join(map(str, lengths))} values: give all as many")
        return [self.product([[run] for run in runs])[0] for runs in zip(*sweeps, strict=True)]

    def chainit(self, sweeps: Sequence[Sequence[Mapping[str, Any]]]) -> list[Point]:
        """All runs of one after all runs of another."""
        return [_bare(run) for runs in sweeps for run in runs]


def _bare(overrides: Mapping[str, Any]) -> Point:
    return {str(setting).removeprefix("config."): value for setting, value in overrides.items()}


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> Point:
    twice = [name for name in _flat(first) if name in _flat(second)] or [name for name in first if name in second]
    if twice:
        raise UserError(f"hyper.product: {twice[0]} is in two of its sweeps: leave it in one")
    return {**first, **_bare(second)}


def _flat(point: Mapping[str, Any]) -> Point:
    """Setting -> value, also of what labels stand for."""
    found: Point = {}
    for name, value in _bare(point).items():
        found |= value.overrides if isinstance(value, Choice) else {name: value}
    return found


@dataclass(frozen=True)
class SweepRun:
    """One run: its name, that of those which differ in seeds only, what names are made of, and its experiment."""

    name: str
    group: str
    labels: Mapping[str, str]
    overrides: Mapping[str, Any]
    experiment: Experiment

    @property
    def seed(self) -> int | None:
        """The run's seed, if it has one in all that it overrides."""
        seeds = {value for setting, value in self.overrides.items() if _is_seed(setting)}
        return seeds.pop() if len(seeds) == 1 else None


def sweep_runs(base: Experiment, points: Any) -> list[SweepRun]:
    """The runs that a list of overrides asks for, in its order.

    Raises:
      UserError: it is none, or empty; a setting that does not exist or has no such value; or two runs with one name.
    """
    if not isinstance(points, list | tuple) or not all(isinstance(point, Mapping) for point in points):
        raise UserError("get_hyper(hyper) must return a list of overrides: hyper.product([...]), or [{setting: value}]")
    if not 0 < len(points) <= MOST_RUNS:
        raise UserError(f"get_hyper(hyper) lists {len(points):,} runs: between 1 and {MOST_RUNS:,} can be run")
    points = [_bare(point) for point in points]
    labels = [_labels_of(point, short) for short in [_short_names(points)] for point in points]
    runs = []
    for point, found in zip(points, labels, strict=True):
        overrides = _flat(point)
        name, group = (_name(part) for part in (found, {k: v for k, v in found.items() if not _is_seed(k)}))
        with error_context(f"run {name}"):
            experiment = prefer_explicit(override(base, _nested(base, overrides)), overrides, "config.")
        runs.append(SweepRun(name, group, found, overrides, experiment))
    _check_names(runs)
    return runs


def _nested(base: Experiment, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`a.b.c` -> value as mappings in mappings; what is set in a mapping of the experiment's leaves the rest of it."""
    nested: dict[str, Any] = {}
    for setting, value in overrides.items():
        at, spec, (*parts, last) = nested, base, setting.split(".")
        for number, part in enumerate(parts):
            where = ".".join(["config", *parts[:number]])
            known = spec if isinstance(spec, Mapping) else hints_of(spec)
            if part not in known:
                raise UserError(f"{where} has no {part!r}{suggest(part, known)}")
            spec = spec[part] if isinstance(spec, Mapping) else getattr(spec, part)
            if not (isinstance(spec, Mapping) or hasattr(spec, "__dataclass_fields__")):
                raise UserError(f"config.{setting}: {where}.{part} is a value, not a section")
            at = at.setdefault(part, dict(spec) if isinstance(spec, Mapping) else {})
            if not isinstance(at, dict):
                raise UserError(f"config.{setting}: sweep config.{'.'.join(parts)} as a whole")
        at[last] = value
    return nested


def _short_names(points: Sequence[Point]) -> dict[str, str]:
    """What differs between runs -> its name in theirs: as few of its last words as tell it apart.

    Several that always have the same value, as seeds, share one.
    """
    names = dict.fromkeys(name for point in points for name in point)
    varied = [name for name in names if any(_text(point.get(name)) != _text(points[0].get(name)) for point in points)]
    words = dict.fromkeys(varied, 1)
    while True:
        short = {name: ".".join(name.split(".")[-count:]) for name, count in words.items()}
        mixed = {
            name
            for point in points
            for name in words
            for other in words
            if short[name] == short[other] and {name, other} <= point.keys() and point[name] != point[other]
        }
        longer = [name for name in mixed if words[name] <= name.count(".")]
        if not longer:
            return short
        words |= {name: words[name] + 1 for name in longer}


def _labels_of(point: Point, short: Mapping[str, str]) -> dict[str, str]:
    """Label -> text of the value, seeds last."""
    found = {short[name]: _text(value) for name, value in point.items() if name in short}
    return dict(sorted(found.items(), key=lambda item: _is_seed(item[0])))


def _is_seed(name: str) -> bool:
    return name.rpartition(".")[2] == SEED


def _text(value: Any) -> str:
    """A value in a name: letters, digits and `_ . + -`."""
    if isinstance(value, Choice):
        value = value.name
    if isinstance(value, Mapping):
        value = "-".join(f"{name}-{_text(inner)}" for name, inner in value.items())
    elif isinstance(value, list | tuple):
        value = "-".join(map(_text, value))
    elif isinstance(value, float):
        value = f"{value:g}"
    text = re.sub(r"[^A-Za-z0-9_.+-]+", "-", str(value)).strip("-.")
    return _cut(text or _hash(str(value)), str(value), LONGEST_VALUE)


def _cut(text: str, whole: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest - 9]}-{_hash(whole)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:8]


def _name(labels: Mapping[str, str]) -> str:
    name = ",".join(f"{re.sub(r'[^A-Za-z0-9_.+-]+', '-', label)}={value}" for label, value in labels.items())
    return _cut(name, name, LONGEST_NAME) or ONLY


def _check_names(runs: Sequence[SweepRun]) -> None:
    """Refuse two runs that would have one folder, also on disks that do not tell capitals apart."""
    known: dict[str, SweepRun] = {}
    for run in runs:
        other = known.setdefault(run.name.casefold(), run)
        if other is run:
            continue
        changes = list(_changes(other, run))
        if not changes:
            raise UserError(f"get_hyper(hyper) lists {run.name} twice: leave one of them out")
        raise UserError(
            f"two runs would be called {run.name} ({'; '.join(changes[:2])}): tell them apart with "
            "hyper.named(LABEL, {NAME: {setting: value}})"
        )


def _changes(first: SweepRun, second: SweepRun) -> Iterator[str]:
    for setting in dict.fromkeys((*first.overrides, *second.overrides)):
        ours, theirs = (repr(run.overrides.get(setting)) for run in (first, second))
        yield from differences(ours, theirs, setting)
