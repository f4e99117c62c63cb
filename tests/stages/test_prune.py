"""Width pruning in several steps as the commands do it: the first from scores.npz, none scored twice."""

import pytest
from hf_cases import copy_llava

import vlmprune_jax as vp
from vlmprune_jax.cli.main import main
from vlmprune_jax.prune import iterative, prune_iteratively

CONFIG = """
from vlmprune_jax.cli.config_files import experiment_config

def get_config():
    config = experiment_config()
    config.model.hf_dir = "{folder}/teacher"
    config.score.width = "l2"
    config.score.reduction = "sum"
    config.prune.method = "width"
    config.prune.ratio = 0.25
    config.prune.steps = 3
    return config
"""


@pytest.fixture
def experiment(tmp_path, goldens):
    copy_llava(goldens, tmp_path / "teacher")
    (tmp_path / "experiment.py").write_text(CONFIG.format(folder=tmp_path))
    return [f"--config={tmp_path / 'experiment.py'}", f"--workdir={tmp_path / 'w'}"]


def test_the_first_step_uses_the_scores_that_are_there(experiment, tmp_path, monkeypatch, capsys):
    scored, score = [], iterative.score
    monkeypatch.setattr(
        iterative, "score", lambda model, *rest, **more: scored.append(1) or score(model, *rest, **more)
    )
    assert main(["prune", *experiment]) == 2
    assert "scores.npz: no such scores file: run `vlmprune score`" in capsys.readouterr().err
    assert main(["score", *experiment]) == 0
    assert main(["prune", *experiment]) == 0
    assert len(scored) == 2
    plan = vp.PrunePlan.from_json(tmp_path / "w/plan.json")
    model = vp.load(tmp_path / "teacher")
    options = {"reduction": "sum", "gqa": "groups"}
    _, expected, scores = prune_iteratively(
        model, lambda _: (), steps=3, criterion="l2", score_options=options, ratio=0.25
    )
    assert plan.layers == expected.layers
    assert len(scores) == 3
    assert main(["prune", *experiment]) == 0
    assert "prune: unchanged, skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("export", "mlp_layers", "share"),  # padding gives heads back everywhere, and would neurons
    [
        ({}, (0, 2), 0.93),
        ({"uneven": "pad", "dtype": "float32"}, (), 0.8),
        ({"layout": "transformers"}, (0, 2), 0.93),
    ],
)
def test_bytes_on_disk_are_those_of_the_export(export, mlp_layers, share, experiment, tmp_path, capsys):
    settings = [f"--config.export.{name}={value}" for name, value in export.items()]
    settings += ["--config.prune.ratio=None", "--config.prune.steps=1"]
    settings += ["--config.prune.attn_layers=(0, 2)", f"--config.prune.mlp_layers={mlp_layers}"]
    assert main(["score", *experiment, *settings]) == 0
    options = {"layout": "source", "uneven": "per_layer", "dtype": "bfloat16", **export}
    vp.save(vp.load(tmp_path / "teacher"), tmp_path / "whole", source_dir=tmp_path / "teacher", **options)
    limit = int(share * on_disk(tmp_path / "whole"))
    assert main(["prune", *experiment, *settings, f"--config.prune.budget.disk_bytes={limit}"]) == 0
    plan = vp.PrunePlan.from_json(tmp_path / "w/plan.json")
    reached = plan.options["budget_reached"]["disk_bytes"]
    assert f"disk_bytes: {reached:,} of {limit:,} allowed" in capsys.readouterr().out
    source = tmp_path / "w/pruned"
    vp.save(vp.load(source), tmp_path / "out", source_dir=source, **options)
    # shorter numbers make a shorter header
    assert on_disk(tmp_path / "out") <= reached <= on_disk(tmp_path / "out") + 200
    assert limit - reached < 0.03 * limit
    assert main(["prune", *experiment, *settings, "--overwrite", "--config.prune.budget.disk_bytes=9"]) == 2
    assert "prune.budget.disk_bytes=9: cannot be reached" in capsys.readouterr().err


def on_disk(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_two_targets_are_refused_before_scoring(experiment, capsys):
    settings = ["--config.prune.budget.parameters=1e5", "--config.prune.steps=1"]
    assert main(["score", *experiment, *settings]) == 2
    assert "method 'width' needs either ratio=" in capsys.readouterr().err
    settings += ["--config.prune.ratio=None", "--config.prune.budget.slice=v5e"]
    assert main(["score", *experiment, *settings]) == 2
    assert "prune.budget.slice: topology 'v5e' is not GENERATION:SIZES" in capsys.readouterr().err
    assert main(["score", *experiment, "--config.prune.budget.parameter=9"]) == 2
    assert "has no 'parameter'; did you mean 'parameters'" in capsys.readouterr().err
