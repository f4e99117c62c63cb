"""Config files: every setting is there, recipes and shipped configs load, and what is wrong is told."""

import dataclasses
import re
from pathlib import Path

import pytest
from refusal import refused
from repository import ROOT

from vlmprune_jax.base.settings import override
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.run.cli.config_files import (
    experiment_config,
    placed,
    read_experiment,
    read_hyper,
    shipped_config,
    starting_point,
)
from vlmprune_jax.run.cli.flags import parse
from vlmprune_jax.run.cli.stages import stage_command
from vlmprune_jax.run.cli.tools import TOOLS
from vlmprune_jax.run.experiment.arguments import plan_config, recover_config
from vlmprune_jax.run.experiment.recipes import recipe, recipes
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.experiment.variants import variants_of


def test_hub_ids_become_folders(monkeypatch, tmp_path):
    monkeypatch.setattr("vlmprune_jax.io.checkpoints.read.resolve", lambda name: tmp_path / name)
    config = experiment_config()
    config.model.hf_dir, config.model.vision_dir = "org/model", "org/tower"
    model = placed(read_experiment(config), tmp_path / "w").model
    assert (model.hf_dir, model.vision_dir) == (str(tmp_path / "org/model"), str(tmp_path / "org/tower"))
    config = experiment_config()
    assert placed(read_experiment(config), tmp_path / "w").model == Experiment().model
    assert override(Experiment(), config.to_dict()) == Experiment()


def test_a_dictionary_changes_a_section_of_a_config():
    """At any depth, as a ConfigDict too; other settings stay, variants are no section, and a typo is refused."""
    config = experiment_config(recipe="llava")
    config.recover.losses = {"kl": 0.5}
    config.recover = {"lora": {"rank": 4}, "epochs": 2}
    config["mesh"] = {"fsdp": 8}
    config.data = experiment_config().data
    changes = {"recover": {"losses": {"kl": 0.5}, "lora": {"rank": 4}, "epochs": 2.0}, "mesh": {"fsdp": 8}}
    expected = override(override(Experiment(), recipe("llava") | {"data": {}}), changes)
    assert override(Experiment(), config.lock().to_dict()) == expected
    for name in ("one", "two"):
        config.recover_variants = {name: {"recover": {"epochs": 1.0}}}
    assert config.recover_variants.to_dict() == {"two": {"recover": {"epochs": 1.0}}}
    config = experiment_config()
    config.recover.losses = {"kll": 0.5}
    refused(r"config.recover.losses has no setting 'kll'; did you mean 'kl'", override, Experiment(), config.to_dict())


@pytest.mark.parametrize("name", recipes())
def test_recipes_are_where_a_config_starts(name):
    """Every setting is written out, so that it is recorded, and what is set afterwards wins."""
    config = experiment_config(recipe=name)
    config.recover.learning_rate = 3e-3
    experiment = override(Experiment(), config.to_dict())
    assert experiment == override(override(Experiment(), recipe(name)), {"recover": {"learning_rate": 3e-3}})
    built = recover_config(experiment.recover)
    assert built.learning_rate == 3e-3
    facts = (built.lora.rank, built.lora.alpha, built.weight_decay, built.projector_learning_rate)
    assert facts == ((16, 32.0, 0.05, None) if name == "internvl" else (128, 256.0, 0.0, 2e-5))
    assert built.losses.teacher_inputs == ("own" if name == "internvl" else "student")
    assert (built.schedule, built.warmup_ratio, built.epochs, built.batch_size) == ("cosine", 0.03, 1.0, 128)
    refused(f"no recipe '{name}x'; did you mean '{name}'", experiment_config, recipe=f"{name}x")


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_shipped_configs_are_experiments(file):
    text = file.read_text()
    assert "vlmprune " in text.split('"""')[1]  # the docstring has the command
    space: dict = {}
    exec(compile(text, str(file), "exec"), space)
    experiment = override(Experiment(), space["get_config"]().to_dict())
    for run in variants_of(experiment):
        plan_config(run.experiment.prune, run.experiment.model, run.experiment.data, run.experiment.export).check()
    for values in list(experiment.recover_variants.values()) or [{}]:
        recover_config(override(experiment, values).recover)


YAML = """
shipped_config: demo
prune_variants: {}
prune: {method: width, ratio: 0.3}
data: {system: 1e4x}
recover:
  learning_rate: 1e-4
  losses: {l2: 0.5, l2_layers: [-1]}
"""


