"""The configs of real runs: every cut of the paper's tables, at the true shapes of its models."""

import importlib.util
import json
import re

import pytest
from refusal import refused
from repository import ROOT, full_size_models

from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.run.cli.config_files import experiment_config, read_experiment
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.experiment.recipes import paper_cut
from vlmprune_jax.run.experiment.variants import check_experiment, variants_of
from vlmprune_jax.run.planning.case import predict_plan
from vlmprune_jax.run.sweep.hyper import sweep_runs

CONFIGS = {"llava15_7b": "llava", "bunny_3b": "bunny", "mini_internvl_4b": "internvl"}
# Shares of the whole model of the layers that the reference removes (5, 10, 15 and 20 of 32).
DEPTH = {
    "llava15_7b": (0.1433, 0.2865, 0.4298, 0.5731),
    "bunny_3b": (0.1236, 0.2472, 0.3708, 0.4944),
    "mini_internvl_4b": (0.1366, 0.2731, 0.4097, 0.5462),
}
RATIOS = (0.15, 0.3, 0.45, 0.6)


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CONFIGS)
def test_every_cut_of_the_paper_is_in_reach(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(full_size_models()[CONFIGS[name]]))
    _, cfg = read_config(tmp_path)
    get_config = loaded(ROOT / f"configs/{name}.py").get_config
    for method in ("depth", "width"):
        for ratio, by_layers in list(zip(RATIOS, DEPTH[name], strict=True))[:: 1 if method == "depth" else 3]:
            experiment = read_experiment(get_config(f"{method},{ratio}"))
            check_experiment(experiment)
            plan = predict_plan(experiment, cfg)
            assert plan.actual_ratio == pytest.approx(by_layers if method == "depth" else ratio, abs=0.002)
            assert len(plan.kept_layers) == (27, 22, 17, 12)[RATIOS.index(ratio)] if method == "depth" else 32
    uneven, even = (
        predict_plan(read_experiment(get_config(variant)), cfg).apply_to(cfg).text.uniform
        for variant in ("width,0.3", "width,0.3,uniform")
    )
    assert (uneven, even) == (False, True)


@pytest.mark.parametrize(
    ("variant", "method", "ratio", "layers"),
    [
        ("vocabulary,gguf", "depth", None, 42),
        ("layers,0.4,w4a16", "depth", 0.4, None),
        ("neurons,0.45,gguf", "width", 0.45, 42),
    ],
)
def test_cuts_of_gemma4_are_in_reach(tmp_path, variant, method, ratio, layers):
    """Three quarters of the tokens are a third of the parameters; the stock class holds what is left."""
    (tmp_path / "config.json").write_text(json.dumps(full_size_models()["gemma4_e4b"]))
    _, cfg = read_config(tmp_path)
    experiment = read_experiment(loaded(ROOT / "configs/gemma4_e4b.py").get_config(variant))
    check_experiment(experiment)
    plan = predict_plan(experiment, cfg)
    left = plan.apply_to(cfg)
    assert plan.parameters_after == count_params(left)  # a layer's part of a dropped token's row goes once
    assert (experiment.prune.method, left.text.vocab_size) == (method, 65536)
    assert plan.actual_ratio == pytest.approx(0.34 if ratio is None else ratio, abs=0.01)
    assert layers is None or len(left.text.layers) == layers
    assert left.text.uniform


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("deph,0.3", "'deph' is not one of depth, width; did you mean 'depth'?"),
        ("depth", "variant 'depth' must be METHOD,TARGET"),
        ("width,1.5", "ratio of the variant=1.5 must be at least 0 and below 1"),
        ("width,0.3,even", "'even' is not one of reconstruct, uniform"),
        ("depth,0.3,uniform", "option of the variant 'uniform'"),
        ("width,5layers", "variant 'width,5layers' must be METHOD,TARGET"),
    ],
)
def test_variants_that_are_none(variant, message):
    refused(re.escape(message), paper_cut, variant)


