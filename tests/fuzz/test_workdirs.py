"""Damaged files of a workdir, ours or somebody else's: reading them back returns or raises one line."""

import json
import zipfile

import jax
import numpy as np
import pytest
import recover_cases as cases
import sweep_cases
from fuzz_cases import damaged, edited, fuzz, json_files, json_lines, reads
from hypothesis import strategies as st
from report_cases import SPEED

from vlmprune_jax.checked_files import read_json
from vlmprune_jax.data.cache import ArrayCache
from vlmprune_jax.distributed.journal import Journal
from vlmprune_jax.experiment.spec import EvaluationSetSpec
from vlmprune_jax.prune import PrunePlan, Scores, make_plan
from vlmprune_jax.prune.fingerprint import shape_digest
from vlmprune_jax.recovery.checkpoint import Checkpointer
from vlmprune_jax.recovery.metrics import METRICS_FILE, Recorder
from vlmprune_jax.recovery.step import TrainState
from vlmprune_jax.report.answers import comparison_section
from vlmprune_jax.report.build import tables_of
from vlmprune_jax.report.comparison_plots import series_of, way_of
from vlmprune_jax.report.fit import PLANNED, read_planned
from vlmprune_jax.report.guide import FILE, read_guide, recommend
from vlmprune_jax.report.result import best_run, read_result
from vlmprune_jax.report.samples import read_samples, shown_samples
from vlmprune_jax.report.speed import read_speed, speed_notes, speed_tables, speeds_of
from vlmprune_jax.report.sweep import as_csv, groups_of, read_sweep, table_of
from vlmprune_jax.report.unfinished import read_unfinished
from vlmprune_jax.stages import evaluate, provenance
from vlmprune_jax.stages.ledger import Stage, finished_stages, run_stage, write_text
from vlmprune_jax.stages.sweep_run import Sweep, read_error, read_run

CFG = cases.config()
MADE_FROM = {"tower": {"weights": "a1", "layers": 3}, "dtype": "float32"}


def scores():
    draw, layers = np.random.default_rng(0), CFG.text.layers
    return Scores(
        "l1",
        f"{shape_digest(CFG)}-",
        {"gqa": "groups", "variant": None},
        importance=draw.random(len(layers)),
        heads=tuple(draw.random(layer.kv_heads) for layer in layers),
        mlp=tuple(draw.random(layer.mlp) for layer in layers),
    )


# --- what pruning hands on -------------------------------------------------------------------------------------------


def test_plans(tmp_path):
    path = tmp_path / "plan.json"
    whole = make_plan(scores(), CFG, method="width", ratio=0.1).to_json()

    @fuzz(150, content=json_files(json.loads(whole)))
    def check(content):
        path.write_bytes(content)
        plan = reads(lambda: PrunePlan.from_json(path), path.name)
        if plan is not None:
            for layer in plan.layers:
                assert all(
                    type(index) is int for index in (layer.index, *layer.q_heads, *layer.kv_heads, *layer.neurons)
                )
            assert isinstance(plan.reached, float)
            plan.to_json()

    check()


def score_files(whole, copy):
    """Archives with an array, its header or what describes all of them edited, or damaged as bytes."""
    with zipfile.ZipFile(whole) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    about = json.loads(str(np.load(whole)["meta"]))

    def archived(name, content):
        with zipfile.ZipFile(copy, "w", zipfile.ZIP_DEFLATED) as archive:
            for member in members:
                archive.writestr(member, content if member == name else members[member])
        return copy.read_bytes()

    def saved(name, array):
        np.save(copy.with_suffix(".npy"), array)
        return archived(name, copy.with_suffix(".npy").read_bytes())

    odd = [
        np.zeros(0), np.array(1.0), np.zeros((2, 2)), np.full(2, np.nan), np.full(2, np.inf), np.ones(2, complex),
        np.ones(2, bool), np.array(["a", "b"]), np.arange(2), np.zeros(2, "M8[s]"), np.zeros(2, [("a", "f4")]),
    ]  # fmt: skip
    name = st.sampled_from(sorted(members))
    return st.one_of(
        edited(about).map(lambda value: saved("meta.npy", np.array(json.dumps(value)))),
        st.builds(saved, name, st.sampled_from(odd)),
        name.flatmap(lambda one: damaged(members[one]).map(lambda content: archived(one, content))),
        damaged(whole.read_bytes()),
    )


