"""Whole runs from the command line: interrupted, resumed, skipped, refused, and of images of any size."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from experiment_cases import record, write_experiment
from hf_cases import random_ids

import vlmprune_jax as vp
from vlmprune_jax.base.console import make_reporter
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.recovery.metrics import Recorder
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.evaluation.metrics import METRICS, Metric
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.stages import pipeline
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.artefact import read_artefact
from vlmprune_jax.run.workdir.evaluation import Evaluated
from vlmprune_jax.run.workdir.result import Workload, read_result
from vlmprune_jax.run.workdir.samples import SAMPLES, Samples
from vlmprune_jax.run.workdir.speed import SPEED, Speed


@pytest.fixture
def experiment(tmp_path, goldens):
    records = [
        record(f"r{i}", f"img{i % 4}.png", f"Is {'a dog' if i % 2 else 'one'} here?", "yes" if i % 3 else "no")
        for i in range(10)
    ]
    recover = {"trainable": "projector", "batch_size": 2, "steps": 4, "save_every": 1, "log_every": 1}
    config = write_experiment(
        tmp_path, goldens, records, data={"eval": f"{tmp_path}/records.json", "fraction": 0.5},
        score={"samples": 4, "batch_size": 2}, prune={"ratio": 0.2}, export={"dtype": "float32"},
        evaluate={"batch_size": 4, "max_new_tokens": 2}, recover={**recover, "losses": {"ce": 0.5, "l2": 0.5}},
        reconstruct={"samples": 4}, speed={"rounds": 1, "prompt_tokens": 24, "new_tokens": 8},
        prune_variants={
            "depth": {"prune": {"method": "depth"}},
            "width": {"prune": {"method": "width"}, "reconstruct": {"method": "least_squares"}},
        },
        recover_variants={"sft_l2": {}},
    )  # fmt: skip
    return [config, f"--workdir={tmp_path / 'w'}"]


@pytest.mark.slow
def test_whole_run(capsys, monkeypatch, tmp_path, experiment):
    workdir = tmp_path / "w"
    record = Recorder.step

    def killed(self, step, *args):
        if step == 3:
            raise KeyboardInterrupt
        record(self, step, *args)

    monkeypatch.setattr(Recorder, "step", killed)
    assert main(["run", *experiment]) == 130
    assert not (workdir / "depth/sft_l2/recovered").exists()
    assert not (workdir / "result.json").exists()
    monkeypatch.undo()
    assert main(["run", *experiment]) == 0
    out = capsys.readouterr().out
    assert "depth/prune: unchanged, skipped" in out
    assert "Loading weights" not in out
    facts = json.loads((workdir / ".stages/depth.sft_l2.recover.json").read_text())["facts"]
    assert facts["resumed_from"] == 2
    assert facts["steps"] == 4

    result = read_result(workdir)
    assert result.sets["questions"].size == "10 questions"
    assert [run.name for run in result.runs] == [
        "depth", "depth-sft_l2", "width", "width-reconstructed", "width-sft_l2"
    ]  # fmt: skip
    (control,) = result.controls
    assert (control.name, control.path) == ("control-sft_l2", "control/sft_l2/recovered")
    assert (control.label, control.training_steps, control.data_fraction) == ("unpruned, SFT + L2", 4, 0.5)
    assert {run.name for run in result.runs if run.evaluation.control} == {"depth-sft_l2", "width-sft_l2"}
    for run in result.runs:
        if run.evaluation.control is not None:
            assert run.evaluation.control.scores == control.evaluation.scores
    folders = (tmp_path / "teacher", workdir / control.path)
    unpruned, trained = (vp.load(folder).params["projector"] for folder in folders)
    assert not all(map(np.array_equal, jax.tree.leaves(unpruned), jax.tree.leaves(trained)))
    for run in result.runs:
        assert sum(x.size for x in jax.tree.leaves(vp.load(workdir / run.path).params)) == run.parameters
        assert run.actual_ratio == pytest.approx(1 - run.parameters / result.teacher.parameters)
    assert [run.recovery for run in result.runs] == ["none", "sft_l2", "none", "reconstructed", "sft_l2"]
    assert [run.data_fraction for run in result.runs] == [0.0, 0.5, 0.0, 0.0, 0.5]
    assert result.export.max_abs_logit_difference <= 1e-4
    best = result.best_run
    card = (workdir / "export/README.md").read_text()
    assert "Made from `teacher` by" in card
    assert ("trained after pruning" in card) == (best.recovery == "sft_l2")
    retained, accuracy = (
        best.evaluation.retained["questions"],
        result.teacher.evaluation.scores["questions"]["accuracy"],
    )
    assert f"| questions (exact_match): accuracy in %, 10 questions | {100 * accuracy:.2f} |" in card
    assert ("" if retained is None else f" {retained:.2f} |") in card
    ids = np.array([[1, 5, 9, 12]])
    exported, chosen = (np.asarray(vp.forward(vp.load(f), ids)[0]) for f in (workdir / "export", workdir / best.path))
    np.testing.assert_array_equal(exported, chosen)
    answers = [json.loads(line) for line in (workdir / "eval/teacher.answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [f"r{i}" for i in range(10)]

    # What the report needs beside: costs and speed of every model, sample questions, and who made it.
    assert result.workload == Workload(length=24, images=1, dtype="float32")
    for model in (result.teacher, *result.runs):
        assert min(model.speed.prefill, model.speed.decode, model.speed.first_token) > 0
        assert model.costs.file_bytes == 4 * model.parameters
    assert [pair.models for pair in read_artefact(workdir / SPEED, Speed).pairs] == [
        ["depth", "depth-sft_l2"], ["width", "width-reconstructed", "width-sft_l2"]
    ]  # fmt: skip
    chosen = read_artefact(workdir / SAMPLES, Samples).sets["questions"]
    assert sum(chosen.counts.values()) == chosen.questions == 10
    sample = chosen.samples[0]
    assert [answer.model for answer in sample.answers] == ["unpruned", *(run.name for run in result.runs)]
    assert sample.images[0].uri.startswith("data:image/")
    made = json.loads((workdir / ".stages/depth.prune.json").read_text())["by"]
    assert made["versions"]["jax"]
    assert "Questions and what every model answers" in (workdir / "report.html").read_text()

    # Again: nothing is done. With other settings: refused, and nothing is touched.
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("model.safetensors")}
    assert main(["run", *experiment]) == 0
    out = capsys.readouterr().out
    assert out.count("unchanged, skipped") == 18
    assert "..." not in out
    assert main(["run", *experiment, "--config.prune.ratio=0.25"]) == 2
    line = capsys.readouterr().err
    assert "depth/prune: " in line
    assert "(prune.ratio was 0.2, now 0.25): add --overwrite" in line
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("model.safetensors")} == before

    # Another metric: nothing is asked, and the export is made again unasked, for its card tells the scores.
    assert main(["run", *experiment, "--config.evaluate.metric=gqa"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.endswith(" ...")] == ["export ..."]
    assert "| questions (gqa): accuracy in %, 10 questions |" in (workdir / "export/README.md").read_text()


CACHES = (
    "--config.recover.losses={{'kl': 0.5, 'l2': 0.0, 'teacher_inputs': 'own'}}",
    "--config.recover.teacher_cache={root}/teacher",
    "--config.recover.teacher_top_k=8",
    "--config.data.feature_cache={root}/features",
    "--config.data.max_length=160",
)
VOCABULARY = (
    "--config.prune.vocabulary.size=400",
    "--config.prune.vocabulary.sources=('{root}/records.json',)",
    "--config.prune.vocabulary.multiple=8",
)
REPAIR = ("--config.prune.stack=both", "--config.reconstruct.method=least_squares", "--config.reconstruct.samples=8")
RUNS = {
    "qwen3_vl": ("qwen3_vl", ()),
    "qwen2_5_vl": ("qwen2_5_vl", ()),
    "gemma3, caches and vocabulary": ("gemma3", (*CACHES, *VOCABULARY)),
    "gemma4, tower and vocabulary, repaired": ("gemma4", (*VOCABULARY, *REPAIR, "--config.data.max_length=160")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_images_of_any_size(goldens, tmp_path, torch_outputs, name):
    """Qwen-VL and Gemma from folder to folder: scored, pruned, recovered, evaluated, exported, read by transformers."""
    family, flags = RUNS[name]
    golden = goldens / "families" / family
    records = [
        record(f"r{n}", None if n == 3 else f"{n % 4}.png", f"What is in picture {n}?", "a box" if n % 3 else "a dog")
        for n in range(8)
    ]
    config = write_experiment(
        tmp_path, goldens, records, golden / "ckpt",
        data={"eval": f"{tmp_path}/records.json", "images": f"{golden}/images", "system": None, "max_length": 128},
        score={"samples": 4, "batch_size": 2}, prune={"method": "hybrid", "ratio": 0.15, "heads": "keep"},
        evaluate={"batch_size": 4, "max_new_tokens": 2}, export={"dtype": "float32"},
        recover={
            "batch_size": 2, "steps": 3, "log_every": 1, "lora": {"rank": 2}, "losses": {"kl": 0.5, "l2": 0.5}
        },
        speed={"rounds": 1, "prompt_tokens": 700, "new_tokens": 2},
    )  # fmt: skip
    assert main(["run", config, f"--workdir={tmp_path / 'w'}", *[flag.format(root=tmp_path) for flag in flags]]) == 0
    result = read_result(tmp_path / "w")
    assert result.sets["questions"].count == 8
    assert len(result.runs) == 2 + ("repaired" in name)
    assert result.export.max_abs_logit_difference <= 1e-4
    model = vp.load(tmp_path / "w/export")
    assert (model.cfg.text.vocab_size == 400) == ("vocabulary" in name)
    if "caches" in name:  # its logits have the ids of the kept tokens
        assert "prune.vocabulary" in json.loads((tmp_path / "teacher/cache.json").read_text())
    assert len(model.cfg.text.layers) < len(vp.load(golden / "ckpt").cfg.text.layers)
    inputs = random_ids(model) if family.startswith("qwen") else {"input_ids": np.arange(9, 49)[None]}
    found = torch_outputs(tmp_path / "w/export", inputs, class_name="AutoModelForImageTextToText", version="5")
    np.testing.assert_allclose(found["logits"], vp.forward(model, **inputs)[0], atol=1e-4, rtol=0)


# What a clock says differs between two runs, and so do the page that shows it and TensorBoard's file.
CLOCK = re.compile(rb'"(?:[a-z_]*seconds|[a-z_]*_per_second|finished)": [^,}\n]+')


@pytest.mark.slow
def test_files_do_not_depend_on_what_ran_before(monkeypatch, tmp_path, experiment):
    """Repeating a finished command changes no byte; a run that was killed after its control ends with equal files."""
    monkeypatch.setitem(METRICS, "letters", Metric("letters", lambda said, *_: {"letters": 1.0 + len(said)}))
    command = ["run", *experiment, "--only=depth", "--config.speed.rounds=0", "--config.evaluate.metric=letters"]
    workdir, evaluate_model = tmp_path / "w", pipeline.evaluate_model

    def files():
        return {str(path.relative_to(workdir)): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}

    def timeless():
        untimed = {name: of for name, of in files().items() if name != "report.html" and "tensorboard" not in name}
        return {name: CLOCK.sub(b"", of) if "json" in name else of for name, of in untimed.items()}

    def killed(work, start, subject):
        evaluations = evaluate_model(work, start, subject)
        if not work.record.pruned:
            raise KeyboardInterrupt
        return evaluations

    assert main(command) == 0
    assert read_artefact(workdir / "depth/sft_l2/eval/recovered.json", Evaluated).control_interval is not None
    first, expected = files(), timeless()
    assert main(command) == 0
    assert files() == first
    shutil.rmtree(workdir)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "evaluate_model", killed)
        assert main(command) == 130
    assert (workdir / "control/sft_l2/eval/recovered.json").exists()
    assert main(command) == 0
    assert timeless() == expected
    assert {"plan.json", "README.md", "model.safetensors"} <= {path.name for path in (workdir / "export").iterdir()}


def test_a_control_is_trained_once_for_each_recovery(tmp_path):
    """Equal recoveries of two prune variants share it; another number of epochs, or no labels, do not."""

    def controls(**changes):
        experiment = override(Experiment(), {"model": {"hf_dir": "teacher"}, **changes})
        steps = Work.at(tmp_path, experiment, make_reporter(False)).steps
        found = [step.record for step in steps]
        assert not any(step.compared_with for step in found if step.stage != "recover")
        trained = [step.path for step in found if not step.pruned]
        return trained, [step.compared_with for step in found if step.compared_with]

    assert controls() == (["control/recovered"], ["control/recovered"])
    assert controls(recover={"control": False}) == ([], [])
    assert controls(recover={"losses": {"ce": 0.0, "kl": 1.0}}) == ([], [])
    two, longer = {"depth": {}, "width": {"prune": {"method": "width"}}}, {"recover": {"epochs": 2.0}}
    variants = {"sft": {}, "kl": {"recover": {"losses": {"ce": 0.0, "kl": 1.0}}}}
    shared = "control/sft/recovered"
    assert controls(prune_variants=two, recover_variants=variants) == ([shared], [shared] * 2)
    two["width"] |= longer
    own = "width/control/sft/recovered"
    assert controls(prune_variants=two, recover_variants=variants) == ([shared, own], [shared, own])


def test_an_unpruned_model_is_trained_or_only_evaluated(tmp_path):
    def steps(**changes):
        settings = {"model": {"hf_dir": "teacher"}, "prune": {"method": "none", "ratio": 0.3}, **changes}
        return Work.at(tmp_path, override(Experiment(), settings), make_reporter(False)).steps

    (trained,) = [step.record for step in steps(reconstruct={"method": "least_squares"})]
    assert (trained.stage, trained.name) == ("recover", "unpruned-recovered")
    assert not trained.pruned
    assert not trained.control
    assert trained.compared_with == ""
    assert steps(recover={"method": "none"}) == []


def test_a_quiet_reporter_says_nothing(capsys):
    quiet = dataclasses.replace(make_reporter(False), enabled=False)
    quiet.say("x")
    quiet.table("t", ["a"], [["b"]])
    with quiet.bar("x", 1) as progress:
        progress(1)
    assert capsys.readouterr().out == ""
