"""Damaged files of a workdir, ours or somebody else's: reading them back returns or raises one line."""

import io
import itertools
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import recover_cases as cases
import sweep_cases
from fuzz_cases import damaged_archives, edited, fuzz, fuzz_file, fuzz_folder, json_lines, reads, with_member
from hypothesis import strategies as st
from refusal import refused
from report_cases import BENCH, PLANNED, SPEED, evaluated, write_workdir

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.part import AXES, LAYERS, Key
from vlmprune_jax.core.prune import PrunePlan, Scores, score
from vlmprune_jax.core.prune.calibration import TOKEN_TYPES
from vlmprune_jax.core.prune.routing import SUMS, Routing
from vlmprune_jax.core.prune.surgery import check_plan_is_for
from vlmprune_jax.core.prune.tables import affected_tokens, compare
from vlmprune_jax.core.recovery.metrics import METRICS_FILE, Recorder
from vlmprune_jax.io.exports.pruning import make_plan
from vlmprune_jax.run.evaluation.config import EvaluationSetSpec
from vlmprune_jax.run.planning.guide import FILE, METHODS, Target, read_guide, recommend
from vlmprune_jax.run.report.build import shown_samples, vocabulary_section
from vlmprune_jax.run.report.figures import removed_section, series_of
from vlmprune_jax.run.report.speed import bench_notes, bench_tables, speed_notes, speed_tables
from vlmprune_jax.run.report.tables import tables_of
from vlmprune_jax.run.stages import evaluate
from vlmprune_jax.run.stages.evaluate import AnswerFacts
from vlmprune_jax.run.workdir.artefact import read_artefact, write_artefact
from vlmprune_jax.run.workdir.comparison import best_run
from vlmprune_jax.run.workdir.groups import comparison_of_run, comparison_of_sweep, groups_of
from vlmprune_jax.run.workdir.result import read_result
from vlmprune_jax.run.workdir.samples import SAMPLES, Picture, Sample, SampleAnswer, Samples, SampleSet
from vlmprune_jax.run.workdir.speed import Bench, Speed
from vlmprune_jax.run.workdir.steps import STEPS, StepRecord, Steps, read_unfinished
from vlmprune_jax.run.workdir.sweep import as_csv, read_sweep
from vlmprune_jax.run.workdir.tpu_plan import TPU_PLAN, TpuPlan
from vlmprune_jax.run.workdir.vocabulary import VOCABULARY, TextSample, VocabularyReport

CFG = cases.config()
MADE_FROM = {"tower": {"weights": "a1", "layers": 3}, "dtype": "float32"}


def scores():
    return score(cases.model(CFG), None, criterion="l1")


# --- what pruning hands on -------------------------------------------------------------------------------------------


AXIS_SIZES = st.integers(1, 12) | st.sampled_from([1000, 2**16, 2**24 + 1, 2**31 - 1])


def ranges_below(size):
    """Kept indices as the file lists them: nearly always ascending ranges below the size."""
    edges = st.lists(st.integers(0, size - 1) | st.sampled_from((0, size - 1, size)), min_size=2, max_size=6)
    pairs = edges.map(lambda found: [*zip(sorted({*found})[::2], sorted({*found})[1::2], strict=False)])
    return pairs.map(lambda found: ",".join(f"{low}-{high}" for low, high in found) or "0")


def layer_plans():
    """(size, kept) by axis of a layer, of any of the package's axes."""
    units = AXIS_SIZES.flatmap(lambda size: st.tuples(st.just(size), ranges_below(size)))
    return st.dictionaries(st.sampled_from([*AXES, "x"]), units, min_size=1)