def test_scores(tmp_path):
    whole, path = tmp_path / "whole.npz", tmp_path / "scores.npz"
    scores().save(whole)

    @fuzz(120, content=score_files(whole, tmp_path / "edited.npz"))
    def check(content):
        path.write_bytes(content)
        found = reads(lambda: Scores.load(path), path.name)
        if found is not None:  # of other widths, perhaps: planning says so
            reads(lambda: (found.name, make_plan(found, CFG, method="width", ratio=0.1)))

    check()


# --- results ---------------------------------------------------------------------------------------------------------


def result():
    """Of one set and two models, as `vlmprune run` writes it."""
    metric = {"name": "exact_match", "main": "accuracy", "unit": "%", "scale": 100.0, "full": 1.0}
    sets = {"questions": {**metric, "higher_is_better": True, "grouped_by": "answer", "questions": 10}}
    groups = {"questions": {"yes": {"questions": 6, "accuracy": 0.5}, "no": {"questions": 4, "accuracy": 0.0}}}
    evaluation = {"scores": {"questions": {"accuracy": 0.5}}, "groups": groups}
    version_1 = {"accuracy": 0.5, "questions": 10, "by_answer": groups["questions"]}
    run = {
        "name": "depth", "method": "depth", "criterion": "block_influence", "ratio_asked": 0.2, "ratio_reached": 0.21,
        "decoder_ratio": 0.25, "parameters": 900, "removed_layers": [1, 2], "plan": "plan.json",
        "scores": ["scores.npz"], "recovery": "none", "data_fraction": 0.0, "seconds": 1.5, **version_1,
        "retained": 100.0, "evaluation_seconds": 0.5, "path": "pruned",
        "evaluation": {
            **evaluation, "retained": {"questions": 100.0}, "mean_of_ratios": 100.0, "paper_average": 100.0,
        },
    }  # fmt: skip
    trained = {
        "name": "depth-lora", "recovery": "lora", "data_fraction": 0.05, "training_records": 5, "training_steps": 3,
        "metrics": "training/metrics.jsonl", "loss_terms": {"ce": "cross-entropy"}, "path": "recovered",
    }  # fmt: skip
    return {
        "version": 2,
        "sets": sets,
        "teacher": {**version_1, "parameters": 1000, "evaluation": evaluation},
        "runs": [run, {**run, **trained}],
        "best": "depth-lora",
        "export": {"path": "export", "max_abs_logit_difference": 1e-5},
    }


def test_results(tmp_path):
    path = tmp_path / "result.json"

    def shown():
        found = read_result(tmp_path)
        return tables_of(found), best_run(found["runs"], found["sets"])["path"]

    path.write_text(json.dumps(result()))
    assert shown()[1] == "pruned"

    @fuzz(150, content=json_files(result()))
    def check(content):
        path.write_bytes(content)
        reads(shown, path.name)

    check()


STEP = {
    "topology": "v5e:8x8", "chips": 64, "mesh": {"data": 64, "fsdp": 1, "tensor": 1}, "batch_size": 64,
    "student": {"layers": 4, "parameters": 900}, "teacher": {"layers": 6, "parameters": 1000}, "accumulation": 1,
    "remat": "dots", "tokens_per_row": 512, "images_per_row": 1, "tokens_buckets": [256, 512], "images_buckets": [1],
    "feature_cache": False, "teacher_top_k": 0, "hbm": {"arguments": 10**9, "temporaries": 10**9, "free": 10**10},
    "flops": dict.fromkeys(("executed", "model", "student", "teacher", "attention", "vision"), 1e15),
    "received": {"all-gather": 1e9}, "mfu": 0.4, "tokens_per_second": 1e5, "steps": 100, "hours": 1.5,
    "seconds": dict.fromkeys(("step", "compute", "memory", "interconnect"), 0.5), "chip_hours": 96.0,
    "compile_seconds": 40.0,
}  # fmt: skip


def test_sweeps(tmp_path):
    path = tmp_path / "sweep.json"
    whole = sweep_cases.write_sweep(tmp_path, ("docs", "wiki"), runs=sweep_cases.some_runs(seeds=(1,))[:3])

    def shown():
        found = read_sweep(tmp_path)
        groups = groups_of(found)
        return table_of(found), as_csv(found), series_of(groups), [way_of(group) for group in groups]

    assert len(shown()[0][1]) == 4

    @fuzz(150, content=json_files(whole))
    def check(content):
        path.write_bytes(content)
        reads(shown, path.name)

    check()


