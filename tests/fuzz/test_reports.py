"""Damaged files of results: what tables, pages and recommendations are made of, read back or refused in one line."""

import json

import recover_cases as cases
import sweep_cases
from fuzz_cases import fuzz, json_files, json_lines, reads, scores_of
from report_cases import BENCH, SPEED

from vlmprune_jax.core.files import read_json
from vlmprune_jax.experiment.spec import EvaluationSetSpec
from vlmprune_jax.prune import make_plan
from vlmprune_jax.report.answers import comparison_section
from vlmprune_jax.report.build import tables_of
from vlmprune_jax.report.comparison_plots import series_of, way_of
from vlmprune_jax.report.fit import PLANNED, read_planned
from vlmprune_jax.report.guide import FILE, read_guide, recommend
from vlmprune_jax.report.result import best_run, read_result
from vlmprune_jax.report.samples import read_samples, shown_samples
from vlmprune_jax.report.speed import (
    bench_notes,
    bench_tables,
    read_bench,
    read_speed,
    speed_notes,
    speed_tables,
    speeds_of,
)
from vlmprune_jax.report.sweep import as_csv, groups_of, read_sweep, table_of
from vlmprune_jax.report.unfinished import read_unfinished
from vlmprune_jax.stages import evaluate
from vlmprune_jax.sweep.run import Sweep, read_error, read_run

CFG = cases.config()


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
    make_plan(scores_of(CFG), CFG, method="width", ratio=0.1).to_json(tmp_path / "plan.json")
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


def test_bench(tmp_path):
    path = tmp_path / "bench.json"

    def shown():
        measured = read_bench(path)
        return bench_tables(measured), bench_notes(measured)

    path.write_text(json.dumps(BENCH))
    assert len(shown()) == 2

    @fuzz(100, content=json_files(BENCH))
    def check(content):
        path.write_bytes(content)
        reads(shown, path.name)

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
