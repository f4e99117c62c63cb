"""What a run reports, to which loggers, MFU by the published formula; and what recovery refuses."""

import dataclasses
import functools
import importlib.util
import json
import shutil
import sys
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases
from experiment_cases import record, write_experiment
from hf_cases import edit_weights
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.base import chips, console
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.params import param_axes, param_shapes
from vlmprune_jax.core.recovery import metrics
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.flops import step_flops
from vlmprune_jax.core.recovery.loop import recover
from vlmprune_jax.core.recovery.metrics import Recorder
from vlmprune_jax.core.recovery.terms import check_losses, terms_of
from vlmprune_jax.core.recovery.trainable import add_lora, assign_groups
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.run.cli.main import main

CFG = cases.config(layers=1)
LOSSES = LossConfig(0.5, 0.5, 0.1, 0.1, cosine=0.2)


def test_metrics_of_a_run(tmp_path, monkeypatch):
    """Their names in both files, and that the numbers belong together."""
    monkeypatch.setitem(chips.GPU_FLOPS, jax.devices()[0].device_kind, 1e9)
    config = cases.settings(
        trainable="lora", lora=cases.LORA, losses=LOSSES, steps=3, projector_learning_rate=5e-4, warmup_ratio=0.5
    )
    teacher, data = cases.model(CFG, 9), cases.Stream(CFG)
    _, summary = recover(cases.model(CFG), data, config, teacher=teacher, workdir=tmp_path, progress=False)
    lines = cases.metrics_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    names = {"loss", *terms_of(LOSSES, reported=True), "grad_norm", "learning_rate", "projector_learning_rate"}
    names |= {"tokens_per_second", "model_flops_per_second", "mfu", "seconds", "data_seconds", "padding", "empty_rows"}
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    assert all(name.encode() in written for name in names)
    adapted = add_lora(cases.model(CFG), cases.LORA, jax.random.key(0)).cfg
    trained = [path for path in param_axes(adapted) if path.startswith("projector/") or "lora" in path]
    flops = step_flops(adapted, CFG, LOSSES, trained, rows=8, length=11, images=8).total
    for line in lines:
        assert names | {"step"} == line.keys()
        assert line["learning_rate"] * 5e-4 == pytest.approx(line["projector_learning_rate"] * 3e-3)
        assert line["model_flops_per_second"] * line["seconds"] == pytest.approx(flops)
        assert line["mfu"] == pytest.approx(line["model_flops_per_second"] / 1e9)
        total = sum(weight * line[name] for name, weight in LOSSES.weights().items())
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        data.set_state({"at": line["step"] - 1})
        valid = next(data).arrays["attention_mask"]
        assert line["padding"] == pytest.approx(1 - valid.mean())
        assert line["tokens_per_second"] * line["seconds"] == pytest.approx(np.sum(valid))
    assert lines[1]["projector_learning_rate"] == pytest.approx(2.5e-4)  # half of two warm-up steps
    assert {"tokens_per_second", "model_flops_per_second", "mfu"} <= summary.keys()


STEP = {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3}


