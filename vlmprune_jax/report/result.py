"""`result.json`: what a run found, written by `make_result` and read by `read_result`; this page is its schema.

Version 2 (paths are relative to the workdir):

    version   2
    sets      {set: what was measured there}: name (the metric's), main (the value that counts), unit, scale (a value
              times it, then the unit, is how it is shown), full (a perfect model's value, or null), higher_is_better,
              grouped_by (what its groups are, or null), and questions or tokens, how many there were
    teacher   the unpruned model: parameters, evaluation
    runs      one object per model: name, method, criterion, ratio_asked, ratio_reached, decoder_ratio, parameters,
              removed_layers, plan, scores (files of importances), recovery ("none" without), data_fraction, seconds
              (scoring, pruning, training), training_records, training_steps and metrics (a file) of recovered models,
              evaluation, evaluation_seconds, path
    best      the name of the run that was exported: the highest mean_of_ratios, among equals the smallest model
    export    path, and what its comparison with the model found

`evaluation` of a model:

    scores          {set: {name: value}}, unscaled
    retained        {set: 100 * value / the unpruned model's}, upside down where lower is better; null where that is 0
    mean_of_ratios  the mean of `retained`
    paper_average   AVG-% of arXiv 2604.24380: 100 * sum of value / full over that sum of the unpruned model
    groups          {set: {group: {questions, name: value, ...}}} of sets that have at most 40 groups

The averages are over the sets whose metric has a full score; perplexity counts only where there is no such set. Sets on
which the unpruned model scores 0 are left out, and an average over no set is null. The teacher has no retained and no
averages.

Version 1, which had no `version`, knew one set and exact match: accuracy, questions and by_answer of the teacher, and
of every run also retained and perhaps perplexity. These fields are still written, with the same meaning, where the sets
"questions" (and "text") that an experiment has by default were evaluated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmprune_jax.errors import UserError
from vlmprune_jax.evaluation.averages import mean_of_ratios, paper_average, retained
from vlmprune_jax.evaluation.metrics.exact_match import EXACT_MATCH

Json = dict[str, Any]
Found = Mapping[str, Mapping[str, Any]]  # set -> what `vlmprune evaluate` found there of one model (its eval/*.json)
VERSION = 2
MOST_GROUPS = 40


def describe_sets(found: Found) -> Json:
    """`sets` of the object, as any model's evaluation tells them."""
    return {
        name: {**of["metric"], **{counted: of[counted] for counted in ("questions", "tokens") if counted in of}}
        for name, of in found.items()
    }


def make_run(name: str, facts: Json, found: Found, teacher: Found, path: str) -> Json:
    """One of `runs`: what was done to the model (`facts`), and what was found of it beside the unpruned one."""
    sets, scores, original = describe_sets(teacher), _values(found), _values(teacher)
    kept = {key: _retained(scores[key], original[key], of) for key, of in sets.items()}
    evaluation = {"scores": scores, "retained": kept, **_averages(scores, original, sets), "groups": _groups(found)}
    first = _version_1(found)
    if "accuracy" in first:
        first["retained"] = kept["questions"]
    seconds = round(sum(of["seconds"] for of in found.values()), 2)
    return {"name": name, **facts, **first, "evaluation": evaluation, "evaluation_seconds": seconds, "path": path}


def make_result(teacher: Found, runs: Sequence[Json], best: str, export: Json) -> Json:
    """The whole object."""
    parameters = next(iter(teacher.values()))["parameters"]
    evaluation = {"scores": _values(teacher), "groups": _groups(teacher)}
    unpruned = {**_version_1(teacher), "parameters": parameters, "evaluation": evaluation}
    sets = describe_sets(teacher)
    return {"version": VERSION, "sets": sets, "teacher": unpruned, "runs": list(runs), "best": best, "export": export}


def best_run(runs: Sequence[Json], sets: Json) -> Json:
    """The run with the highest mean_of_ratios (the highest scores, where there is none); among equals the smallest.

    Raises:
      UserError: there is no run (`evaluate.unrecovered` is off and nothing was recovered).
    """
    if not runs:
        raise UserError("no model was evaluated: set evaluate.unrecovered, or add a recovery")

    def rank(run: Json) -> tuple[float, float, int]:
        scores = _counting(run["evaluation"]["scores"], sets).values()
        return -(run["evaluation"]["mean_of_ratios"] or 0.0), -sum(scores), run["parameters"]

    return min(runs, key=rank)


