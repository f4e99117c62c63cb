"""The runs that a config describes: every cut of the paper's tables, variants, and what `get_hyper` lists."""

import json
import re

import pytest
from refusal import refused
from repository import full_size_models

from vlmprune_jax.base.settings import override
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.run.cli.config_files import experiment_config, read_experiment, shipped_config
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.experiment.recipes import paper_cut
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.experiment.variants import check_experiment, variants_of
from vlmprune_jax.run.planning.case import predict_plan
from vlmprune_jax.run.sweep.hyper import LONGEST_NAME, Hyper, sweep_runs

# Models, and the shares of them that are in the layers that the reference removes (5, 10, 15 and 20 of 32).
CONFIGS = {
    "llava15_7b": ("llava", (0.1433, 0.2865, 0.4298, 0.5731)),
    "bunny_3b": ("bunny", (0.1236, 0.2472, 0.3708, 0.4944)),
    "mini_internvl_4b": ("internvl", (0.1366, 0.2731, 0.4097, 0.5462)),
}


def planned(folder, model, config):
    """The experiment of a config, and its plan at the true shape of a model with that shape."""
    (folder / "config.json").write_text(json.dumps(full_size_models()[model]))
    experiment, (_, cfg) = read_experiment(shipped_config(config)), read_config(folder)
    check_experiment(experiment)
    plan = predict_plan(experiment, cfg)
    return experiment, plan, plan.apply_to(cfg)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_cut_of_the_paper_is_in_reach(tmp_path, name):
    model, shares = CONFIGS[name]
    for ratio, share, layers in zip((0.15, 0.3, 0.45, 0.6), shares, (27, 22, 17, 12), strict=True):
        _, plan, _ = planned(tmp_path, model, f"{name}:depth,{ratio}")
        assert (plan.actual_ratio, len(plan.kept_layers)) == (pytest.approx(share, abs=0.002), layers)
    for ratio, option in ((0.6, ""), (0.3, ""), (0.3, ",uniform")):
        _, plan, left = planned(tmp_path, model, f"{name}:width,{ratio}{option}")
        assert (plan.actual_ratio, len(plan.kept_layers)) == (pytest.approx(ratio, abs=0.002), 32)
        assert left.text.uniform == bool(option)


@pytest.mark.parametrize(
    ("variant", "method", "ratio", "layers"),
    [
        ("vocabulary,gguf", "depth", 0.34, 42),
        ("layers,0.4,w4a16", "depth", 0.4, None),
        ("neurons,0.45,gguf", "width", 0.45, 42),
    ],
)
def test_cuts_of_gemma4_are_in_reach(tmp_path, variant, method, ratio, layers):
    """Three quarters of the tokens are a third of the parameters; the stock class holds what is left."""
    experiment, plan, left = planned(tmp_path, "gemma4_e4b", f"gemma4_e4b:{variant}")
    assert plan.parameters_after == count_params(left)  # a layer's part of a dropped token's row goes once
    assert (experiment.prune.method, left.text.vocab_size) == (method, 65536)
    assert plan.actual_ratio == pytest.approx(ratio, abs=0.01)
    assert layers is None or len(left.text.layers) == layers
    assert left.text.uniform


def test_qwen3_vl_loses_five_layers_after_the_ones_with_features_of_the_tower(tmp_path):
    experiment, plan, _ = planned(tmp_path, "qwen3vl", "qwen3vl_8b:depth,5layers,reconstruct")
    assert experiment.reconstruct.method == "least_squares"
    assert (len(plan.kept_layers), plan.kept_layers[:3]) == (31, (0, 1, 2))


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


# --- runs of a sweep: what they are called, and what is refused before any of them -----------------------------------

HYPER = Hyper()


def names(points):
    return [run.name for run in sweep_runs(Experiment(), points)]


def test_product_zip_and_chain():
    methods, ratios = HYPER.sweep("config.prune.method", ["depth", "width"]), HYPER.sweep("prune.ratio", [0.1, 0.2])
    assert HYPER.product([methods, ratios]) == [
        {"prune.method": method, "prune.ratio": ratio} for method in ("depth", "width") for ratio in (0.1, 0.2)
    ]
    assert HYPER.zipit([methods, ratios]) == [
        {"prune.method": "depth", "prune.ratio": 0.1}, {"prune.method": "width", "prune.ratio": 0.2},
    ]  # fmt: skip
    assert HYPER.chainit([methods, HYPER.fixed("config.prune.ratio", 0.3)]) == [*methods, {"prune.ratio": 0.3}]
    assert HYPER.product([]) == [{}]
    refused(r"hyper.zipit: the sweeps have 2, 1 values", HYPER.zipit, [methods, HYPER.fixed("prune.ratio", 0.3)])
    twice = [ratios, HYPER.named("cut", {"a": {"config.prune.ratio": 0.3}})]
    refused(r"hyper.product: two of the sweeps set prune.ratio", HYPER.product, twice)


