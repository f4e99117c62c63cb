"""The stage of how-to/extend.md, from a config that imports it: run, skipped, evaluated, exported, and a command."""

import json
import sys

import jax
import numpy as np
import pytest
from experiment_cases import flags_of, registered

import vlmprune_jax as vp
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.workdir.result import read_result

CONFIG = """
import wise_ft  # registers the stage

from vlmprune_jax.run.cli.config_files import experiment_config

def get_config():
    config = experiment_config()
    config.model.hf_dir = "{folder}/teacher"
    config.data.train = config.data.eval = "{folder}/records.json"
    config.data.images = "{goldens}/data/images"
    config.data.system = ""
    config.data.max_length = 64
    config.score.depth = "random"
    config.prune.layers_removed = 1
    config.evaluate.max_new_tokens = 2
    config.export.dtype = "float32"
    config.recover.trainable = "projector"
    config.recover.control = False
    config.recover.losses = {{"ce": 1.0, "l2": 0.0}}
    config.recover.learning_rate = 0.1
    config.recover.warmup_ratio = 0.0
    config.recover.batch_size = 2
    config.recover.steps = 2
    return config
"""


@pytest.fixture
def printed(tmp_path):
    with registered("A stage of your own", tmp_path, vp.stages) as path:
        yield path


@pytest.fixture
def flags(printed, tmp_path, goldens):
    return flags_of(CONFIG, tmp_path, goldens)


def test_the_printed_stage_makes_a_model_of_the_run(flags, printed, tmp_path, capsys):
    workdir = tmp_path / "w"
    assert main(["run", *flags]) == 0, capsys.readouterr().err
    before, after, between = (vp.load(workdir / name).params for name in ("pruned", "recovered", "wise_ft"))
    moved = [np.abs(new - old).max() for new, old in zip(*map(jax.tree.leaves, (after, before)), strict=True)]
    assert max(moved) > 1e-3
    middle = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, before, after)
    jax.tree.map(np.testing.assert_array_equal, between, middle)

    result = read_result(workdir)
    assert [(run.name, run.recovery, run.path) for run in result.runs] == [
        ("depth", "none", "pruned"), ("depth-recovered", "recovered", "recovered"),
        ("depth-recovered-wise_ft", "recovered-wise_ft", "wise_ft"),
    ]  # fmt: skip
    assert (workdir / "eval/wise_ft.answers.jsonl").is_file()
    assert "depth-recovered-wise_ft" in (workdir / "report.html").read_text()
    record = json.loads((workdir / ".stages/wise_ft.json").read_text())
    assert (record["facts"]["alpha"], record["made_from"]["inputs"].keys()) == (
        0.5, {"model.hf_dir", "pruned", "recovered", "stage wise_ft"}
    )  # fmt: skip
    assert "trained after pruning" in (workdir / "wise_ft/README.md").read_text()

    # Again it is skipped; another share is noticed in its file.
    capsys.readouterr()
    assert main(["run", *flags]) == 0
    assert "wise_ft: unchanged, skipped" in capsys.readouterr().out
    printed.write_text(printed.read_text().replace("ALPHA = 0.5", "ALPHA = 0.25"))
    sys.modules.pop("wise_ft")
    assert main(["wise_ft", *flags]) == 2
    assert "was made from other inputs (stage wise_ft changed)" in capsys.readouterr().err
    assert main(["wise_ft", *flags, "--overwrite"]) == 0
    (workdir / "result.json").unlink()  # which named the best: without it the last model made is exported
    assert main(["export", *flags, "--overwrite"]) == 0, capsys.readouterr().err
    exported, ours = (vp.load(workdir / name).params for name in ("export", "wise_ft"))
    jax.tree.map(np.testing.assert_array_equal, exported, ours)


def test_a_stage_before_its_inputs_names_the_command(flags, tmp_path, capsys):
    for command in ("score", "prune"):
        assert main([command, *flags]) == 0
    assert main(["wise_ft", *flags]) == 2
    assert (
        "recovered: no such file or folder: run `vlmprune recover` (or `vlmprune run`) first" in capsys.readouterr().err
    )
    assert main(["wise_tf", *flags]) == 2
    assert "no command 'wise_tf'; did you mean 'wise_ft'?" in capsys.readouterr().err
