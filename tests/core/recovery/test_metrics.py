"""What a run reports, and to which loggers: terms, learning rates, speed, and MFU by the published formula."""

import functools
import importlib.util
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import recover_cases as cases
from refusal import refused

from vlmprune_jax.base import chips, console
from vlmprune_jax.base.console import make_reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.params import param_axes
from vlmprune_jax.core.recovery import metrics
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.flops import step_flops
from vlmprune_jax.core.recovery.loop import recover
from vlmprune_jax.core.recovery.metrics import Recorder
from vlmprune_jax.core.recovery.terms import terms_of
from vlmprune_jax.core.recovery.trainable import add_lora

CFG = cases.config(layers=1)
LOSSES = LossConfig(0.5, 0.5, 0.1, 0.1, cosine=0.2)


@pytest.mark.slow
def test_without_a_terminal_a_line_a_minute(monkeypatch, capsys):
    """What `launch/tpu_vm.sh logs` shows of training and of other passes."""
    config = cases.settings(trainable="projector", steps=3)
    recover(cases.model(CFG), cases.Stream(CFG), config)
    reporter = make_reporter(enabled=True)
    with reporter.bar("evaluate teacher", 1200) as update:
        update(600)
        assert capsys.readouterr().out == "  train: compiling in step 1: sequences of 11 tokens\n"
        monkeypatch.setattr(console, "PAUSE_SECONDS", 0.0)
        update(1200)
    assert capsys.readouterr().out == "  evaluate teacher: 1,200 of 1,200\n"
    recover(cases.model(CFG), cases.Stream(CFG), config)
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split(", loss")[0] for line in lines] == [f"  train step: {step} of 3" for step in (1, 2, 3)]
    assert all("tok/s" in line for line in lines)


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
        valid = next(_batch(line["step"])).arrays["attention_mask"]
        assert line["padding"] == pytest.approx(1 - valid.mean())
        assert line["tokens_per_second"] * line["seconds"] == pytest.approx(np.sum(valid))
    assert lines[1]["projector_learning_rate"] == pytest.approx(2.5e-4)  # half of two warm-up steps
    assert {"tokens_per_second", "model_flops_per_second", "mfu"} <= summary.keys()


def _batch(step: int) -> cases.Stream:
    stream = cases.Stream(CFG)
    stream.set_state({"at": step - 1})
    return stream


def test_mfu_needs_a_known_device():
    """A CPU has no published peak; TPUs and GPUs are found by the name that jax gives them."""
    with Recorder(None, 0, 1, 1, False, jax.devices()) as recorder:
        recorder.step(1, {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 5.0}, (), 0.1, (), 1000)
    assert recorder.last["model_flops_per_second"] * recorder.last["seconds"] == pytest.approx(1000)
    assert "mfu" not in recorder.last
    assert chips.peak_flops("TPU v5 lite") == 197e12
    assert chips.peak_flops("NVIDIA H100 80GB HBM3") == 989.5e12
    assert chips.peak_flops("cpu") is None


STEP = {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3}


def test_speeds_are_of_single_steps_and_in_all_of_those_after_the_first(monkeypatch):
    """The first one compiles."""
    ticks = iter([0.0, 10.0, 12.0, 16.0, 16.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    seen = []
    with Recorder(None, 0, 3, 1, False, jax.devices()) as recorder:
        for step, (tokens, flops) in enumerate(((100.0, 1000), (50.0, 600), (70.0, 900)), start=1):
            recorder.step(step, {**STEP, "tokens": tokens}, (), 0.1, (), flops)
            seen.append([recorder.last[name] for name in ("seconds", "tokens_per_second", "model_flops_per_second")])
        summary = recorder.summary()
    assert seen == [[10, 10, 100], [2, 25, 300], [4, 17.5, 225]]
    assert (summary["seconds"], summary["tokens"]) == (16, 220)
    assert (summary["tokens_per_second"], summary["model_flops_per_second"]) == (20, 250)


def test_lines_are_there_at_once_and_the_last_step_has_one(tmp_path):
    """A process that is killed leaves what it measured; a line that was cut off is dropped when the run goes on."""
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"step": 2, "loss": 3.0}) + '\n{"step": 3, "lo')
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
    with (
        Recorder(tmp_path, 2, 5, 1, False, jax.devices()) as recorder,
        pytest.raises(UserError, match=rf"{told}; last checkpoint: step 2"),
    ):
        recorder.step(3, values, (*names, ""), 0.1, [("lost", "why")], 1)
    assert json.loads((tmp_path / "nonfinite-0.json").read_text())["records"] == names
    assert json.loads((tmp_path / "skipped-0.jsonl").read_text())["record"] == "lost"


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


def stand_in(monkeypatch, package):
    """Put a module in the place of the package that notes what it is asked for, if the package is not installed."""
    asked = []
    if importlib.util.find_spec(package) is None:

        def noted(function):
            return lambda *args, **options: asked.append((function, *args, options))

        functions = {function: noted(function) for function in ("init", "log", "finish")}
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(**functions))
    return asked


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_metrics_go_to_the_loggers(package, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    asked = stand_in(monkeypatch, package)
    config = cases.settings(trainable="projector", steps=2, loggers=("tensorboard", package))
    folder = tmp_path / "run/training"
    recover(cases.model(CFG), cases.Stream(CFG), config, workdir=folder, progress=False)
    assert (folder / "tensorboard").is_dir()
    lines = cases.metrics_of(folder)
    if not asked:  # the real one
        assert [*(folder / "wandb").glob("offline-run-*/*.wandb")] or [*(tmp_path / "trackio").rglob("*.db")]
        return
    start, *steps, end = asked
    assert start[0] == "init"
    assert start[1]["project"] == "vlmprune"
    assert start[1]["name"].startswith("run-")
    assert start[1]["resume"] == "allow"
    assert steps == [("log", {k: v for k, v in line.items() if k != "step"}, {"step": line["step"]}) for line in lines]
    assert end == ("finish", {})


def test_a_package_that_is_missing_or_does_not_start(monkeypatch, tmp_path):
    config = cases.settings(trainable="projector", steps=2, loggers=("wandb",))
    train = functools.partial(recover, cases.model(CFG), cases.Stream(CFG), config, workdir=tmp_path, progress=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(r"recover\.loggers: wandb is not installed: pip install 'vlmprune-jax\[wandb\]'", train)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: 1 / 0))
    refused(r"recover\.loggers: wandb cannot start \(division by zero\): set it up, or", train)
