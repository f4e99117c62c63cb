"""Loggers of training metrics: offline where the packages are installed, else what they are asked for."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import recover_cases as cases

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.recovery.loop import recover

CFG = cases.config(layers=1)


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
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
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
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"recover\.loggers: wandb is not installed: pip install 'vlmprune-jax\[wandb\]'"
    ):
        recover(cases.model(CFG), cases.Stream(CFG), config, workdir=tmp_path, progress=False)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: 1 / 0))
    with pytest.raises(UserError, match=r"recover\.loggers: wandb cannot start \(division by zero\): set it up, or"):
        recover(cases.model(CFG), cases.Stream(CFG), config, workdir=tmp_path, progress=False)