def test_a_yaml_file_is_a_config(tmp_path):
    """It has the names of a Python config, and flags override its settings."""
    (tmp_path / "my.yaml").write_text(YAML)
    config = shipped_config("demo")
    config.prune_variants = {}
    config.prune = {"method": "width", "ratio": 0.2}
    config.data.system = "1e4x"
    config.recover = {"learning_rate": 1e-4, "losses": {"l2": 0.5, "l2_layers": (-1,)}}
    flags = parse("run", stage_command("run"), [f"--config={tmp_path}/my.yaml", "--config.prune.ratio=0.2"])
    assert read_experiment(flags.config, explicit=flags.explicit) == override(Experiment(), config.to_dict())
    assert starting_point(flags) == override(Experiment(), shipped_config("demo").to_dict())
    (tmp_path / "my.yml").write_text("recipe: internvl")
    flags = parse("plan", TOOLS["plan"], [f"--config={tmp_path}/my.yml"])
    assert read_experiment(flags.config) == override(Experiment(), recipe("internvl"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune: {ratio: 0.3", "cannot be read (expected ',' or '}', but got '<stream end>' in \"my.yaml\", line 1"),
        ("- prune", "does not have the expected content (Expected `object`, got `array`)"),
        ("prnue: {ratio: 0.3}", "config has no setting 'prnue'; did you mean 'prune'?"),
        ("1: 2", "config has no setting '1' (known: model, data,"),
        ("prune: 0.3", "config.prune=0.3: is a section of settings"),
        ("prune: {ratio: 2026-01-01}", "cannot be read (Object of type date is not JSON"),
        ("prune: {ratio: 0.3}\nprune: {}", '(a name occurs twice in this section in "my.yaml", line 1'),
        ("a: &a [x, x]\nb: [*a, *a]", 'cannot be read (aliases are not allowed in "my.yaml", line 2'),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor for the tag"),
        ("[" * 5000, "cannot be read (too deeply nested)"),
        ("a: !!int ''", "cannot be read ("),
        ("a: " + "x" * 300_000, "has 300,003 bytes, more than the maximum of 262,144 for such a file"),
        ("shipped_config: evil.py", "shipped_config 'evil.py' is not one of bunny_3b, demo,"),
        ("shipped_config: [demo]", "(Expected `str`, got `array` - at `$.shipped_config`)"),
        ("recipe: lava", "no recipe 'lava'; did you mean 'llava'"),
    ],
)
def test_wrong_yaml(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("raise SystemExit('executed')")
    Path("my.yaml").write_text(text)
    refused(re.escape(message), parse, "run", stage_command("run"), ["--config=my.yaml"])


def test_a_sweep_in_yaml_is_all_combinations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("prune: {method: depth}\nsweep: {prune.ratio: [0.1, 0.3], recover.seed: [1, 2]}")
    pairs = [(0.1, 1), (0.1, 2), (0.3, 1), (0.3, 2)]
    assert read_hyper("my.yaml") == [{"prune.ratio": ratio, "recover.seed": seed} for ratio, seed in pairs]
    assert parse("run", stage_command("run"), ["--config=my.yaml"]).config.prune.method == "depth"
    for text, fact in {
        "prune: {ratio: 0.3}": "lists no values to sweep: add `sweep: {prune.ratio:",
        "sweep: {prune.ratio: []}": "lists no values to sweep",
        "sweep: {prune.ratio: 0.3}": "Expected `array`, got `float`",
    }.items():
        Path("my.yaml").write_text(text)
        refused(fact, read_hyper, "my.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recover": {"lora": {"rank": 2.5}}}, "config.recover.lora.rank=2.5 must be a whole number"),
        ({"recover": {"lora": {"targets": "q_proj"}}}, "config.recover.lora.targets='q_proj' must be a tuple"),
        ({"score": {"reference_compat": 1}}, "must be True or False"),
        ({"data": {"threads": -1}}, "data.threads=-1 must be at least 0"),
        ({"prune": {"steps": 0}}, "prune.steps=0 must be at least 1"),
        ({"recover": {"seed": -1}}, "recover.seed=-1 must be at least 0 and below 2**32"),
    ],
)
def test_wrong_settings(values, message):
    refused(re.escape(message), override, Experiment(), values)


def test_settings_reach_the_library():
    spec = override(RecoverConfig(), {"steps": 7, "losses": {"l2": 0.5, "l2_layers": [-1, 2]}, "learning_rate": 1})
    built = recover_config(spec)
    assert (built.steps, built.num_steps(1000), built.losses.l2_layers, built.adapters.rank) == (7, 7, (-1, 2), 128)
    assert recover_config(dataclasses.replace(spec, trainable="projector")).adapters is None
    cached = override(RecoverConfig(), {"steps": 7, "losses": {"ce": 1.0, "l2": 0.0}, "teacher_cache": "somewhere"})
    assert recover_config(cached).losses.teacher_top_k == 0  # of use to other variants of the experiment