def test_speeds_are_of_single_steps_and_in_all_of_those_after_the_first(monkeypatch, capsys):
    """The first one compiles. Without a terminal each step is a line here, else it is one a minute."""
    monkeypatch.setattr(console, "PAUSE_SECONDS", 0.0)
    ticks = iter([0.0, 10.0, 12.0, 16.0, 16.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    seen = []
    with Recorder(None, 0, 3, 1, True, jax.devices()) as recorder:
        for step, (tokens, flops) in enumerate(((100.0, 1000), (50.0, 600), (70.0, 900)), start=1):
            recorder.step(step, {**STEP, "tokens": tokens}, (), 0.1, (), flops)
            seen.append([recorder.last[name] for name in ("seconds", "tokens_per_second", "model_flops_per_second")])
        summary = recorder.summary()
    shown = [f"{step} of 3, loss 2.0000, lr 1.0e-03, {speed} tok/s" for step, speed in ((1, 10), (2, 25), (3, 18))]
    assert capsys.readouterr().out.splitlines() == [f"  train step: {line}" for line in shown]
    assert "mfu" not in recorder.last  # a CPU has no published peak
    peaks = {"TPU v5 lite": 197e12, "NVIDIA H100 80GB HBM3": 989.5e12, "cpu": None}
    assert {device: chips.peak_flops(device) for device in peaks} == peaks
    assert seen == [[10, 10, 100], [2, 25, 300], [4, 17.5, 225]]
    assert (summary["seconds"], summary["tokens"]) == (16, 220)
    assert (summary["tokens_per_second"], summary["model_flops_per_second"]) == (20, 250)


def test_lines_are_there_at_once_and_the_last_step_has_one(tmp_path):
    """A process that is killed leaves what it measured; a line that was cut off is dropped when the run goes on."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2, "loss": 3.0}\n{"step": 3, "loss": 3.0}\n{"step": 4, "lo')
    with Recorder(tmp_path, 2, 5, 2, False, jax.devices()) as recorder:
        for step, expected in ((3, [2]), (4, [2, 4]), (5, [2, 4, 5])):
            recorder.step(step, {**STEP, "tokens": 1.0}, (), 0.1, (), 1)
            assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == expected


def test_what_is_not_finite_is_told_with_its_records(tmp_path):
    """Some of them in the message, all in a file; rows that were skipped in that step are listed before it stops."""
    names = [f"r{number}" for number in range(18)]
    values = {**STEP, "grad_norm": float("inf"), "tokens": 1.0}
    told = (
        r"step 3: loss 2.0 or gradient norm inf is not finite; records r0, .*r15 and 2 more \(all in .*finite-0.json\)"
    )
    with Recorder(tmp_path, 2, 5, 1, False, jax.devices()) as recorder:
        refused(f"{told}; last checkpoint: step 2", recorder.step, 3, values, (*names, ""), 0.1, [("lost", "why")], 1)
    assert json.loads((tmp_path / "nonfinite-0.json").read_text())["records"] == names
    assert json.loads((tmp_path / "skipped-0.jsonl").read_text())["record"] == "lost"


def test_the_list_of_skipped_records_goes_on(tmp_path):
    metrics = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 5.0}

    def run(first, last):
        with Recorder(tmp_path, first, 9, 1, False, jax.devices()) as recorder:
            for step in range(first + 1, last + 1):
                recorder.step(step, metrics, ["r"], 0.0, [(f"lost {step}", "why")] if step % 2 else [], 1)
            return recorder.summary()["skipped_rows"]

    assert run(0, 5) == 3
    assert run(2, 9) == 5  # steps 3 to 5 are repeated
    lines = [json.loads(line) for line in (tmp_path / "skipped-0.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "record": f"lost {step}", "reason": "why"} for step in (1, 3, 5, 7, 9)]


@pytest.mark.parametrize("first", [KeyError, None])
def test_what_failed_first_is_told(tmp_path, monkeypatch, first):
    """On a full disk closing the files fails as well, which is told where nothing else failed."""

    def full():
        raise OSError("No space left on device")

    def run():
        with Recorder(tmp_path, 0, 5, 1, False, jax.devices()) as recorder:
            monkeypatch.setattr(recorder._loggers[0], "close", full)
            if first is not None:
                raise first

    with pytest.raises(first or OSError):
        run()


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_metrics_go_to_the_loggers(package, monkeypatch, tmp_path):
    """A module in the place of the package notes what it is asked for, if the package is not installed."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    asked, installed, folder = mock.Mock(), importlib.util.find_spec(package), tmp_path / "run/training"
    if not installed:
        monkeypatch.setitem(sys.modules, package, asked)
    config = cases.settings(trainable="projector", steps=2, loggers=("tensorboard", package))
    recover(cases.model(CFG), cases.Stream(CFG), config, workdir=folder, progress=False)
    assert (folder / "tensorboard").is_dir()
    if installed:
        assert [*(folder / "wandb").glob("offline-run-*/*.wandb")] or [*(tmp_path / "trackio").rglob("*.db")]
        return
    (_, _, start), *steps, end = asked.mock_calls
    assert (start["project"], start["name"][:4], start["resume"]) == ("vlmprune", "run-", "allow")
    lines = [{**line} for line in cases.metrics_of(folder)]
    assert steps == [mock.call.log(line, step=line.pop("step")) for line in lines]
    assert (asked.mock_calls[0][0], end) == ("init", mock.call.finish())


def test_a_package_that_is_missing_or_does_not_start(monkeypatch, tmp_path):
    config = cases.settings(trainable="projector", steps=2, loggers=("wandb",))
    train = functools.partial(recover, cases.model(CFG), cases.Stream(CFG), config, workdir=tmp_path, progress=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(r"recover\.loggers: wandb is not installed: pip install 'vlmprune-jax\[wandb\]'", train)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: 1 / 0))
    refused(r"recover\.loggers: wandb cannot start \(division by zero\): set it up, or", train)


# --- what is refused: settings, losses, terms, rules and adapters that cannot be, and input that does not fit ---------


DECODER = cases.config(vision=False)  # which has no projector
INF, NAN = float("inf"), float("nan")


settings = cases.settings


def losses(**changes):
    check_losses(LossConfig(**changes))


def term(**values):
    vp.LossTerm(**{"value": jnp.sum, "needs": ("logits",), "counts": "positions", **values})


def rules(trainable, cfg=CFG):
    assign_groups(list(param_shapes(cfg)), trainable)


@pytest.mark.parametrize(
    ("call", "values", "fact"),
    [
        (settings, {"learning_rate": 0.0}, "recover.learning_rate=0.0 must be above 0"),
        (settings, {"projector_learning_rate": -1.0}, "recover.projector_learning_rate=-1.0 must be above 0"),
        (settings, {"schedule": "cosin"}, "is not one of cosine, linear, constant; did you mean 'cosine'"),
        (settings, {"warmup_ratio": 1.0}, "warmup_ratio=1.0 must be at least 0 and below 1"),
        (settings, {"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0"),
        (settings, {"b2": 1.0}, "b2=1.0 must be at least 0 and below 1"),
        (settings, {"clip_norm": 0.0}, "clip_norm=0.0 must be above 0"),
        (settings, {"batch_size": 0}, "recover.batch_size=0 must be at least 1"),
        (settings, {"batch_size": 6, "accumulation": 4}, "multiple of recover.accumulation=4"),
        (settings, {"steps": 0}, "steps=0 must be at least 1"),
        (settings, {"epochs": 0.0}, "epochs=0.0 must be above 0"),
        (settings, {"remat": "ful"}, "'ful' is not one of none, dots, full; did you mean 'full'"),
        (settings, {"compute_dtype": "float16"}, "'float16' is not one of float32, bfloat16"),
        (settings, {"save_every": -1}, "save_every=-1 must be at least 0"),
        (settings, {"log_every": 0}, "log_every=0 must be at least 1"),
        (settings, {"trainable": "lorra"}, "'lorra' is not one of projector, .*, tower, all; did you mean 'lora'"),
        (settings, {"trainable": "lora", "quantize": "w4a16"}, 'quantize="w4a16" rounds .* recover.trainable to'),
        (losses, {"cosine": 1.0, "l2_layers": ()}, "cosine needs l2_layers"),
        (losses, {"ce": 0.0}, "set at least one above 0"),
        (losses, {"l2": -0.5}, "recover.losses.l2=-0.5 must be at least 0"),
        (losses, {"l2": INF}, "recover.losses.l2=inf must be at least 0"),
        (losses, {"temperature": 0.0}, "recover.losses.temperature=0.0 must be above 0"),
        (losses, {"l2": 1.0, "cosine": 0.5, "l2_layers": ()}, "l2 and cosine needs l2_layers"),
        (losses, {"extra": {"jsd": 1.0}}, "extra has no term 'jsd'"),
        (losses, {"extra": {"kl": 1.0}}, "kl is a built-in term: set recover.losses.kl instead"),
        (losses, {"extra": {"jsd": -1.0}}, "recover.losses.extra={'jsd': -1.0} must be at least 0"),
        (losses, {"teacher_inputs": "students"}, "'students' is not one of student, own; did you mean 'student'"),
        (term, {"needs": ("logit",)}, "needs 'logit' is not one of logits, .*; did you mean 'logits'"),
        (term, {"needs": ()}, "must list names of"),
        (term, {"needs": ("logits", "hidden")}, "must list names of"),
        (term, {"counts": "tokens"}, "counts 'tokens' is not one of labels, positions"),
        (term, {"needs": ("hidden",), "counts": "labels"}, "counts 'labels' is not one of tokens, features"),
        (term, {"needs": ("logits", "teacher_logits"), "reported": True}, "reported=True is not allowed"),
        (rules, {"trainable": "projektor"}, "did you mean 'projector'"),
        (rules, {"trainable": [("text/layers/.*/q_prj", True)]}, "matches no parameter .*full path; similar"),
        (rules, {"trainable": [("text/norm/weight", False)]}, "selects no parameter of this model"),
        (rules, {"trainable": [("text/(norm", True)]}, "not a regular expression"),
        (rules, {"trainable": [("text/.*", "decoder")]}, "one of main, projector"),
        (rules, {"trainable": []}, "empty: use"),
        *((rules, {"cfg": DECODER, "trainable": name}, "selects no") for name in ("projector", "lora", "tower")),
    ],
)
def test_settings(call, values, fact):
    refused(fact, call, **values)


def test_adapters():
    def add(model, *targets, alpha=8.0):
        return add_lora(model, LoraConfig(4, alpha, 0.0, targets), jax.random.key(0))

    refused(r"qproj is not a projection .* use down_proj, ", add, cases.model(CFG), "q_proj", "qproj")
    refused("merge them first", add, add(cases.model(CFG), "q_proj"), "q_proj")
    refused("recover.lora.alpha=0.0 must be above 0", add, cases.model(CFG), "q_proj", alpha=0.0)


def test_settings_that_do_not_fit_the_model():
    """All but the last two are refused before a weight is looked at."""
    original = cases.model(CFG)

    def train(stream=None, mesh=None, teacher=None, **settings):
        return recover(original, stream or cases.Stream(CFG), cases.settings(**settings), mesh=mesh, teacher=teacher)

    def teacher(cfg=CFG, **sizes):
        return original.replace(cfg=dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, **sizes)))

    l2, larger, own = LossConfig(l2=1.0), teacher(vocab_size=72), LossConfig(l2=1.0, teacher_inputs="own")
    refused("l2 needs a teacher", train, losses=l2)
    refused("hidden_size 8 differs from the student's 16", train, losses=l2, teacher=teacher(hidden_size=8))
    for losses in (LossConfig(kl=1.0), LossConfig(rkl=1.0), LossConfig(cosine=1.0, teacher_inputs="own")):
        refused("vocab_size 72 differs from the student's 64", train, losses=losses, teacher=larger)
    marked = teacher(dataclasses.replace(CFG, image_token_id=61))
    refused("image_token_id 61 differs from the student's 62", train, losses=own, teacher=marked)
    refused(r"micro-batch of 4 rows .* mesh.data x mesh.fsdp = 8", train, accumulation=2, mesh=make_mesh(8, 1, 1))
    refused("does not divide", train, mesh=make_mesh(1, 1, 8))
    refused("no term 'klx'; did you mean 'kl'", train, losses=LossConfig(extra={"klx": 1.0}))
    refused("pass num_steps", train, steps=None, epochs=2.5)
    refused("has 8 rows, expected 16", train, batch_size=16, trainable="projector")
    refused("ended after 2 steps", train, cases.Stream(CFG, end=2), trainable="projector")


