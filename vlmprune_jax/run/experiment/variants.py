"""The variants of an experiment: every way to prune with every way to recover, each in its own folder."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune_jax.base.checks import one_of, suggest, with_defaults
from vlmprune_jax.base.chips import slice_of
from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.settings import check_settings, override
from vlmprune_jax.core.prune.config import ScoreConfig
from vlmprune_jax.core.prune.criteria import CRITERIA, scoring
from vlmprune_jax.io.exports.formats import choose_format
from vlmprune_jax.run.experiment.arguments import evaluation_sets, export_options, plan_config, recover_config
from vlmprune_jax.run.experiment.spec import Experiment

NO_RECOVERY = "none"
CONTROL = "control"  # folder and name of the unpruned model after a recovery
# Names of other files and folders beside the folders of variants.
_TAKEN = (
    *("", ".", "..", NO_RECOVERY, CONTROL, "adapter", "eval", "export", "pruned", "reconstructed", "recovered"),
    "training",
)


@dataclass(frozen=True)
class Variant:
    """One way to prune, with the ways to recover that train the pruned model, each a variant as well.

    `folder`: folder of the outputs, relative to the workdir.
    """

    name: str
    experiment: Experiment
    folder: Path
    recoveries: Sequence[Variant] = ()


def choose_variants(experiment: Experiment, only: str) -> Experiment:
    """Return the experiment with only the variants whose names match `only` (shell patterns, comma-separated).

    If no prune variant matches, all prune variants are kept; likewise for recover variants.
    """
    patterns = [pattern for pattern in only.split(",") if pattern]
    kinds = ("prune_variants", "recover_variants")
    names = [name for kind in kinds for name in getattr(experiment, kind)]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            known = suggest(pattern, names) if names else " (this config has no variants)"
            raise UserError(f"--only={pattern}: matches no variant{known}")
    changes: dict[str, Any] = {}
    for kind in kinds:
        variants = getattr(experiment, kind)
        chosen = {n: v for n, v in variants.items() if any(fnmatch.fnmatchcase(n, p) for p in patterns)}
        changes[kind] = chosen or variants
    return dataclasses.replace(experiment, **changes)


def prefer_explicit(experiment: Experiment, settings: Collection[str], given_by: str) -> Experiment:
    """Return the experiment with settings from the command line also applied to its variants, which may set them too.

    Args:
      settings: full names of settings, such as `prune.ratio`; the experiment already has their values.
      given_by: prefix of the names in messages, such as `--config.`.

    Raises:
      UserError: there are several variants, and at least one sets the same setting.
    """
    for kind in ("prune_variants", "recover_variants"):
        variants = getattr(experiment, kind)
        for setting in settings:
            path = setting.split(".")
            names = [name for name, values in variants.items() if _sets(values, path)]
            if not names:
                continue
            if len(variants) > 1:
                raise UserError(
                    f"{given_by}{setting}: the variants {', '.join(names)} also set {setting}: set "
                    f"{kind}.NAME.{setting}{', or --only=NAME' if given_by == '--config.' else ''}"
                )
            variants = {name: without(values, [setting]) for name, values in variants.items()}
        changes: dict[str, Any] = {kind: variants}
        experiment = dataclasses.replace(experiment, **changes)
    return experiment


def _sets(values: Any, path: Sequence[str]) -> bool:
    """Return True if a partial config sets the setting or section at `path`."""
    return not path or (isinstance(values, Mapping) and path[0] in values and _sets(values[path[0]], path[1:]))


def without(values: Mapping[str, Any], names: Collection[str], prefix: str = "") -> dict[str, Any]:
    """Return nested settings without those of these names, such as "recover.losses.ce", and without empty sections."""
    kept = {
        name: without(value, names, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in values.items()
        if prefix + name not in names
    }
    return {name: value for name, value in kept.items() if value != {} or values[name] == {}}


def variants_of(experiment: Experiment) -> list[Variant]:
    """Return the prune variants with their recoveries; without variants, one of each, in the workdir itself."""
    method = experiment.prune.method
    variants = [Variant("unpruned" if method == "none" else method, experiment, Path())]
    if experiment.prune_variants:
        variants = [
            Variant(_checked(name), override(experiment, values, f"prune_variants.{name}"), Path(name))
            for name, values in experiment.prune_variants.items()
        ]
    return [dataclasses.replace(variant, recoveries=_recoveries(variant)) for variant in variants]


def _recoveries(pruned: Variant) -> list[Variant]:
    experiment = pruned.experiment
    runs = [Variant(f"{pruned.name}-{experiment.recover.name}", experiment, pruned.folder)]
    if experiment.recover_variants:
        runs = []
    for name, values in experiment.recover_variants.items():
        changed = override(experiment, values, f"recover_variants.{name}")
        changed = override(changed, {"recover": {"name": name}})
        runs.append(Variant(f"{pruned.name}-{_checked(name)}", changed, pruned.folder / name))
    return [run for run in runs if run.experiment.recover.method != NO_RECOVERY]


def _checked(name: str) -> str:
    """Return a variant's name; raise UserError if it cannot be a folder name."""
    if name in _TAKEN or name.startswith("export-") or set(name) & set("/\\\0"):
        raise UserError(f"variant name {name!r} cannot be the name of a folder in the workdir: choose another name")
    return name


