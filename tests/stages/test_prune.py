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
        model, lambda _: (), steps=3, criterion="l2", score_options=options, ratio=0.25, heads="auto"
    )
    assert plan.layers == expected.layers
    assert len(scores) == 3
    assert main(["prune", *experiment]) == 0
    assert "prune: unchanged, skipped" in capsys.readouterr().out