def read_result(workdir: Path) -> Json:
    """`result.json` of a workdir, of any version, as version 2.

    Raises:
      UserError: it is missing, not JSON, lacks its main keys, or is of a later version.
    """
    path = workdir / "result.json"
    try:
        result = dict(json.loads(path.read_text(encoding="utf-8")))
        version = result.get("version", 1)
        for key in ("teacher", "runs", "best", "export", *(("sets",) if version == VERSION else ())):
            result[key]
        if version == 1:
            result = _from_version_1(result)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: run `vlmprune run` first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a result of `vlmprune run` ({error!r}): run it again") from None
    if version not in (1, VERSION):
        raise UserError(f"{path}: is of version {version}, this is {VERSION}: update vlmprune-jax")
    return result


def shown(value: float | None, described: Mapping[str, Any], *, unit: bool = True) -> str:
    """A value of a set as text, with or without its unit; nothing where there is none."""
    if value is None:
        return ""
    return f"{described['scale'] * value:.2f} {described['unit'] if unit else ''}".strip()


def main_value(model: Mapping[str, Any], name: str, sets: Json) -> float | None:
    """What counts of a set, of the teacher or a run."""
    return model["evaluation"]["scores"].get(name, {}).get(sets[name]["main"])


def _values(found: Found) -> dict[str, dict[str, float]]:
    return {name: dict(of["values"]) for name, of in found.items()}


def _groups(found: Found) -> Json:
    return {name: of["groups"] for name, of in found.items() if 0 < len(of["groups"]) <= MOST_GROUPS}


def _retained(values: Mapping[str, float], original: Mapping[str, float], described: Json) -> float | None:
    ours, theirs = values[described["main"]], original[described["main"]]
    if not described["higher_is_better"]:
        ours, theirs = theirs, ours
    return retained(ours, theirs) if theirs else None  # JSON has no NaN


def averaged_sets(sets: Json) -> list[str]:
    """The sets that averages are over: those with a full score, or all if none has one."""
    return [name for name, of in sets.items() if of["full"] is not None] or list(sets)


def _counting(scores: Mapping[str, Mapping[str, float]], sets: Json) -> dict[str, float]:
    """The values that averages are of, all better when higher."""
    mains = {name: scores[name][sets[name]["main"]] for name in averaged_sets(sets)}
    turned = (value if sets[name]["higher_is_better"] else _inverse(value) for name, value in mains.items())
    return dict(zip(mains, turned, strict=True))


def _inverse(value: float) -> float:
    return 1 / value if value else math.inf


def _averages(scores: Json, original: Json, sets: Json) -> Json:
    ours, theirs = _counting(scores, sets), _counting(original, sets)
    theirs = {name: value for name, value in theirs.items() if value and math.isfinite(value)}
    ours = {name: ours[name] for name in theirs}
    full = {name: sets[name]["full"] for name in theirs}
    return {
        "mean_of_ratios": mean_of_ratios(ours, theirs) if theirs else None,
        "paper_average": paper_average(ours, theirs, full) if theirs and None not in full.values() else None,
    }


def _version_1(found: Found) -> Json:
    """The fields of version 1 that a model has, but for `retained`."""
    old: Json = {}
    if "questions" in found and "accuracy" in found["questions"]["values"]:
        of = found["questions"]
        old = {"accuracy": of["values"]["accuracy"], "questions": of["questions"], "by_answer": of["groups"]}
    if "text" in found and "perplexity" in found["text"]["values"]:
        old["perplexity"] = found["text"]["values"]["perplexity"]
    return old


def _from_version_1(result: Json) -> Json:
    sets = {"questions": {"name": "exact_match", **EXACT_MATCH.describe(), "questions": result["teacher"]["questions"]}}

    def evaluation(model: Json) -> Json:
        groups = model.get("by_answer") or {}
        found = {"scores": {"questions": {"accuracy": model["accuracy"]}}}
        return {**found, "groups": {"questions": groups} if 0 < len(groups) <= MOST_GROUPS else {}}

    def run(old: Json) -> Json:
        kept = old["retained"]
        averages = {"retained": {"questions": kept}, "mean_of_ratios": kept, "paper_average": kept}
        return {**old, "evaluation": {**evaluation(old), **averages}}

    teacher = {**result["teacher"], "evaluation": evaluation(result["teacher"])}
    runs = [run(old) for old in result["runs"]]
    return {**result, "version": VERSION, "sets": sets, "teacher": teacher, "runs": runs}
