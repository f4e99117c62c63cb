"""The commands as a person meets them: help, typos, exit codes, and the experiments that configs describe."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

import vlmprune_jax as vp
from vlmprune_jax.cli.config_files import experiment_config, read_experiment, to_experiment
from vlmprune_jax.cli.main import COMMANDS, main
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.settings import override
from vlmprune_jax.experiment.arguments import plan_config, recover_config
from vlmprune_jax.experiment.recipes import recipe, recipes
from vlmprune_jax.experiment.spec import Experiment, RecoverSpec
from vlmprune_jax.experiment.variants import prune_runs


def failing(capsys, *argv):
    """The one line that a command prints when it exits with code 2."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("vlmprune: error: ")
    assert err.count("\n") == 1, err
    return out + err


def test_hub_ids_become_folders(monkeypatch, tmp_path):
    monkeypatch.setattr("vlmprune_jax.hf.read.resolve", lambda name: tmp_path / name)
    config = experiment_config()
    config.model.hf_dir, config.model.vision_dir = "org/model", "org/tower"
    model = to_experiment(config, str(tmp_path / "w"))[0].model
    assert (model.hf_dir, model.vision_dir) == (str(tmp_path / "org/model"), str(tmp_path / "org/tower"))
    config = experiment_config()
    assert to_experiment(config, str(tmp_path / "w"))[0].model == Experiment().model


def test_a_config_that_comes_with_vlmprune_is_found_by_name(capsys):
    for config in ("demo:quick", "llava15_7b:width,0.3,uniform", str(ROOT / "configs" / "bunny_3b.py")):
        assert main(["run", f"--config={config}"]) == 2
        assert "no workdir given" in capsys.readouterr().err
    assert main(["run", "--config", "demos"]) == 2
    assert "--config=demos: no such file, and no shipped config of this name; did you mean" in capsys.readouterr().err
    assert main([]) == 0
    assert "(--config=NAME): bunny_3b, demo, demo_reconstruct, gemma4_e4b,\n" in capsys.readouterr().out


# --- help and typos --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["help"]])
def test_overview(capsys, argv):
    assert main(argv) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys, name):
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"vlmprune {name}")
    assert "--debug" in out
    of_their_own = {"inspect": "HF_DIR", "diff": "diff A B", "tfds": "--out", "help": "NAME", "recommend": "--ratio",
                    "bench": "--against", "chat": "QUESTION", "env": "bug report", "vocabulary": "--sizes"}  # fmt: skip
    assert of_their_own.get(name, "--workdir") in out