def test_names_are_what_differs():
    seeds = HYPER.zipit([HYPER.sweep(f"{part}.seed", [1, 2]) for part in ("data", "recover")])
    recoveries = {"sft_l2": {"recover.losses": {"ce": 0.5, "l2": 0.5}}, "none": {"config.recover.method": "none"}}
    ratios = HYPER.product([seeds, HYPER.sweep("prune.ratio", [0.3, 0.1 + 0.2 + 0.1])])
    points = [HYPER.fixed("prune.method", "width"), ratios, HYPER.named("recovery", recoveries)]
    runs = sweep_runs(Experiment(), HYPER.product(points))
    assert [run.name for run in runs[:4]] == [
        "ratio=0.3,recovery=sft_l2,seed=1", "ratio=0.3,recovery=none,seed=1",
        "ratio=0.4,recovery=sft_l2,seed=1", "ratio=0.4,recovery=none,seed=1",
    ]  # fmt: skip
    first = runs[0]
    assert (first.group, first.seed) == ("ratio=0.3,recovery=sft_l2", 1)
    assert first.labels == {"ratio": "0.3", "recovery": "sft_l2", "seed": "1"}
    assert first.experiment.prune.method == "width"
    assert (first.experiment.recover.losses.ce, first.experiment.recover.losses.l2) == (0.5, 0.5)
    assert (first.experiment.data.seed, first.experiment.recover.seed) == (1, 1)
    assert runs[1].experiment.recover.method == "none"
    assert sum(run.group == first.group for run in runs) == 2


def test_names_have_as_many_words_as_tell_settings_apart():
    points = [{"data.seed": 1, "recover.seed": 2}, {"data.seed": 3, "recover.seed": 3}]
    assert names(points) == ["data.seed=1,recover.seed=2", "data.seed=3,recover.seed=3"]
    assert [run.seed for run in sweep_runs(Experiment(), points)] == [None, 3]
    assert names([{"prune.ratio": 0.1}, {"score.samples": 3}]) == ["ratio=0.1", "samples=3"]
    assert names([{"prune.ratio": 0.1}]) == ["only"]


def test_names_are_names_of_folders():
    paths = ["/models/a b/../c", "\x1b[2J\u202eevil\n", "x" * 300, "x" * 301, "..", ""]
    found = names([{"model.hf_dir": path} for path in paths])
    assert len(set(found)) == len(paths)
    for name in found:
        assert re.fullmatch(r"[A-Za-z0-9_.,=+-]+", name), name
        assert len(name) <= LONGEST_NAME
        assert name not in (".", "..")
    long = {f"label{i}": {f"{i}" * 60: {"data.seed": i}, "b": {"score.seed": i}} for i in range(6)}
    found = names(HYPER.product([HYPER.named(label, {k: {} for k in of}) for label, of in long.items()]))
    assert len(set(found)) == 64
    assert max(map(len, found)) == LONGEST_NAME


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ([{"prune.ratio": 0.1}, {"prune.ratio": 0.1}], r"lists only twice: remove one of them"),
        (
            [{"prune.ratio": ratio} for ratio in (0.1, 0.1 + 1e-12, 0.2)],
            r"two runs have the name ratio=0.1 \(prune.ratio was .*name them with hyper.named",
        ),
        ([{"recover.name": "sft"}, {"recover.name": "SFT"}], r"two runs have the name name=SFT"),
        ([], r"lists 0 runs"),
        (None, r"must return a list of overrides"),
        ([("prune.ratio", 0.1)], r"must return a list of overrides"),
    ],
)
def test_bad_sweeps_are_refused(points, told):
    refused(told, sweep_runs, Experiment(), points)


def test_overrides_are_settings_of_one_experiment():
    base = override(Experiment(), {"score": {"options": {"a": 1}}})
    (run,) = sweep_runs(base, [{"score.options.b": 2}])
    assert run.experiment.score.options == {"a": 1, "b": 2}  # what a mapping holds beside stays
    # Settings are checked together: without the first alone no loss would have a weight.
    (run,) = sweep_runs(Experiment(), [{"recover.losses.ce": 0.0, "recover.losses.l2": 1.0}])
    assert run.experiment.recover.losses.weights() == {"ce": 0.0, "l2": 1.0, "kl": 0.0, "rkl": 0.0, "cosine": 0.0}
    none = {"recover": {"method": "none"}}  # nothing trained is no recovery
    for changes, recoveries in (({"recover_variants": {"off": none, "sft": {}}}, ["depth-sft"]), (none, [])):
        (pruned,) = variants_of(override(Experiment(), {"prune": {"ratio": 0.1}, **changes}))
        assert [run.name for run in pruned.recoveries] == recoveries