def _check_criteria(spec: ScoreConfig) -> None:
    """Raise UserError for a criterion that does not score what its setting needs, or for options that it lacks."""
    options: dict[str, Any] = {}
    for name, kinds in {"depth": ("layers",), "width": ("widths", "experts")}.items():
        criterion = getattr(spec, name)
        chosen = CRITERIA[one_of(f"score.{name}", criterion, tuple(CRITERIA))]
        if not {*kinds} & {*chosen.scores}:
            raise UserError(
                f"score.{name}={criterion!r} scores {' and '.join(chosen.scores)}, not {kinds[0]}: use "
                f"{scoring(kinds[0])}"
            )
        options |= chosen.options
    with_defaults(f"score.options of {spec.depth!r} or {spec.width!r}", spec.options, options)


def check_experiment(experiment: Experiment) -> None:
    """Raise UserError for settings that would otherwise fail only hours into a run."""
    sets = evaluation_sets(experiment.data, experiment.evaluate)
    for pruned in variants_of(experiment):
        spec, recoveries = pruned.experiment, pruned.recoveries
        for resolved in (spec, *(run.experiment for run in recoveries)):
            for name, section in resolved.sections.items():
                check_settings(name, section, elsewhere=True)
        if spec.prune.steps > 1 and spec.prune.method != "width":
            raise UserError(
                f"prune.steps={spec.prune.steps} is only for prune.method='width': remove it, since depth and "
                "hybrid pruning take one step"
            )
        _check_criteria(spec.score)
        plan = plan_config(spec.prune, spec.model, spec.data, spec.export)
        if plan.method != "none" and plan.targets:
            plan.check()
        if plan.budget.limits:
            with error_context("prune.budget.slice"):
                slice_of(plan.budget.slice)
        choose_format(spec.export.format, export_options(spec.export))
        for run in recoveries:
            changed = run.experiment
            recover_config(changed.recover)
            quantize, export = changed.recover.quantize, changed.export
            same = export.quantize == quantize and export.group_size is None and export.symmetric
            if quantize != "none" and export.quantize != "none" and not same:
                raise UserError(
                    f'recover.quantize="{quantize}" trains for export.quantize="{quantize}" with its default group '
                    f'size and symmetric=True, not for quantize="{export.quantize}", group_size={export.group_size}, '
                    f"symmetric={export.symmetric}: make them equal"
                )
            if evaluation_sets(changed.data, changed.evaluate) != sets:
                raise UserError(
                    f"variant {run.name} has other evaluation sets than the first variant: use the same sets in all "
                    "variants"
                )
