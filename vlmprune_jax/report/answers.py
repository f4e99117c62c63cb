"""What models answered question by question, from `eval/*.json`, and whether one of them is really better."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from vlmprune_jax.core.errors import UserError, printable
from vlmprune_jax.core.files import Count, read_json
from vlmprune_jax.evaluation.statistics import holm, mcnemar
from vlmprune_jax.report.page import Section, Table
from vlmprune_jax.report.result import Described, Values

Json = dict[str, Any]
UNPRUNED = "unpruned"  # what tables call the model that runs are compared with
TEACHER, DEFAULT_SET = "teacher", "questions"  # what its files are called, and the set whose files bear no name
MOST_COMPARED = 40  # models of a table
ENOUGH = 0.05  # a difference that chance gives less often than this is called one
_TODO = "evaluate again"


class Evaluated(TypedDict):
    """An `eval/*.json`: one model and set. `scores`: {name: that of every question}, null where one has none."""

    metric: Described
    values: Values
    groups: dict[str, Values]
    parameters: Count
    seconds: float
    scores: dict[str, list[float | None]]
    questions: NotRequired[Count]
    tokens: NotRequired[Count]
    retained_interval: NotRequired[tuple[float, float] | None]


def evaluation_file(folder: Path, name: str, key: str) -> Path:
    """Where the evaluation of a model lies: `folder/eval/NAME.json`, of another set than "questions" NAME.SET.json."""
    return folder / "eval" / (f"{name}.json" if key == DEFAULT_SET else f"{name}.{key}.json")


def read_evaluated(path: Path) -> Json:
    """The evaluation of a model on a set.

    Raises:
      UserError: the file is damaged.
    """
    found: Json = read_json(path, Evaluated, missing="no such file: run `vlmprune evaluate`", todo=_TODO, unicode=False)
    main = found["metric"]["main"]
    if main not in found["values"]:
        raise UserError(f"{path}: its metric counts {main!r}, which is not in its values: {_TODO}")
    if "questions" not in found and "tokens" not in found:
        raise UserError(f"{path}: says neither how many questions nor how many tokens it is of: {_TODO}")
    if any("questions" not in group for group in found["groups"].values()):
        raise UserError(f"{path}: a group does not say how many questions it has: {_TODO}")
    return found


def find_evaluated(workdir: Path, run: Mapping[str, Any] | None, key: str) -> Path | None:
    """The evaluation of a run of `result.json`, of None that of the unpruned model, if there is one in the workdir."""
    if not re.fullmatch(r"[\w-]{1,100}", key, re.ASCII):  # a result of somebody else's may name sets as it likes
        return None
    folder = workdir / (TEACHER if run is None else run["path"])
    path = evaluation_file(folder.parent, folder.name, key)
    inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(workdir))
    return path if inside and path.is_file() else None


def scores_of(evaluated: Mapping[str, Any]) -> list[float | None]:
    """What every question scored, by the metric's main score or else its first."""
    scores: dict[str, list[float | None]] = evaluated["scores"]
    main = evaluated["metric"]["main"]
    return scores.get(main) or next(iter(scores.values()), [])


def comparison_section(workdir: Path, result: Json) -> Iterator[Section]:
    """McNemar's test of every run against the unpruned model, and of the best against all others, set by set."""
    tables, left_out = list[Table](), list[str]()
    for key, of in result["sets"].items():
        if "questions" not in of or of["full"] is None:
            continue
        told = "" if len(result["sets"]) == 1 else f"{key}: "
        right = _right_by_model(workdir, result, key)
        if len(right) < 2 or UNPRUNED not in right:
            left_out.append(key)
            continue
        tables.append(_against(f"{told}Against the unpruned model", UNPRUNED, right, result["runs"]))
        best = result.get("best")
        if best in right and len(right) > 2:
            others = {name: one for name, one in right.items() if name != UNPRUNED}
            tables.append(_against(f"{told}Against {printable(best)}, the best", best, others, ()))
    notes = [
        "McNemar's exact test on the questions that only one of both got right: were both models equally good, a "
        "split at least as uneven would come about with probability p, here raised for the number of tests in the "
        "table (Holm). It speaks of other questions of the kind, not of another pruning, calibration or training."
    ]
    if left_out:
        notes.append(
            f"Not for {printable(', '.join(left_out))}: the test takes answers that are right or wrong, of both models."
        )
    if tables:
        yield Section("Is one really better?", notes=tuple(notes), tables=tuple(tables))


def _right_by_model(workdir: Path, result: Json, key: str) -> dict[str, list[float]]:
    """Model -> 1 (right) or 0 (wrong) of every question; only models that answered as many as the unpruned one."""
    found: dict[str, list[float]] = {}
    for run in (None, *result["runs"][:MOST_COMPARED]):
        path = find_evaluated(workdir, run, key)
        if path is None:
            continue
        scores = scores_of(read_evaluated(path))
        fits = all(score in (0, 1) for score in scores) and len(scores) == len(found.get(UNPRUNED, scores))
        if scores and fits:
            found[UNPRUNED if run is None else run["name"]] = [float(score or 0) for score in scores]
    return found


def _against(
    title: str, reference: str, right: Mapping[str, Sequence[float]], runs: Sequence[Mapping[str, Any]]
) -> Table:
    """A row per other model. `runs`: those of which it is told what they repaired of what their pruning broke."""
    names = [name for name in right if name != reference]
    tests = [mcnemar(right[reference], right[name]) for name in names]
    untrained = {run["plan"]: run["name"] for run in runs if run["recovery"] == "none" and run["name"] in right}
    plans = {run["name"]: run["plan"] for run in runs}
    rows = []
    for name, test, p in zip(names, tests, holm([test.p_value for test in tests]), strict=True):
        better = "better" if test.only_second > test.only_first else "worse"
        row = [printable(name), f"{test.only_first:,}", f"{test.only_second:,}", _probability(p)]
        row.append(better if p < ENOUGH else "could be chance")
        if runs:
            pruned = untrained.get(plans[name])
            row.append("" if pruned in (None, name) else _repaired(right[reference], right[str(pruned)], right[name]))
        rows.append(tuple(row))
    header = ("model", f"only {printable(reference)} right", "only this right", "p", "verdict")
    return Table(title, (*header, *(("repaired of what pruning broke",) if runs else ())), tuple(rows))


def _repaired(reference: Sequence[float], pruned: Sequence[float], recovered: Sequence[float]) -> str:
    broken = [place for place, right in enumerate(reference) if right and not pruned[place]]
    mended = sum(recovered[place] > 0 for place in broken)
    return f"{100 * mended / len(broken):.1f} % of {len(broken):,}" if broken else ""


def _probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