def test_module_runs_and_help_does_not_load_jax():
    code = "import sys; from vlmprune_jax.cli.main import main; main(['run', '--help']); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False"
    done = subprocess.run([sys.executable, "-m", "vlmprune_jax", "rnu"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "vlmprune: error: no command 'rnu'; did you mean 'run'?\n")


CONFIG = """
from vlmprune_jax.cli.config_files import experiment_config

def get_config(variant="none"):
    config = experiment_config()
    config.prune = {"ratio": {"none": 0.3, "half": 0.5}[variant]}
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(CONFIG)
    (tmp_path / "dict.py").write_text("def get_config():\n    return {}\n")
    return path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdri=x"], "vlmprune run has no flag --workdri; did you mean 'workdir'?"),
        (["--config={file}", "--config.prune.ratoi=0.2"], "config.prune has no 'ratoi'; did you mean 'ratio'?"),
        (["--config={file}", "--config.prnue.ratio=0.2"], "config has no 'prnue'; did you mean 'prune'?"),
        (["--config={file}", "--config.prune.ratio=much"], "could not convert string to float"),
        (["--config={file}", "--config.prune.ratio.x=1"], "config.prune.ratio is a value, not a section"),
        (["--config.prune.ratio=0.2"], "give the file as well, --config=FILE.py"),
        (["--config=nowhere.py"], "--config=nowhere.py: cannot be loaded"),
        (["--config={file}:third"], "cannot be loaded ('third')"),
        (
            ["--config={file}", "config.prune.ratio=0.2"],
            "takes no argument 'config.prune.ratio=0.2': settings begin with",
        ),
        (
            ["--config={dir}/dict.py"],
            "dict.py: cannot be loaded (get_config() gives a dict, not what experiment_config()",
        ),
        (["--config={file}", "--config.data.threads=None"], "config.data.threads=None must be a whole number"),
        ([], "no experiment given: --config=FILE.py"),
        (["--config={file}"], "no workdir given: --workdir=DIR"),
        (["--config={file}", "--workdir={file}"], "is a file, give a folder"),
        (["--config={file}", "--workdir={dir}/w"], "model.hf_dir is not set"),
        (["--config={file}", "--workdir={dir}/w", "--config.model.hf_dir=/no/where"], "/no/where: no such folder"),
        (["--config={file}", "--workdir={dir}/w", "--config.data.source=web"], "data.source 'web' is not one of"),
        (["--config={file}", "--workdir={dir}/w", "--config.model.hf_dir={dir}"], "data.eval is not set"),
        (
            ["--config={file}", "--workdir={dir}/w", "--config.export.layout=hf"],
            "export.layout 'hf' is not one of source",
        ),
        (
            ["--config={file}", "--workdir={dir}/w", "--config.score.depth=taylor"],
            "score.depth='taylor' scores widths, not layers: use block_influence or angular or greedy_loss or random",
        ),
        (
            ["--config={file}", "--workdir={dir}/w", "--config.score.width=block_influence"],
            "score.width='block_influence' scores layers, not widths: use taylor or activation or fluctuation or l1",
        ),
        (
            ["--config={file}", "--workdir={dir}/w", "--config.prune.steps=2"],
            "prune.steps=2 is for prune.method='width': depth and hybrid prune in one step",
        ),
        (["--config={file}", "--workdir={dir}/w", "--config.prune.method=widht"], "did you mean 'width'?"),
        (["--config={file}", "--workdir={dir}/w", "--config.recover.remat=ful"], "did you mean 'full'?"),
    ],
)
def test_wrong_command_lines(capsys, config_file, flags, message):
    filled = [flag.format(file=config_file, dir=config_file.parent) for flag in flags]
    assert message in failing(capsys, "run", *filled)
    assert not (config_file.parent / "w").exists()


def test_a_setting_can_be_unset(config_file, monkeypatch):
    """What a config file sets, where a recipe or another variant sets something else instead."""
    seen = []
    monkeypatch.setattr(
        "vlmprune_jax.cli.stages.run_command", lambda _, flags: seen.append(read_experiment(flags.config))
    )
    texts = ["--config.data.system=", "--config.data.images=None", "--config.prune.layers_removed=3"]
    assert main(["run", f"--config={config_file}:half", "--config.prune.ratio=None", *texts]) == 0
    (experiment,) = seen
    assert (experiment.prune.ratio, experiment.prune.layers_removed) == (None, 3)
    assert (experiment.data.system, experiment.data.images) == ("", None)


def test_debug_shows_where(capsys):
    assert main(["inspect", "/no/where", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("vlmprune: error: /no/where: no such folder")


@pytest.mark.parametrize(("file", "where"), [(None, "W"), ("/a/b.json", "/a/b.json")])
def test_a_full_disk_anywhere(capsys, monkeypatch, file, where):
    def full(name, flags):
        raise OSError(errno.ENOSPC, "No space left on device", file)

    monkeypatch.setattr("vlmprune_jax.cli.stages.run_command", full)
    line = failing(capsys, "run", "--workdir=W")
    assert f"error: {where}: No space left on device: make room or mend the disk, and run the same command" in line


@pytest.mark.parametrize(("command", "then"), [("inspect", "begins anew"), ("score", "continues")])
def test_interrupt(capsys, monkeypatch, command, then):
    def stop(*arguments):
        raise KeyboardInterrupt

    place = "inspect.run" if command == "inspect" else "stages.run_command"
    monkeypatch.setattr(f"vlmprune_jax.cli.{place}", stop)
    assert main([command] + ["x"] * (command == "inspect")) == 130
    assert f"the same command {then}" in capsys.readouterr().err


def test_inspect(capsys, goldens):
    assert main(["inspect", str(goldens / "ckpt/llava_hf"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["layout"], found["text"]["layers"]) == ("llava", "transformers", 6)
    parts = found["parameters"]
    assert parts["total"] == parts["text"] + parts["vision"] + parts["projector"]
    assert found["prunable"]["most_by_depth"] == pytest.approx(5 * found["prunable"]["layer"])
    assert main(["inspect", str(goldens / "ckpt/llama_gqa")]) == 0
    out = capsys.readouterr().out
    assert "3 x (6/2 heads, 64 neurons)" in out
    assert max(map(len, out.splitlines())) <= 120
    for family, said in {
        "qwen2_5_vl": [
            "are computed: 4 x (5 heads, 52 neurons), 2 of them without windows\n",
            "images of any size, a token for 2 x 2 patches of 5\n",
            "at most 19.3 % by depth",
        ],
        "qwen3_vl": ["at most 25.2 % by depth", "of the tower is 3.5 %", "              all of them stay, at most "],
    }.items():
        assert main(["inspect", str(goldens / "families" / family / "ckpt")]) == 0
        out = capsys.readouterr().out
        assert [line for line in said if line not in out] == []
    assert "takes one folder" in failing(capsys, "inspect")
    assert "set vision_dir (--config.model.vision_dir) to the tower's folder" in failing(
        capsys, "inspect", str(goldens / "ckpt/bunny")
    )


# --- experiments -----------------------------------------------------------------------------------------------------


def test_config_holds_every_setting_and_comes_back():
    assert override(Experiment(), experiment_config().to_dict()) == Experiment()


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
    with pytest.raises(UserError, match=r"config.recover.losses has no 'kll'; did you mean 'kl'"):
        override(Experiment(), config.to_dict())


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
    with pytest.raises(UserError, match=f"no recipe '{name}x'; did you mean '{name}'"):
        experiment_config(recipe=f"{name}x")


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_shipped_configs_are_experiments(file):
    text = file.read_text()
    assert "vlmprune " in text.split('"""')[1]  # the docstring has the command
    space: dict = {}
    exec(compile(text, str(file), "exec"), space)
    experiment = override(Experiment(), space["get_config"]().to_dict())
    for run in prune_runs(experiment, Path("W")):
        plan_config(run.experiment.prune, run.experiment.model, run.experiment.data, run.experiment.export).check()
    for values in list(experiment.recover_variants.values()) or [{}]:
        recover_config(override(experiment, values).recover)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prune": {"ratoi": 1}}, "config.prune has no 'ratoi'; did you mean 'ratio'?"),
        ({"prune": 3}, "config.prune=3: is a section: set its settings by name"),
        ({"prune": {"ratio": "a"}}, "config.prune.ratio='a' must be a number or None"),
        ({"recover": {"lora": {"rank": 2.5}}}, "config.recover.lora.rank=2.5 must be a whole number"),
        ({"recover": {"lora": {"targets": "q_proj"}}}, "config.recover.lora.targets='q_proj' must be a tuple"),
        ({"score": {"reference_compat": 1}}, "must be True or False"),
        ({"score": {"samples": -1}}, "score.samples=-1 must be at least 1"),
        ({"data": {"threads": -1}}, "data.threads=-1 must be at least 0"),
        ({"data": {"max_length": 0}}, "data.max_length=0 must be at least 1"),
        ({"evaluate": {"questions": 0}}, "evaluate.questions=0 must be at least 1"),
        ({"prune": {"steps": 0}}, "prune.steps=0 must be at least 1"),
        ({"recover": {"seed": -1}}, "recover.seed=-1 must be at least 0 and below 2**32"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(UserError) as error:
        override(Experiment(), values)
    assert message in str(error.value)


def test_settings_reach_the_library():
    spec = override(RecoverSpec(), {"steps": 7, "losses": {"l2": 0.5, "l2_layers": [-1, 2]}, "learning_rate": 1})
    built = recover_config(spec)
    assert (built.steps, built.num_steps(1000), built.losses.l2_layers, built.adapters.rank) == (7, 7, (-1, 2), 128)
    assert recover_config(dataclasses.replace(spec, trainable="projector")).adapters is None
    cached = override(RecoverSpec(), {"steps": 7, "losses": {"ce": 1.0, "l2": 0.0}, "teacher_cache": "somewhere"})
    assert recover_config(cached).losses.teacher_top_k == 0  # of use to other variants of the experiment


USERS = """import vlmprune_jax as vp
from vlmprune_jax.cli.config_files import experiment_config


def wrong(work):
    return [][0]


vp.stages["mine"] = vp.Stage("Do it.", wrong, outputs=("mine.json",))


def get_config():
    config = experiment_config()
    config.model.hf_dir = "{folder}"
    return config
"""


def test_errors_in_a_file_of_the_users_name_its_line(goldens, tmp_path, capsys):
    """Of whatever a config adds: here a stage; not called a defect of this package."""
    (tmp_path / "c.py").write_text(USERS.format(folder=goldens / "ckpt/llama_gqa"))
    try:
        line = failing(capsys, "mine", f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/w")
    finally:
        vp.stages.pop("mine", None)
    assert f"vlmprune mine failed at {tmp_path}/c.py:6 with IndexError: list index out of range: correct that" in line


def test_devices_that_are_not_there(tmp_path):
    """In a process of its own, before jax has started any."""
    command = [sys.executable, "-m", "vlmprune_jax", "score", "--config=demo", f"--workdir={tmp_path}"]
    made = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cuda"}, capture_output=True, text=True)
    assert (made.returncode, made.stderr.count("\n")) == (2, 1)
    assert "JAX_PLATFORMS=cuda: jax cannot start" in made.stderr