def test_sizes_of_plans(tmp_path):
    """Axes without their parent, of another kind of layer, sizes that do not divide, ranges of any length."""
    plan = make_plan(scores(), CFG, method="width", ratio=0.1)
    whole, path = json.loads(plan.to_json()), tmp_path / "plan.json"
    like = st.lists(layer_plans(), max_size=4)
    alike = st.builds(lambda layer, n: [layer] * n, layer_plans(), st.integers(1, 40))
    tokens = st.none() | AXIS_SIZES.flatmap(lambda size: st.tuples(st.just(size), ranges_below(size)))

    @fuzz(60, layers=like | alike, name=st.sampled_from(["text", "vision"]), tokens=tokens)
    def check(layers, name, tokens):
        sizes, kept = {f"{name}/layers": len(layers)}, {}
        for i, layer in enumerate(layers):
            sizes |= {f"{name}/{i}/{axis}": size for axis, (size, _) in layer.items()}
            kept |= {f"{name}/{i}/{axis}": ranges for axis, (_, ranges) in layer.items()}
        if tokens is not None:
            sizes["text/vocab"], kept["text/vocab"] = tokens
        if name != "text":
            sizes, kept = {**whole["sizes_before"], **sizes}, {**whole["kept"], **kept}
        data = {"sizes_before": sizes, "kept": kept, "tokenizer": tokens and "x"}
        path.write_text(json.dumps({**whole, **data}))
        plan = reads(lambda: PrunePlan.from_json(path), path.name)
        if plan is not None:
            assert repr(plan)
            assert compare(plan, plan)
            reads(lambda: [*removed_section(tmp_path, [path.name])], "")
            reads(lambda: check_plan_is_for(Model({}, CFG), plan), "plan of another model")


def score_files(path):
    """Archives with an array, its header or what describes all of them edited, or damaged as bytes."""
    with np.load(path) as arrays:
        about, names = json.loads(str(arrays["meta"])), [f"{name}.npy" for name in arrays.files]

    def saved(name, array):
        np.save(content := io.BytesIO(), array)
        return with_member(path.read_bytes(), name, content.getvalue())

    odd = [
        np.zeros(0), np.array(1.0), np.zeros((2, 2)), np.full(2, np.nan), np.full(2, np.inf), np.ones(2, complex),
        np.ones(2, bool), np.array(["a", "b"]), np.arange(2), np.zeros(2, "M8[s]"), np.zeros(2, [("a", "f4")]),
    ]  # fmt: skip
    return st.one_of(
        edited(about).map(lambda value: saved("meta.npy", np.array(json.dumps(value)))),
        st.builds(saved, st.sampled_from(sorted(names)), st.sampled_from(odd)),
        damaged_archives(path.read_bytes()),
    )


def test_scores(tmp_path):
    whole, path = tmp_path / "whole.npz", tmp_path / "scores.npz"
    scores().save(whole)

    def read():
        found = Scores.load(path)  # of other widths, perhaps: planning says so
        reads(lambda: (found.name, make_plan(found, CFG, method="width", ratio=0.1)))

    fuzz_file(120, path, read, files=score_files(whole))


def test_routing(tmp_path):
    whole, path, draw = tmp_path / "whole.npz", tmp_path / "routing.npz", np.random.default_rng(0)
    sums = {layer: draw.random((len(TOKEN_TYPES), len(SUMS), 4)) for layer in range(2)}
    choices = {layer: draw.integers(0, 4, (9, 2)).astype(np.uint16) for layer in range(2)}
    types = draw.integers(1, 4, 9).astype(np.uint8)
    Routing("a", sums, choices, types).save(whole)

    def read():
        found = Routing.load(path)
        reads(lambda: (found.occurring, [found.affected(layer, (0, 1)) for layer in found.choices]))

    fuzz_file(120, path, read, files=score_files(whole))
    sizes = {Key("text", None, LAYERS): 2, **{Key("text", i, "experts"): 4 for i in range(2)}}
    plan = PrunePlan("a", "experts", "reap", sizes, {key: (0, 2) for key in sizes if key.axis != LAYERS}, 10, 9, 10)
    Routing("a", sums, choices, types).save(path)
    assert affected_tokens(plan, Routing.of_plan(path, plan))
    empty = {layer: 0 * array for layer, array in sums.items()}
    for fact, *parts in (
        ("is of another model", "b", sums, choices, types),
        ("other layers or numbers of experts", "a", {0: sums[0]}, {0: choices[0]}, types),
        ("token_types has 9", "a", sums, choices, np.full(9, 9, np.uint8)),
        ("it has no tokens", "a", sums, {i: array[:0] for i, array in choices.items()}, types[:0]),
        ("it has no tokens", "a", empty, choices, types),
    ):
        Routing(*parts).save(path)
        refused(f"{path.name}: .*{fact}", Routing.of_plan, path, plan)


