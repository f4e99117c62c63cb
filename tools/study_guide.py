"""Results of a sweep as rows of the guide of `vlmprune recommend`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from insights import Point, points_of
from study_page import measured

from vlmprune_jax.core.files import replacing
from vlmprune_jax.evaluation.statistics import interval_of_mean
from vlmprune_jax.planning.guide import FILE, Evidence, Guide, Source, as_json, read_guide
from vlmprune_jax.workdir.sweep import SweepResult


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
    """Return the guide with the rows of a sweep, replacing those of the same name."""
    vision = any(of.counted == "questions" for of in sweep.sets.values())
    source = Source(f"{name}, a sweep, by tools/study.py", measured(sweep), vision)
    rows = [row for row in guide.evidence if row.source != name] + evidence_of(name, points_of(sweep))
    return dataclasses.replace(guide, sources={**guide.sources, name: source}, evidence=tuple(rows))


def evidence_of(name: str, points: Sequence[Point]) -> list[Evidence]:
    """Return rows of the guide from points: mean over seeds and its interval (of a single run, its own interval)."""
    cells: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        key = (point.model, point.method, point.recovery, point.level, point.data)
        cells.setdefault(key, []).append(point)
    rows = []
    for (model, method, recovery, _, data), of in cells.items():
        mean, *ends = interval_of_mean([point.retained for point in of])
        interval = of[0].interval if len(of) == 1 else (ends[0], ends[1])
        rows.append(
            Evidence(
                source=name,
                model=model,
                method=method,
                recovery=recovery,
                decoder_ratio=round(float(np.mean([point.reached for point in of])), 4),
                data_fraction=data,
                retained=round(mean, 2),
                interval=None if interval is None else (round(interval[0], 2), round(interval[1], 2)),
                seeds=len(of),
                note="",
                counts=True,
            )
        )
    return rows