def test_options_of_a_variant():
    """Other ratios than the paper's are shares of the whole model."""
    assert paper_cut("depth,0.2")["prune"] == {"method": "depth", "ratio": 0.2}
    assert paper_cut("depth,0.30")["prune"] == {"method": "depth", "layers_removed": 10}
    sections = paper_cut("width,0.3,uniform,reconstruct")
    assert sections["reconstruct"] == {"method": "least_squares"}
    assert "attn_layers" not in sections["prune"]


def test_qwen3_vl_loses_five_layers_after_the_ones_with_features_of_the_tower(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(full_size_models()["qwen3vl"]))
    experiment = read_experiment(loaded(ROOT / "configs/qwen3vl_8b.py").get_config("depth,5layers,reconstruct"))
    assert experiment.reconstruct.method == "least_squares"
    check_experiment(experiment)
    kept = predict_plan(experiment, read_config(tmp_path)[1]).kept_layers
    assert (len(kept), kept[:3]) == (31, (0, 1, 2))


# --- variants against settings given explicitly ----------------------------------------------------------------------


@pytest.fixture
def config():
    config = experiment_config()
    config.prune.ratio = 0.1
    config.prune_variants = {
        "depth": {"prune": {"method": "depth", "ratio": 0.3}},
        "width": {"prune": {"method": "width", "ratio": 0.3}, "reconstruct": {"method": "least_squares"}},
    }
    config.recover_variants = {
        "sft": {"recover": {"losses": {"ce": 1.0}}},
        "untrained": {"recover": {"method": "none"}},
    }
    return config


def ratios(experiment):
    return {run.name: run.experiment.prune.ratio for run in variants_of(experiment)}


def test_variants_that_set_it_too_are_named(config):
    for setting, fact in {
        "prune.ratio": r"^--config.prune.ratio: the variants depth, width also set prune.ratio: set "
        r"prune_variants.NAME.prune.ratio, or --only=NAME$",
        "reconstruct.method": "--config.reconstruct.method: the variants width also set",
        "recover.losses.ce": "recover.losses.ce: the variants sft also set .* recover_variants.NAME.recover",
    }.items():
        refused(fact, read_experiment, config, explicit=[setting])
    read_experiment(config, explicit=["prune.protect", "recover.losses.l2", "prune_variants.depth.prune.ratio"])
    swept = [{"config.prune.ratio": 0.2}]
    refused("config.prune.ratio: the variants depth, width also set", sweep_runs, read_experiment(config), swept)


def test_with_one_variant_the_explicit_setting_wins(config):
    assert ratios(read_experiment(config, only="depth")) == {"depth": 0.3}
    experiment = read_experiment(config, only="depth", explicit=["prune.ratio"])
    assert ratios(experiment) == {"depth": 0.1}
    assert variants_of(experiment)[0].experiment.prune.method == "depth"


def test_variants_are_chosen_by_pattern(config):
    assert list(ratios(read_experiment(config, only="w*"))) == ["width"]
    (pruned,) = variants_of(read_experiment(config, only="width,sft"))
    assert [run.name for run in pruned.recoveries] == ["width-sft"]
    assert len(variants_of(read_experiment(config, only="sft"))) == 2
    refused("--only=widht: matches no variant; did you mean 'width'", read_experiment, config, only="depth,widht")
    refused("--only=a: matches no variant .this config has no variants", read_experiment, experiment_config(), only="a")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.prune.ratio=None"], "--config.prune.ratio: the variants depth, width_reconstructed also set"),
        (["--config.prune.ratio=30"], "prune.ratio=30.0 must be at least 0 and below 1 (0.3 is 30 %)"),
        (["--config.prune.method=deep"], "prune.method 'deep' is not one of depth, width, hybrid, experts, none; did"),
        (["--config.prune_variants.depth.prune.ratio=3"], "prune.ratio=3.0 must be at least 0 and below 1"),
        (["--only=dept"], "--only=dept: matches no variant; did you mean 'depth'"),
    ],
)
def test_the_demo_refuses_at_its_start(flags, message, tmp_path, capsys):
    for command in ("run", "plan"):
        argv = [command, "--config=demo:quick", f"--workdir={tmp_path}", *flags]
        assert main([*argv, "--topology=v5e:2x2"] if command == "plan" else argv) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
