"""Models of a run or a sweep, in groups over seeds, as tables, figures and pages show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from vlmprune_jax.base.errors import printable
from vlmprune_jax.run.evaluation.statistics import interval_of_mean
from vlmprune_jax.run.workdir.comparison import average_interval
from vlmprune_jax.run.workdir.evaluation import UNPRUNED
from vlmprune_jax.run.workdir.result import (
    Model,
    ModelEvaluation,
    Result,
    Run,
    Sets,
    unique_titles,
    unpruned_key,
)
from vlmprune_jax.run.workdir.sweep import SweepResult

Retention = tuple[float, float, float]  # mean in %, and both ends of its 95 % interval (equal to it if unknown)


@dataclass(frozen=True)
class ModelGroup:
    """Models that differ only in seeds, with a readable title and their mean retention over seeds and questions.

    `labels`: parts of the name of a sweep's runs, without seeds. `retained` is relative to the unpruned model,
    `of_control` to the unpruned model after the same recovery; None if unknown.
    """

    name: str
    title: str
    labels: Mapping[str, str]
    models: Sequence[Run]
    retained: Retention | None
    of_control: Retention | None = None

    @property
    def first(self) -> Run:
        """First model of the group, for properties that all its models share."""
        return self.models[0]

    @property
    def recovery(self) -> str:
        """Recovery in words, such as "reconstructed + SFT" or "without recovery"."""
        return self.first.after_pruning

    def mean(self, field: str) -> float:
        """Return the mean of a numeric property over the group's models, in which unknown values count as 0."""
        return sum(getattr(model, field) or 0.0 for model in self.models) / len(self.models)


@dataclass(frozen=True)
class Comparison:
    """Models of a run or a sweep, with the unpruned models that they are compared with, and the best of them.

    `unpruned`: {`Run.unpruned` of the models: group of the unpruned model alone, which retains 100 %}.
    """

    sets: Sets
    unpruned: Mapping[str, ModelGroup]
    controls: Sequence[ModelGroup]
    groups: Sequence[ModelGroup]
    best: ModelGroup | None

    def size(self, group: ModelGroup) -> str:
        """Return the parameters of a group in % of its unpruned model's."""
        return f"{100 * group.mean('parameters') / self.unpruned[group.first.unpruned].first.parameters:.1f}"


def comparison_of_run(result: Result) -> Comparison:
    """Return the comparison of a run's models, one per group."""

    def groups(entries: Sequence[Run]) -> list[ModelGroup]:
        return [_group(entry.name, result.labels[entry.name], {}, [entry], result.sets) for entry in entries]

    runs = groups(result.runs)
    best = next((group for group in runs if group.name == result.best), None)
    return Comparison(result.sets, _unpruned({"": result.teacher}), groups(result.controls), runs, best)


def comparison_of_sweep(sweep: SweepResult) -> Comparison:
    """Return the comparison of a sweep's models; the best group retains most (of equals, the smallest models)."""
    groups = groups_of(sweep)
    known = [(-group.retained[0], group.mean("parameters"), number) for number, group in enumerate(groups)
             if group.retained is not None]  # fmt: skip
    best = groups[min(known)[2]] if known else None
    unpruned = dict(sorted(sweep.unpruned.items(), key=lambda item: -(item[1].image_tokens or 0)))
    return Comparison(sweep.sets, _unpruned(unpruned), [], groups, best)


def _unpruned(models: Mapping[str, Model]) -> dict[str, ModelGroup]:
    """Return {key in `Comparison.unpruned`: group}; titles have the model's folder if there are several models."""
    folders = {key: key.removesuffix(unpruned_key("", model.image_tokens)) for key, model in models.items()}
    groups = dict[str, ModelGroup]()
    for key, model in models.items():
        folder = f" {printable(folders[key])}" if len({*folders.values()}) > 1 else ""
        tokens = f", {model.image_tokens} image tokens" if model.image_tokens else ""
        fields = {name: getattr(model, name) for name in model.__struct_fields__}
        fields["evaluation"] = replace(model.evaluation, paper_average=100.0)
        run = Run(**fields, name=UNPRUNED, model=folders[key], recovery="none", seconds=None, path="")
        groups[key] = ModelGroup("", f"{UNPRUNED}{folder}{tokens}", {}, [run], (100.0, 100.0, 100.0))
    return groups


def groups_of(sweep: SweepResult) -> list[ModelGroup]:
    """Group a sweep's models that differ only in seeds."""
    by_group: dict[str, list[Run]] = {}
    labels, titles = dict[str, dict[str, str]](), dict[str, str]()
    for entry in sweep.models:
        if (run := entry.found) is not None:
            by_group.setdefault(entry.group, []).append(run)
            without_seeds = {name: text for name, text in entry.labels.items() if name.rpartition(".")[2] != "seed"}
            labels.setdefault(entry.group, without_seeds)
            data = f", {100 * run.data_fraction:g} % of the data" if run.data_fraction else ""
            images = f", {run.image_tokens} image tokens" if run.image_tokens else ""
            titles.setdefault(entry.group, f"{run.label}{data}{images}")
    titles = unique_titles(titles)
    return [_group(name, titles[name], labels[name], models, sweep.sets) for name, models in by_group.items()]


def _group(name: str, title: str, labels: Mapping[str, str], models: Sequence[Run], sets: Sets) -> ModelGroup:
    evaluations = [model.evaluation for model in models]
    controls = [evaluation.control for evaluation in evaluations]
    return ModelGroup(name, title, labels, models, _mean_retention(evaluations, sets), _mean_retention(controls, sets))


def _mean_retention(evaluations: Sequence[ModelEvaluation | None], sets: Sets) -> Retention | None:
    known = [evaluation for evaluation in evaluations if evaluation is not None]
    values = [evaluation.mean_of_ratios for evaluation in known if evaluation.mean_of_ratios is not None]
    if len(values) < len(evaluations):
        return None
    return interval_of_mean(values, [average_interval(evaluation, sets) for evaluation in known])
