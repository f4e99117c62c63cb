"""The stage `recover` trains something: batches that fit the records, and models that differ from their source."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from experiment_cases import record, write_experiment

from vlmprune_jax.core.prune import score
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.exports.pruning import make_plan, prune_folder
from vlmprune_jax.run.cli.main import main


@pytest.fixture
def flags(tmp_path, goldens):
    """Flags of `vlmprune recover` in a workdir with a pruned model, for 5 records and the default batch size."""
    records = [record(f"r{i}", "img0.png", "Is it one?", "yes") for i in range(5)]
    recover = {"trainable": "projector", "control": False, "epochs": 2.0, "losses": {"ce": 1.0, "l2": 0.0}}
    config = write_experiment(tmp_path, goldens, records, data={"max_length": 64}, recover=recover)
    model = load(tmp_path / "teacher")
    plan = make_plan(score(model, None, criterion="l2"), model.cfg, method="width", ratio=0.1)
    prune_folder(tmp_path / "teacher", plan, tmp_path / "pruned", dtype="float32")
    shutil.copytree(tmp_path / "pruned", tmp_path / "w/pruned")
    (tmp_path / "w/plan.json").write_text(plan.to_json())
    return [config, f"--workdir={tmp_path / 'w'}"]


def test_few_records_make_smaller_batches_that_train(flags, tmp_path, capsys):
    """Before, 5 records made one batch of 128 repeated rows, whose one step was warm-up at rate 0."""
    assert main(["recover", *flags]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    line = (
        "batches have 5 rows instead of recover.batch_size=128, because there are only 5 training records in 2 epochs"
    )
    assert line in said
    lines = [json.loads(line) for line in (tmp_path / "w/training/metrics.jsonl").read_text().splitlines()]
    assert (lines[-1]["step"], lines[-1]["learning_rate"]) == (2, pytest.approx(2e-4))
    before, after = (load(tmp_path / "w" / name).params["projector"] for name in ("pruned", "recovered"))
    assert not all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config.mesh.data=8"], "recover: 5 training records in 2 epochs fill no batch of 8 rows"),
        (["--config.recover.epochs=0.1"], "recover: 5 training records in 0.1 epochs fill no batch of 1 row"),
    ],
    ids=["devices", "epochs"],
)
def test_records_that_fill_no_batch_are_refused(flags, tmp_path, capsys, more, message):
    assert main(["recover", *flags, *more]) == 2
    line = capsys.readouterr().err.strip()
    assert message in line
    assert "\n" not in line
    assert not (tmp_path / "w/training").exists()


@pytest.mark.parametrize("trainable", ["projector", "lora"])
def test_a_model_that_equals_its_source_is_refused(flags, tmp_path, capsys, trainable):
    """A learning rate that rounding swallows."""
    small = ["--config.recover.learning_rate=1e-30", f"--config.recover.trainable={trainable}"]
    assert main(["recover", *flags, *small]) == 2
    line = capsys.readouterr().err.strip()
    assert "recover: training changed no weight of pruned" in line
    assert "(2 steps of 5 rows, 5 records, learning rate 1e-30, last gradient norm " in line
    assert ", float32): raise recover.learning_rate, " in line
    assert "\n" not in line
    assert not (tmp_path / "w/recovered").exists()