def test_runs_of_sweeps(tmp_path):
    """A damaged file counts as a run that is not done."""
    runs = sweep_cases.some_runs(seeds=(1,))[:2]
    sweep_cases.write_sweep(tmp_path, runs=runs)
    sweep = Sweep(tmp_path, "c.py", overwrite=False)
    paths = [sweep.folder(runs[0]) / name for name in ("run.json", "error.json")]
    whole = [json.loads(paths[0].read_text()), {"error": "no"}]

    @fuzz(100, run=json_files(whole[0]), error=json_files(whole[1]))
    def check(run, error):
        paths[0].write_bytes(run)
        paths[1].write_bytes(error)
        found = read_run(runs[0], sweep)
        assert found is None or all({"digest", "path", "evaluation"} <= set(one) for one in found["models"])
        error = read_error(runs[0], sweep)
        assert error is None or isinstance(error, str)

    check()


def test_tpu_plans(tmp_path):
    path = tmp_path / PLANNED
    whole = {"depth": {**STEP, "search": {"batch": STEP}}, "width": {"problem": "too large"}}
    path.write_text(json.dumps(whole))
    assert len(read_planned(tmp_path)) == 2

    @fuzz(80, content=json_files(whole))
    def check(content):
        path.write_bytes(content)
        reads(lambda: read_planned(tmp_path), path.name)

    check()


def test_guides(tmp_path):
    """A guide with rows of one's own, or one that somebody hands on."""
    path = tmp_path / "guide.json"
    path.write_bytes(FILE.read_bytes())
    whole = read_json(path)
    cfg = cases.config()

    def advised():
        guide = read_guide(path)
        return [
            recommend(cfg, ratio=ratio, data_fraction=0.05, compute=compute, speed=True, guide=guide)
            for ratio in (0.1, 0.3, 0.6)
            for compute in ("none", "full")
        ]

    assert len(advised()) == 6

    @fuzz(100, content=json_files(whole))
    def check(content):
        path.write_bytes(content)
        reads(advised, path.name)

    check()