# --- by the command: one line that says what, where and what to do, and nothing is made -------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory, goldens):
    """A folder with a teacher, four records, a config, and w/ with scores.npz, plan.json and pruned/."""
    root = tmp_path_factory.mktemp("experiment")
    records = [record(f"r{i}", f"img{i}.png", "A dog?", "yes") for i in range(4)]
    recover = {"trainable": "projector", "batch_size": 2, "steps": 3, "save_every": 1, "compute_dtype": "float32"}
    sections = {"score": {"samples": 2}, "prune": {"layers_removed": 2}, "recover": {"control": False, **recover}}
    write_experiment(root, goldens, records, recipe="llava", data={"max_length": 256}, **sections)
    assert run(root, "score") == run(root, "prune") == 0
    return root


def run(root, command, *settings):
    return main([command, f"--config={root / 'experiment.yaml'}", f"--workdir={root / 'w'}", *settings])


def refused_by_recover(root, capsys, *settings):
    """The one line that `vlmprune recover` ends with, having made nothing."""
    assert run(root, "recover", *(f"--config.{setting}" for setting in settings)) == 2
    said = capsys.readouterr().err
    assert said.startswith("vlmprune: error: ")
    assert said.count("\n") == 1
    assert not (root / "w/recovered").exists()
    return said


def test_no_usable_record(root, capsys):
    said = refused_by_recover(root, capsys, "data.on_error=skip", f"data.images={root}")
    assert "none of the 4 records is usable (the first: " in said
    assert "img0.png does not exist" in said


def test_another_teacher(root, capsys):
    """Of the same sizes, which would train without complaint."""
    other = root / "other"
    shutil.copytree(root / "teacher", other)
    for file in other.glob("*.safetensors"):
        edit_weights(other, lambda all_: {key: value + 1 for key, value in all_.items()}, file.name)
    losses = ["recover.losses.l2=0.0", "recover.losses.kl=0.5", "recover.losses.teacher_inputs=own"]
    for settings in ([], [*losses, f"recover.teacher_cache={root / 'cache'}"]):
        said = refused_by_recover(root, capsys, f"model.hf_dir={other}", *settings)
        assert "plan of another model: sizes are equal, but fingerprints differ" in said
    assert not (root / "cache").exists()
