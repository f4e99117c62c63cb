"""Results of a sweep as rows of the guide of `vlmprune recommend`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from study_page import measured
from sweep_points import Point, points_of

from vlmprune_jax.base.files import replacing
from vlmprune_jax.run.cli.config_files import read_experiment, shipped_config
from vlmprune_jax.run.evaluation.statistics import interval_of_mean
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.planning.guide import FILE, Evidence, Guide, Source, read_guide
from vlmprune_jax.run.workdir.sweep import SweepResult


def update_guide(path: Path, studies: Mapping[str, SweepResult]) -> None:
    """Write the rows of sweeps into a guide, replacing rows of the same names; a new guide starts from the package's.

    Raises:
      UserError: the file is not a guide.
      OSError: the file cannot be written.
    """
    guide = read_guide(path if path.exists() else FILE)
    for name, sweep in studies.items():
        guide = with_study(guide, name, sweep)
    with replacing(path) as file:
        file.write(as_json(guide).encode())


def with_study(guide: Guide, name: str, sweep: SweepResult) -> Guide:
    """Return the guide with the rows of a sweep, replacing those of the same name; title and measure of that stay."""
    vision = any(metric.counted == "questions" for metric in sweep.sets.values())
    recipe, task = settings_of_config(sweep.config)
    new = Source(f"{name}, a sweep, by tools/study.py", measured(sweep), vision, recipe, task)
    source = dataclasses.replace(guide.sources.get(name, new), vision=vision, recipe=recipe, task=task)
    rows = [row for row in guide.evidence if row.source != name] + evidence_of(name, points_of(sweep))
    return dataclasses.replace(guide, sources={**guide.sources, name: source}, evidence=tuple(rows))


def settings_of_config(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a config file's settings that differ from the defaults: (recipe, data and evaluation); {} without file."""
    if not Path(name.partition(":")[0]).is_file():
        return {}, {}
    changes = changed_settings(read_experiment(shipped_config(name)), Experiment())
    recipe, task = (
        {section: dict(changes.get(section, {})) for section in sections}
        for sections in (("score", "reconstruct", "recover"), ("data", "evaluate", "export", "speed"))
    )
    for setting in ("losses", "name", "method"):  # these follow from the names of recoveries
        recipe["recover"].pop(setting, None)
    for section, setting in (
        ("data", "train"),
        ("data", "fraction"),
        ("evaluate", "unrecovered"),
        ("evaluate", "text"),
    ):
        task[section].pop(setting, None)
    return recipe, task


def changed_settings(spec: Any, default: Any) -> dict[str, Any]:
    """Return the settings of a section that differ from another's, as a partial experiment."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(spec):
        ours, theirs = getattr(spec, field.name), getattr(default, field.name)
        if ours != theirs:
            changes[field.name] = changed_settings(ours, theirs) if dataclasses.is_dataclass(ours) else ours
    return changes


def evidence_of(name: str, points: Sequence[Point]) -> list[Evidence]:
    """Convert evaluated models to evidence rows of the guide: mean over seeds, interval over seeds and questions."""
    cells: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        key = (point.model, point.method, point.recovery, point.level, point.data)
        cells.setdefault(key, []).append(point)
    rows = []
    for (model, method, recovery, _, data), group in cells.items():
        mean, *ends = interval_of_mean([point.retained for point in group], [point.interval for point in group])
        controls = [point.of_control for point in group if point.of_control is not None]
        rows.append(
            Evidence(
                source=name,
                model=model,
                parameters=group[0].parameters,
                method=method,
                recovery=recovery,
                decoder_ratio=round(float(np.mean([point.reached for point in group])), 4),
                data_fraction=data,
                retained=round(mean, 2),
                interval=(round(ends[0], 2), round(ends[1], 2)) if ends[0] < ends[1] else None,
                seeds=len(group),
                note="",
                counts=True,
                of_control=round(float(np.mean(controls)), 2) if len(controls) == len(group) else None,
            )
        )
    return rows


def as_json(guide: Guide) -> str:
    """Return the guide as the text of `guide.json`, with one line per rule and evidence row."""
    entries = []
    for name, value in msgspec.to_builtins(guide).items():
        if isinstance(value, dict):
            inner, ends = [f"{json.dumps(key)}: {_json_line(item)}" for key, item in value.items()], "{}"
        elif isinstance(value, list | tuple):
            inner, ends = [_json_line(item) for item in value], "[]"
        else:
            entries.append(f" {json.dumps(name)}: {_json_line(value)}")
            continue
        entries.append(f" {json.dumps(name)}: {ends[0]}\n  " + ",\n  ".join(inner) + f"\n {ends[1]}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