# --- what lets a stage be continued ----------------------------------------------------------------------------------


def test_metrics_of_a_resumed_run(tmp_path):
    lines = [{"step": step, "loss": 1.0 / step, "ce": 0.5, "seconds": 0.1} for step in range(1, 6)]
    path = tmp_path / METRICS_FILE

    def resume():
        with Recorder(tmp_path, 3, 6, 1, False, jax.devices()[:1]) as recorder:
            return recorder.last

    @fuzz(40, content=json_lines(lines), skipped=json_lines([{"step": 1, "record": "r1", "reason": "too long"}]))
    def check(content, skipped):
        path.write_bytes(content)
        (tmp_path / "skipped-0.jsonl").write_bytes(skipped)
        reads(resume, path.name, "skipped-0.jsonl")


def test_array_caches(tmp_path):
    folder = tmp_path / "cache"
    cache = ArrayCache(folder, MADE_FROM)
    cache.add({f"k{number}": np.full((2, 3), number, np.float32) for number in range(3)})
    cache.publish()
    assert len([*folder.iterdir()]) == 2

    def read():
        cache = ArrayCache(folder, MADE_FROM)
        return [cache[f"k{number}"] for number in range(3)]

    fuzz_folder(60, folder, read)


# --- what tables, pages and recommendations are made of --------------------------------------------------------------


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


def write_unfinished(folder):
    """An evaluation of the unpruned model, and a good one of a pruned model."""
    (folder / "pruned").mkdir()
    make_plan(scores(), CFG, method="width", ratio=0.1).to_json(folder / "plan.json")
    prune = StepRecord(
        stage="prune", name="width", recovery="none", about="the plan", variant=".", folder=".", outputs=["plan.json"],
        model="pruned",
    )  # fmt: skip
    (folder / "eval").mkdir(exist_ok=True)
    evaluation = evaluated(0.5, retained_interval=(90.0, 99.5), scores={"accuracy": [1.0, 0.0]})
    for name in ("pruned", "teacher"):
        write_artefact(folder / f"eval/{name}.json", evaluation)
    write_artefact(folder / STEPS, Steps(steps=[prune]))


def shown_unfinished(folder):
    result = read_unfinished(folder).result
    return [] if result is None else tables_of(comparison_of_run(result))


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
        ("eval/teacher.json", write_unfinished, shown_unfinished),
        (STEPS, write_unfinished, shown_unfinished),
    ],
)
def test_results(tmp_path, file, made, shown):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    made(tmp_path) if callable(made) else write_artefact(path, made)
    assert shown(tmp_path)
    assert all(shown(tmp_path))
    fuzz_file(100, path, lambda: shown(tmp_path))


@pytest.mark.parametrize("uri", ["x", "/dev/zero", "http://a/b.png", "data:text/html;base64,aGFsbG8="])
def test_pictures_from_elsewhere(tmp_path, uri):
    path = tmp_path / SAMPLES
    path.parent.mkdir()
    write_artefact(path, some_samples())
    path.write_text(path.read_text().replace("data:image/png;base64,aGFsbG8=", uri))
    refused(path.name, shown_pictures, tmp_path)
