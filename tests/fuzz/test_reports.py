"""Damaged files of results: what tables, pages and recommendations are made of, read back or refused in one line."""

import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import recover_cases as cases
import sweep_cases
from fuzz_cases import fuzz, fuzz_file, json_files, json_lines, scores_of
from refusal import refused
from report_cases import BENCH, PLANNED, SPEED, evaluated, write_workdir

from vlmprune_jax.io.exports.pruning import make_plan
from vlmprune_jax.run.evaluation.config import EvaluationSetSpec
from vlmprune_jax.run.planning.guide import FILE, METHODS, Target, read_guide, recommend
from vlmprune_jax.run.report.build import shown_samples, vocabulary_section
from vlmprune_jax.run.report.figures import series_of
from vlmprune_jax.run.report.speed import bench_notes, bench_tables, speed_notes, speed_tables
from vlmprune_jax.run.report.tables import tables_of
from vlmprune_jax.run.stages import evaluate
from vlmprune_jax.run.stages.evaluate import AnswerFacts
from vlmprune_jax.run.sweep.sweep import Sweep, read_error, read_run
from vlmprune_jax.run.workdir.artefact import read_artefact, write_artefact
from vlmprune_jax.run.workdir.comparison import best_run
from vlmprune_jax.run.workdir.groups import comparison_of_run, comparison_of_sweep, groups_of
from vlmprune_jax.run.workdir.result import Result, read_result
from vlmprune_jax.run.workdir.samples import SAMPLES, Picture, Sample, SampleAnswer, Samples, SampleSet
from vlmprune_jax.run.workdir.speed import Bench, Speed
from vlmprune_jax.run.workdir.steps import STEPS, StepRecord, Steps, read_unfinished
from vlmprune_jax.run.workdir.sweep import RunError, as_csv, read_sweep
from vlmprune_jax.run.workdir.tpu_plan import TPU_PLAN, TpuPlan
from vlmprune_jax.run.workdir.vocabulary import VOCABULARY, TextSample, VocabularyReport

CFG = cases.config()
PRUNE = StepRecord(
    stage="prune", name="width", recovery="none", about="the plan", variant=".", folder=".", outputs=["plan.json"],
    model="pruned",
)  # fmt: skip


def test_runs_of_sweeps(tmp_path):
    """A damaged file counts as a run that is not done."""
    runs = sweep_cases.some_runs(seeds=(1,))[:2]
    sweep_cases.write_sweep(tmp_path, runs=runs)
    sweep = Sweep(tmp_path, "c.py", overwrite=False)
    paths = [sweep.folder(runs[0]) / name for name in ("result.json", "error.json")]
    write_artefact(paths[1], RunError(error="no"))
    whole = [json.loads(path.read_text()) for path in paths]

    @fuzz(100, run=json_files(whole[0]), error=json_files(whole[1]))
    def check(run, error):
        paths[0].write_bytes(run)
        paths[1].write_bytes(error)
        found = read_run(runs[0], sweep)
        assert found is None or isinstance(found, Result)
        error = read_error(runs[0], sweep)
        assert error is None or isinstance(error, str)

    check()


