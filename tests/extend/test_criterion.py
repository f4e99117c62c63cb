"""The criterion that how-to/extend.md prints, from a config on the command line."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import decoder_values, packed
from experiment_cases import flags_of, registered
from prune_cases import UNEQUAL, batch, config, model

import vlmprune_jax as vp
from vlmprune_jax.core.models.params import unstack_layers
from vlmprune_jax.run.cli.main import main

CONFIG = """
import my_criterion  # registers "wanda"

from vlmprune_jax.run.cli.config_files import experiment_config

def get_config():
    config = experiment_config()
    config.model.hf_dir = "{folder}/teacher"
    config.data.train = "{folder}/records.json"
    config.data.images = "{goldens}/data/images"
    config.data.system = ""
    config.score.width = "wanda"
    config.score.options = {{"image_weight": 0.5}}
    config.score.samples = 3
    config.score.batch_size = 2
    config.prune.method = "width"
    config.prune.ratio = 0.2
    return config
"""


@pytest.fixture
def printed(tmp_path):
    with registered("A criterion", tmp_path, vp.criteria) as path:
        yield path


@pytest.fixture
def experiment(printed, tmp_path, goldens):
    return flags_of(CONFIG, tmp_path, goldens)


def test_the_printed_criterion_scores_and_prunes(experiment, tmp_path, capsys):
    assert main(["score", *experiment]) == 0
    scores = vp.Scores.load(tmp_path / "w/scores.npz")
    assert (scores.criterion, scores.options) == ("wanda", {"gqa": "groups", "image_weight": 0.5})
    assert main(["prune", *experiment]) == 0
    plan = vp.PrunePlan.from_json(tmp_path / "w/plan.json")
    assert plan.criterion == "wanda"
    lowest = np.argsort(scores.along("mlp")[2], kind="stable")[
        : len(scores.along("mlp")[2]) - len(plan.layers[2].kept["mlp"])
    ]
    assert not set(lowest) & set(plan.layers[2].kept["mlp"])
    capsys.readouterr()
    assert main(["score", *experiment]) == 0
    assert "score: unchanged, skipped" in capsys.readouterr().out
    with (tmp_path / "my_criterion.py").open("a") as file:
        file.write("# changed\n")
    assert main(["score", *experiment]) == 2
    assert "was made from other inputs (criterion wanda changed)" in capsys.readouterr().err
    assert main(["score", *experiment, "--config.score.width=wada"]) == 2
    assert "did you mean 'wanda'?" in capsys.readouterr().err
    assert main(["score", *experiment, "--config.score.depth=wanda"]) == 2
    assert "score.depth='wanda' scores widths, not layers: use block_influence or" in capsys.readouterr().err


@pytest.mark.slow
def test_its_numbers(printed):
    """Over two batches, against whole activations."""
    spec = importlib.util.spec_from_file_location("my_criterion", printed)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    cfg = config(UNEQUAL, vision=True)
    one, batches = model(cfg), [batch(cfg), batch(cfg, seed=1)]
    scores = vp.score(one, batches, criterion="wanda", image_weight=0.25, gqa="q_heads")
    layers = unstack_layers(one.params, cfg)[0]
    squares = [{name: 0.0 for name in ("o_proj", "down_proj")} for _ in layers]
    for arrays in batches:
        weight = np.where(arrays["input_ids"] == 61, 0.25, arrays["attention_mask"])
        weight = np.where(arrays["attention_mask"] == 0, 0.0, weight)
        for sums, seen in zip(squares, whole_inputs(one, arrays), strict=True):
            for name, x in seen.items():
                sums[name] = sums[name] + np.einsum("bt,bt...->...", weight, np.asarray(x, np.float64) ** 2)
    for i, (layer, sums) in enumerate(zip(layers, squares, strict=True)):
        heads = np.abs(layer["self_attn/o_proj/weight"]).sum(0) * np.sqrt(sums["o_proj"])
        np.testing.assert_allclose(scores.along("q_heads")[i], heads.sum(-1), rtol=1e-5)
        neurons = np.abs(layer["mlp/down_proj/weight"]).sum(0) * np.sqrt(sums["down_proj"])
        np.testing.assert_allclose(scores.along("mlp")[i], neurons, rtol=1e-5)


def whole_inputs(one, arrays):
    """What o_proj and down_proj of every block read, at every token."""
    found = decoder_values(
        jax.tree.map(jnp.asarray, one.params), one.cfg, jnp.asarray(arrays["input_ids"]), ("o_proj", "down_proj"),
        media={"vision": packed(arrays["pixel_values"])}, attention_mask=jnp.asarray(arrays["attention_mask"]),
    )  # fmt: skip
    return [block.inputs for block in found]