def test_answers(tmp_path):
    turns = [{"from": "human", "value": "A dog?"}, {"from": "gpt", "value": "yes"}]
    records, path = tmp_path / "records.json", tmp_path / "pruned.answers.jsonl"
    records.write_text(json.dumps([{"id": f"r{number}", "conversations": turns} for number in range(3)]))
    answer = {"id": "r0", "prediction": "yes", "references": ["yes"], "tokens": 1}
    of, facts = EvaluationSetSpec(data=str(records), metric="exact_match"), {"questions": 3, "parameters": 900}

    def measured():
        return evaluate._measure(of, path, None, tmp_path / "pruned.json", facts)["values"]["accuracy"]

    lines = [{**answer, "id": f"r{number}"} for number in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured() == 1.0

    @fuzz(60, content=json_lines(lines))
    def check(content):
        path.write_bytes(content)
        reads(measured, path.name)

    check()


EVALUATED = {
    "metric": {
        "name": "exact_match", "main": "accuracy", "unit": "%", "scale": 100.0, "full": 1.0, "higher_is_better": True,
        "grouped_by": "answer",
    },
    "values": {"accuracy": 0.5}, "groups": {"yes": {"questions": 2, "accuracy": 0.5}}, "parameters": 900,
    "seconds": 1.5, "questions": 2, "retained_interval": [90.0, 99.5], "scores": {"accuracy": [1.0, 0.0]},
}  # fmt: skip


def test_evaluations_of_an_unfinished_run(tmp_path):
    """What was found of the unpruned model, compared with a good evaluation of a pruned one."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "pruned").mkdir()
    make_plan(scores(), CFG, method="width", ratio=0.1).to_json(tmp_path / "plan.json")
    path = tmp_path / "eval/teacher.json"
    (tmp_path / "eval/pruned.json").write_text(json.dumps(EVALUATED))

    def compared():
        found = read_unfinished(tmp_path)
        return [tables_of(found) if found["teacher"] else [], *comparison_section(tmp_path, found)]

    path.write_text(json.dumps(EVALUATED))
    assert len(compared()) == 2

    @fuzz(100, content=json_files(EVALUATED))
    def check(content):
        path.write_bytes(content)
        reads(compared, path.name)

    check()


def test_speed(tmp_path):
    path = tmp_path / "speed.json"

    def shown():
        measured = read_speed(tmp_path)
        return speed_tables(measured), speed_notes(measured), speeds_of(measured)

    path.write_text(json.dumps(SPEED))
    assert len(shown()) == 3

    @fuzz(100, content=json_files(SPEED))
    def check(content):
        path.write_bytes(content)
        reads(shown, path.name)

    check()


def test_samples(tmp_path):
    """What passes shows no picture of another kind or from elsewhere."""
    path = tmp_path / "eval/samples.json"
    path.parent.mkdir()
    image = {"uri": "data:image/png;base64,aGFsbG8=", "width": 64, "height": 64}
    answers = [{"model": "unpruned", "said": "yes", "score": 1.0}, {"model": "depth", "said": "no", "score": None}]
    asked = {"id": "r0", "question": "A dog?", "references": ["yes"], "images": [image, {"problem": "damaged"}]}
    sample = {"kind": "broken", **asked, "answers": answers}
    whole = {"version": 1, "sets": {"questions": {"questions": 2, "counts": {"broken": 1}, "samples": [sample]}}}

    def pictures():
        parts = [part for of in read_samples(tmp_path).values() for _, part in shown_samples(of)]
        return [image["uri"] for part in parts for one in part for image in one["images"] if "uri" in image]

    path.write_text(json.dumps(whole))
    assert pictures() == [image["uri"]]

    @fuzz(150, content=json_files(whole))
    def check(content):
        path.write_bytes(content)
        found = reads(pictures, path.name)
        assert all(uri.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for uri in found or ())

    check()


# --- what lets a stage be skipped or continued -----------------------------------------------------------------------


def test_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_commit", lambda: None)  # which asks git
    out = tmp_path / "out.txt"
    (tmp_path / "in.txt").write_text("input")
    stage = Stage("score", 1, tmp_path, {"ratio": 0.3}, {"data.train": tmp_path / "in.txt"}, [out])

    def body():
        write_text(out, "made")
        return {"number": 1, "seconds": 2.0}

    def run(overwrite=False):
        return run_stage(stage, body, overwrite=overwrite, say=lambda text: None)

    run()
    whole = json.loads(stage.record.read_text())

    @fuzz(60, content=json_files(whole))
    def check(content):
        stage.record.write_bytes(content)
        reads(run, out.name, stage.record.name)
        reads(lambda: run(overwrite=True), out.name, stage.record.name)
        stage.record.write_bytes(content)
        provenance.provenance_section(finished_stages(tmp_path))  # of a damaged record nothing is told

    check()


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

    check()


def test_journals(tmp_path):
    path = tmp_path / "scores.npz.journal"
    lines = [MADE_FROM, [0.5, [1, 2]], [0.25, [3]]]

    @fuzz(60, content=json_lines(lines))
    def check(content):
        path.write_bytes(content)
        journal = reads(lambda: Journal(path, MADE_FROM), path.name)
        if journal is not None:
            assert isinstance(journal.entries, list)

    check()


def test_array_caches(tmp_path):
    folder = tmp_path / "cache"

    def filled():
        cache = ArrayCache(folder, MADE_FROM)
        cache.add({f"k{number}": np.full((2, 3), number, np.float32) for number in range(3)})
        cache.publish()

    filled()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(files) == 2

    def damage(name):
        content = files[name]
        changed = json_files(json.loads(content)) if name.endswith(".json") else damaged(content)
        return changed.map(lambda content: (name, content))

    def read():
        cache = ArrayCache(folder, MADE_FROM)
        return [cache[f"k{number}"] for number in range(3)]

    @fuzz(60, change=st.sampled_from(sorted(files)).flatmap(damage))
    def check(change):
        for name, content in files.items():
            (folder / name).write_bytes(content if name != change[0] else change[1])
        reads(read, folder.name)

    check()


@pytest.fixture
def checkpoints(tmp_path):
    """A folder with one checkpoint, and the state to restore."""
    weights = {"weight": jax.numpy.arange(6.0).reshape(2, 3)}
    state = TrainState(weights, (), jax.numpy.int32(1), jax.numpy.zeros(2, jax.numpy.uint32))
    with Checkpointer(tmp_path / "checkpoints", MADE_FROM, 2) as saver:
        saver.save(1, state, {"at": 5})
    return tmp_path / "checkpoints", state


def test_recovery_checkpoints(checkpoints):
    folder, state = checkpoints
    path = folder / "1/meta/metadata"

    def restore():
        with Checkpointer(folder, MADE_FROM, 2) as saver:
            return saver.restore(state)

    assert restore()[1] == {"at": 5}

    @fuzz(30, content=json_files(json.loads(path.read_text())))
    def check(content):
        path.write_bytes(content)
        reads(restore, folder.name)

    check()