def test_answers(tmp_path):
    turns = [{"from": "human", "value": "A dog?"}, {"from": "gpt", "value": "yes"}]
    records, path = tmp_path / "records.json", tmp_path / "pruned.answers.jsonl"
    records.write_text(json.dumps([{"id": f"r{number}", "conversations": turns} for number in range(3)]))
    answer = {"id": "r0", "prediction": "yes", "references": ["yes"], "tokens": 1}
    done = SimpleNamespace(facts=AnswerFacts(questions=3, parameters=3, model_seconds=3), seconds=3.0)
    of = EvaluationSetSpec(data=str(records), metric="exact_match")

    def measured():
        return evaluate._measure(of, tmp_path / "pruned.json", {}, done).values["accuracy"]

    lines = [{**answer, "id": f"r{number}"} for number in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured() == 1.0
    fuzz_file(60, path, measured, files=json_lines(lines))


def test_evaluations_of_an_unfinished_run(tmp_path):
    """What was found of the unpruned model, compared with a good evaluation of a pruned one."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "pruned").mkdir()
    make_plan(scores_of(CFG), CFG, method="width", ratio=0.1).to_json(tmp_path / "plan.json")
    path = tmp_path / "eval/teacher.json"
    evaluation = evaluated(0.5, retained_interval=(90.0, 99.5), scores={"accuracy": [1.0, 0.0]})
    write_artefact(tmp_path / "eval/pruned.json", evaluation)
    write_artefact(tmp_path / STEPS, Steps(steps=[PRUNE]))
    write_artefact(path, evaluation)

    def compared():
        result = read_unfinished(tmp_path).result
        return [] if result is None else tables_of(comparison_of_run(result))

    assert len(compared()) == 1
    whole = path.read_bytes()
    fuzz_file(100, path, compared)
    path.write_bytes(whole)
    fuzz_file(100, tmp_path / STEPS, compared)


def shown_pictures(folder):
    """URIs of the pictures of a page, of which none is of another kind or from elsewhere."""
    sets = read_artefact(folder / SAMPLES, Samples).sets.values()
    parts = [part for of in sets for _, part in shown_samples(of, {})]
    uris = [image.uri for part in parts for one, _ in part for image in one.images if image.uri]
    assert all(uri.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for uri in uris)
    return uris


def some_samples():
    images = [Picture(uri="data:image/png;base64,aGFsbG8=", width=64, height=64), Picture(problem="damaged")]
    answers = [
        SampleAnswer(model="unpruned", said="yes", score=1.0),
        SampleAnswer(model="depth", said="no", score=None),
    ]
    asked = {"id": "r0", "question": "A dog?", "references": ["yes"], "images": images, "answers": answers}
    samples = [Sample(kind="broken", **asked)]
    return Samples(sets={"questions": SampleSet(questions=2, counts={"broken": 1}, samples=samples)})


def some_texts():
    counts = {"texts": 3, "equal": 2, "kept": 1, "broken": 0, "bytes": 300, "tokens_before": 90, "tokens_after": 92}
    sample = TextSample(name="all", **counts, measured_bytes=300, bits_before=0.85, bits_after=0.87)
    return VocabularyReport(rows_before=640, rows=448, parameters=1000, samples=[sample])


def shown_bench(folder):
    measured = read_artefact(folder / "bench.json", Bench)
    return bench_tables(measured), bench_notes(measured)


def shown_speed(folder):
    measured = read_artefact(folder / "speed.json", Speed)
    return speed_tables(measured, {}), speed_notes(measured), measured.medians()


def shown_result(folder):
    found = read_result(folder)
    return tables_of(comparison_of_run(found)), best_run(found.runs, found.sets).name


def shown_sweep(folder):
    found = read_sweep(folder)
    groups = groups_of(found)
    series = series_of(groups), [group.recovery for group in groups]
    return tables_of(comparison_of_sweep(found))[0].rows, as_csv(found), series


def advised(folder):
    """With a guide that has rows of one's own, or that somebody hands on."""
    guide, promises = read_guide(folder / "guide.json"), []
    for ratio, compute, size in itertools.product((0.05, 0.1, 0.15), ("none", "full"), (1056576, 7 * 10**9)):
        target = Target(size, True, ratio, ratio, dict.fromkeys(METHODS, ratio), 0.05, compute, ["depth"])
        promises.append(recommend(target, guide).promise)
    return [promises]


def shown_plans(folder):
    return [[*planned.table()] for planned in read_artefact(folder / TPU_PLAN, TpuPlan).recoveries.values()]


def write_sweep(folder):
    sweep_cases.write_sweep(folder, ("docs", "wiki"), runs=sweep_cases.some_runs(seeds=(1,))[:3])


@pytest.mark.parametrize(
    ("file", "made", "shown"),
    [
        ("result.json", write_workdir, shown_result),
        ("sweep.json", write_sweep, shown_sweep),
        ("guide.json", lambda folder: shutil.copy(FILE, folder / "guide.json"), advised),
        (TPU_PLAN, TpuPlan(recoveries={"depth": PLANNED, "width": PLANNED}), shown_plans),
        ("bench.json", BENCH, shown_bench),
        ("speed.json", SPEED, shown_speed),
        (VOCABULARY, some_texts(), lambda folder: [*vocabulary_section(folder, ["plan.json"])]),
        (SAMPLES, some_samples(), shown_pictures),
    ],
)
def test_results(tmp_path, file, made, shown):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    made(tmp_path) if callable(made) else write_artefact(path, made)
    assert shown(tmp_path)
    assert all(shown(tmp_path))
    fuzz_file(120, path, lambda: shown(tmp_path))


@pytest.mark.parametrize("uri", ["x", "/dev/zero", "http://a/b.png", "data:text/html;base64,aGFsbG8="])
def test_pictures_from_elsewhere(tmp_path, uri):
    path = tmp_path / SAMPLES
    path.parent.mkdir()
    write_artefact(path, some_samples())
    path.write_text(path.read_text().replace("data:image/png;base64,aGFsbG8=", uri))
    refused(path.name, shown_pictures, tmp_path)
