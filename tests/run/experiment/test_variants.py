"""Variants against settings given explicitly: the explicit one wins, or the command says why it cannot."""

import pytest
from refusal import refused
from repository import ROOT

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.cli.config_files import experiment_config, read_experiment
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.experiment.variants import variants_of
from vlmprune_jax.run.sweep.hyper import sweep_runs

DEMO = ROOT / "configs" / "demo.py"


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
    with pytest.raises(
        UserError,
        match=r"^--config.prune.ratio: the variants depth, width also set prune.ratio: set "
        r"prune_variants.NAME.prune.ratio, or --only=NAME$",
    ):
        read_experiment(config, explicit=["prune.ratio"])
    with pytest.raises(UserError, match=r"--config.reconstruct.method: the variants width also set"):
        read_experiment(config, explicit=["reconstruct.method"])
    with pytest.raises(
        UserError, match=r"recover.losses.ce: the variants sft also set .* recover_variants.NAME.recover"
    ):
        read_experiment(config, explicit=["recover.losses.ce"])
    read_experiment(config, explicit=["prune.protect", "recover.losses.l2", "prune_variants.depth.prune.ratio"])


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
    with pytest.raises(UserError, match=r"--only=a: matches no variant .this config has no variants"):
        read_experiment(experiment_config(), only="a")


def test_a_sweep_does_not_set_what_variants_set(config):
    with pytest.raises(UserError, match=r"config.prune.ratio: the variants depth, width also set prune.ratio"):
        sweep_runs(read_experiment(config), [{"config.prune.ratio": 0.2}])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.prune.ratio=0.1"], "--config.prune.ratio: the variants depth, width_reconstructed also set"),
        (["--config.prune.ratio=None"], "--config.prune.ratio: the variants depth, width_reconstructed also set"),
        (["--config.prune.ratio=30"], "prune.ratio=30.0 must be at least 0 and below 1 (0.3 is 30 %)"),
        (["--config.prune.ratio=-0.1"], "prune.ratio=-0.1 must be at least 0 and below 1"),
        (["--config.prune.method=deep"], "prune.method 'deep' is not one of depth, width, hybrid, experts, none; did"),
        (["--config.prune_variants.depth.prune.ratio=3"], "prune.ratio=3.0 must be at least 0 and below 1"),
        (["--only=dept"], "--only=dept: matches no variant; did you mean 'depth'"),
    ],
)
def test_the_demo_refuses_at_its_start(flags, message, tmp_path, capsys):
    for command in ("run", "plan"):
        argv = [command, f"--config={DEMO}:quick", f"--workdir={tmp_path}", *flags]
        assert main([*argv, "--topology=v5e:2x2"] if command == "plan" else argv) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
