"""The list of runs of a sweep: names and overrides, from `get_hyper` of a config file, and which of them to run."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.base.errors import UserError, differences, error_context
from vlmprune_jax.base.processes import process_count
from vlmprune_jax.base.settings import nested, override
from vlmprune_jax.run.experiment.arguments import evaluation_sets
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.experiment.variants import check_experiment, prefer_explicit

SEED = "seed"  # last part of the names of seed settings
MOST_RUNS = 10_000
LONGEST_NAME, LONGEST_VALUE = 120, 40  # characters; a folder name may have 255
ONLY = "only"  # name of a single run without overrides

# Setting (or label of the config file) -> value (or `Choice`).
Point = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """Named group of settings that a sweep run overrides together."""

    name: str
    overrides: Mapping[str, Any]


class Hyper:
    """Functions with which `get_hyper(hyper)` combines sweep runs (as in big_vision and XManager).

    Settings have the same names as on the command line, with or without the prefix `config.`.
    """

    def sweep(self, setting: str, values: Iterable[Any]) -> list[Point]:
        """Return one sweep run per value of a setting."""
        return [{setting.removeprefix("config."): value} for value in values]

    def fixed(self, setting: str, value: Any) -> list[Point]:
        """Return a single sweep run that sets one value."""
        return self.sweep(setting, [value])

    def named(self, label: str, choices: Mapping[str, Mapping[str, Any]]) -> list[Point]:
        """Return one sweep run per named group of settings; run names contain `label=NAME`."""
        return [{label: Choice(str(name), _bare(overrides))} for name, overrides in choices.items()]

    def product(self, sweeps: Sequence[Sequence[Mapping[str, Any]]]) -> list[Point]:
        """Combine every run of each list with every run of the others; the last list varies fastest."""
        points: list[Point] = [{}]
        for runs in sweeps:
            points = [_joined(point, run) for point in points for run in runs]
        return points

    def zipit(self, sweeps: Sequence[Sequence[Mapping[str, Any]]]) -> list[Point]:
        """Combine the lists of runs elementwise: first with first, second with second.

        Raises UserError if the sweeps have different lengths.
        """
        lengths = [len(runs) for runs in sweeps]
        if len(set(lengths)) > 1:
            raise UserError(
                f"hyper.zipit: the sweeps have {', '.join(map(str, lengths))} values: give all sweeps the same number "
                "of values"
            )
        return [self.product([[run] for run in runs])[0] for runs in zip(*sweeps, strict=True)]

    def chainit(self, sweeps: Sequence[Sequence[Mapping[str, Any]]]) -> list[Point]:
        """Concatenate several lists of sweep runs into one list."""
        return [_bare(run) for runs in sweeps for run in runs]


def _bare(overrides: Mapping[str, Any]) -> Point:
    return {str(setting).removeprefix("config."): value for setting, value in overrides.items()}


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> Point:
    twice = [name for name in _flat(first) if name in _flat(second)] or [name for name in first if name in second]
    if twice:
        raise UserError(f"hyper.product: two of the sweeps set {twice[0]}: remove it from one of them")
    return {**first, **_bare(second)}


def _flat(point: Mapping[str, Any]) -> Point:
    """Return a run's overrides as {setting: value}, with groups expanded."""
    settings: Point = {}
    for name, value in _bare(point).items():
        settings |= value.overrides if isinstance(value, Choice) else {name: value}
    return settings


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: settings, and `group`, its name without seeds."""

    name: str
    group: str
    labels: Mapping[str, str]
    overrides: Mapping[str, Any]
    experiment: Experiment

    @property
    def seed(self) -> int | None:
        """Seed of the run; None if the run sets no seed, or several different seeds."""
        seeds = {value for setting, value in self.overrides.items() if _is_seed(setting)}
        return seeds.pop() if len(seeds) == 1 else None


def sweep_runs(base: Experiment, points: Any) -> list[SweepRun]:
    """Convert overrides from a config file to sweep runs, in the same order.

    Raises UserError if `points` is empty or not a list of overrides, a setting or value does not exist, or names
    repeat.
    """
    if not isinstance(points, list | tuple) or not all(isinstance(point, Mapping) for point in points):
        raise UserError(
            "get_hyper(hyper): must return a list of overrides, such as hyper.product([...]) or [{setting: value}]"
        )
    if not 0 < len(points) <= MOST_RUNS:
        raise UserError(f"get_hyper(hyper): lists {len(points):,} runs, expected 1 to {MOST_RUNS:,}: change the list")
    points = [_bare(point) for point in points]
    short, runs = _short_names(points), dict[str, SweepRun]()  # by folder, also where disks ignore case
    for point in points:
        labels = {short[name]: _text(value) for name, value in point.items() if name in short}
        run_labels = dict(sorted(labels.items(), key=lambda item: _is_seed(item[0])))  # seeds last
        overrides = _flat(point)
        name = _name(run_labels)
        group = _name({label: value for label, value in run_labels.items() if not _is_seed(label)})
        with error_context(f"run {name}"):
            experiment = prefer_explicit(override(base, nested(base, overrides)), overrides, "config.")
        run = SweepRun(name, group, run_labels, overrides, experiment)
        if (other := runs.setdefault(name.casefold(), run)) is run:
            continue
        before, now = ({name: repr(value) for name, value in each.overrides.items()} for each in (other, run))
        if not (changes := differences(before, now)):
            raise UserError(f"get_hyper(hyper): lists {name} twice: remove one of them")
        raise UserError(
            f"get_hyper(hyper): two runs have the name {name} ({'; '.join(changes[:2])}): name them with "
            "hyper.named(LABEL, {NAME: {setting: value}})"
        )
    return list(runs.values())


def check_runs(runs: Sequence[SweepRun], jobs: int) -> None:
    """Check the settings of all sweep runs before the first one starts.

    Raises UserError if `check_experiment` refuses a run, runs have different evaluation sets, or `jobs` is not
    possible.
    """
    if jobs < 1 or (jobs > 1 and process_count() > 1):
        raise UserError(f"--jobs={jobs}: must be at least 1, and exactly 1 if several processes share each run")
    for run in runs:
        with error_context(f"run {run.name}"):
            check_experiment(run.experiment)
        sets, first = (evaluation_sets(each.experiment.data, each.experiment.evaluate) for each in (run, runs[0]))
        if sets != first:
            raise UserError(
                f"run {run.name}: its evaluation sets differ from those of {runs[0].name}: use the same sets in all "
                "runs"
            )


def shard_of(runs: Sequence[SweepRun], shard: str) -> list[SweepRun]:
    """Return shard `i/n` of the runs: every n-th run, starting with the i-th.

    Raises UserError unless `shard` has the form i/n with 1 <= i <= n.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--shard={shard}: must be i/n with i from 1 to n, such as 2/8")
    return list(runs)[number - 1 :: count]


def runs_named(runs: Sequence[SweepRun], pattern: str) -> list[SweepRun]:
    """Return the runs whose names match a pattern with * and ?; "" matches all.

    Raises UserError if no run matches.
    """
    matches = [run for run in runs if not pattern or fnmatch.fnmatchcase(run.name, pattern)]
    if not matches:
        raise UserError(f"--only={pattern}: no run matches (the first is {runs[0].name}): see --dry_run for all names")
    return matches


def _short_names(points: Sequence[Point]) -> dict[str, str]:
    """Return {setting: short unique name} for the settings that differ between runs.

    Settings that always have equal values, such as seeds, share a name.
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


def _is_seed(name: str) -> bool:
    return name.rpartition(".")[2] == SEED


def _text(value: Any) -> str:
    """Return a setting's value as text for a run's name (letters, digits and `_ . + -` only)."""
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
