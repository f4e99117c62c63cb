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
    workload  what `costs` are of: tokens and images of the row of `forward_flops`, dtype of cache and file
    best      the name of the run that is exported: the highest mean_of_ratios, among equals the smallest model
    export    path, and what its comparison with the model found; not there in runs of a sweep, which export nothing

The teacher and runs have `costs` (forward_flops, kv_bytes_per_token, file_bytes) and, where speed was measured,
`speed`, the medians of its rounds: prefill and decode (tokens/s), first_token (s) and peak_bytes (or null). Older
results have neither. All rounds, and where they were run: `speed.json`.

`evaluation` of a model:

    scores          {set: {name: value}}, unscaled
    retained        {set: 100 * value / the unpruned model's}, upside down where lower is better; null where that is 0
    retained_interval  {set: [low, high]} of `retained`, between which 95 % of the samples of a paired bootstrap lie;
                    null where the unpruned model scores 0 in one of them. Sets whose metric needs long for it have none
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

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import Count, Finite, checked, read_json
from vlmprune_jax.evaluation.averages import mean_of_ratios, paper_average, retained
from vlmprune_jax.evaluation.metrics.exact_match import EXACT_MATCH

Values = dict[str, float]
Groups = dict[str, dict[str, Values]]
_TODO = "run `vlmprune run` again, or restore it"


class _Version(TypedDict):
    version: NotRequired[int]


class Described(TypedDict):
    """What tables and plots need to show a metric's values (`Metric.describe`)."""

    name: str
    main: str
    unit: str
    scale: Finite
    full: Finite | None
    higher_is_better: bool
    grouped_by: str | None


class Set(Described):
    """One of `sets`: how a value is shown, and how many questions or tokens there were."""

    questions: NotRequired[Count]
    tokens: NotRequired[Count]


class Evaluation(TypedDict):
    scores: dict[str, Values]
    groups: Groups


class RunEvaluation(Evaluation):
    retained: dict[str, float | None]
    retained_interval: NotRequired[dict[str, tuple[float, float] | None]]
    mean_of_ratios: float | None
    paper_average: float | None


class Costs(TypedDict):
    """Of a model by its shapes; see `prune.cost.costs_of`."""

    forward_flops: Finite
    kv_bytes_per_token: Count
    file_bytes: Count


class _Speed(TypedDict):
    prefill: Finite
    decode: Finite
    first_token: Finite
    peak_bytes: Count | None


class _Model(TypedDict):
    """What any model may have."""

    costs: NotRequired[Costs]
    speed: NotRequired[_Speed]


class _Teacher(_Model):
    parameters: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    evaluation: Evaluation


class _Facts(_Model):
    """What was done to a model; paths are relative to the workdir."""

    name: str
    method: str
    ratio_asked: Finite | None
    ratio_reached: Finite
    decoder_ratio: NotRequired[Finite]
    parameters: Count
    plan: str
    scores: list[str]
    recovery: str
    data_fraction: Finite
    seconds: float
    path: str
    metrics: NotRequired[str | None]
    loss_terms: NotRequired[dict[str, str]]
    reconstruct: NotRequired[str]


class _Run(_Facts):
    evaluation: RunEvaluation


class _Export(TypedDict):
    path: str
    max_abs_logit_difference: float


class _Workload(TypedDict):
    length: Count
    images: Count
    dtype: str


class _Result(TypedDict):
    sets: Annotated[dict[str, Set], msgspec.Meta(min_length=1, max_length=1000)]
    teacher: _Teacher
    runs: Annotated[list[_Run], msgspec.Meta(min_length=1, max_length=10_000)]
    best: str
    export: NotRequired[_Export]
    workload: NotRequired[_Workload]


class _Model1(TypedDict):
    accuracy: float
    by_answer: NotRequired[dict[str, Values] | None]


class _Teacher1(_Model1):
    questions: Count


class _Run1(_Model1):
    retained: float | None


class _Result1(TypedDict):
    """What version 2 says differently."""

    teacher: _Teacher1
    runs: list[_Run1]


Json = dict[str, Any]
Found = Mapping[str, Mapping[str, Any]]  # set -> what `vlmprune evaluate` found there of one model (its eval/*.json)
VERSION = 2
# What of a run was found by evaluating it; the rest says what was done to the model.
FOUND = ("evaluation", "evaluation_seconds", "accuracy", "questions", "by_answer", "perplexity", "retained")
MOST_GROUPS = 40
MAX_BYTES = 2**25  # thousands of models


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
    intervals = {key: of["retained_interval"] for key, of in found.items() if "retained_interval" in of}
    if intervals:
        evaluation["retained_interval"] = intervals
    first = _version_1(found)
    if "accuracy" in first:
        first["retained"] = kept["questions"]
    seconds = round(sum(of["seconds"] for of in found.values()), 2)
    return {"name": name, **facts, **first, "evaluation": evaluation, "evaluation_seconds": seconds, "path": path}


def make_result(
    teacher: Found,
    runs: Sequence[Json],
    best: str,
    export: Json | None,
    *,
    facts: Mapping[str, Any] | None = None,
    workload: Mapping[str, Any] | None = None,
) -> Json:
    """The whole object, before there is an `export` without it.

    `facts` are of the unpruned model, `workload` is what costs are of.
    """
    sets, unpruned = describe_sets(teacher), unpruned_of(teacher, facts or {})
    more = {} if workload is None else {"workload": dict(workload)}
    found = {"version": VERSION, "sets": sets, "teacher": unpruned, "runs": list(runs), "best": best}
    return {**found, **more} if export is None else {**found, "export": export, **more}


def unpruned_of(teacher: Found, facts: Mapping[str, Any]) -> Json:
    """`teacher` of the object."""
    parameters = next(iter(teacher.values()))["parameters"]
    evaluation = {"scores": _values(teacher), "groups": _groups(teacher)}
    return {**_version_1(teacher), "parameters": parameters, **facts, "evaluation": evaluation}


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
      UserError: it is missing, damaged, or of a later version; or it names a file outside the workdir.
    """
    path = workdir / "result.json"
    missing = "no such file: run `vlmprune run` first"
    result = read_json(path, _Version, missing=missing, todo=_TODO, most=MAX_BYTES, unicode=False)
    version = result.get("version", 1)
    if version not in (1, VERSION):
        raise UserError(f"{path}: is of version {version}, this is {VERSION}: update vlmprune-jax")
    if version == 1:
        result = _from_version_1(checked(result, _Result1, str(path), _TODO))
    checked(result, _Result, str(path), _TODO)
    problem = next(_problems(result, workdir), None)
    if problem is not None:
        raise UserError(f"{path}: {problem}: {_TODO}")
    return result


def _problems(result: Json, workdir: Path) -> Iterator[str]:
    """What a schema cannot say: which names must be known, and that no path leads out of the workdir."""
    sets, runs = result["sets"], result["runs"]
    if all(run["name"] != result["best"] for run in runs):
        yield f"its best run {result['best']!r} is none of its runs"
    for name, of in sets.items():
        if "questions" not in of and "tokens" not in of:
            yield f"set {name!r} says neither how many questions nor how many tokens it has"
    for model in (result["teacher"], *runs):
        scores, groups = model["evaluation"]["scores"], model["evaluation"]["groups"]
        missing = [name for name, of in sets.items() if of["main"] not in scores.get(name, {})]
        unknown = [name for name in groups if name not in sets]
        if missing or unknown:
            yield f"{model.get('name', 'teacher')}: set {(missing + unknown)[0]!r} is not in its scores, or not in sets"
        if any("questions" not in values for of in groups.values() for values in of.values()):
            yield f"{model.get('name', 'teacher')}: a group does not say how many questions it has"
    home = os.path.realpath(workdir)
    named = (path for run in runs for path in (run["plan"], *run["scores"], run.get("metrics"), run["path"]))
    for path in dict.fromkeys(named):
        if path is not None and ("\0" in path or not Path(os.path.realpath(workdir / path)).is_relative_to(home)):
            yield f"{path!r} lies outside the workdir"


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
