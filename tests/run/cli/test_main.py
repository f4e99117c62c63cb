"""The commands as a person meets them: help, versions, configs by name, settings by flag, typos, exit codes."""

import importlib.metadata
import platform
import re
import subprocess
import sys
from unittest import mock

import jax
import pytest
from experiment_cases import record, write_experiment
from repository import ROOT

import vlmprune_jax as vp
from vlmprune_jax.base.settings import settings_of
from vlmprune_jax.run.cli.config_files import read_experiment
from vlmprune_jax.run.cli.flags import parse
from vlmprune_jax.run.cli.main import COMMANDS, main
from vlmprune_jax.run.cli.stages import stage_command
from vlmprune_jax.run.experiment.spec import sections


def printed(capsys, *argv, code=0):
    """What a command prints before it exits with this code: one line of errors if it is 2."""
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert (err.startswith("vlmprune: error: "), err.count("\n")) == (code == 2, code == 2), err
    return err or out


def test_overview(capsys):
    out = printed(capsys)
    assert printed(capsys, "--help") == printed(capsys, "help") == out
    for name in COMMANDS:
        assert out.count(f"\n  {name} ") == 1
    assert max(map(len, out.splitlines())) <= 80
    titles = ["Run the pipeline or one stage:", "Look at models and results:", "Tools:", "Examples:"]
    assert [line for line in out.splitlines() if re.fullmatch("[A-Z].*:", line)] == titles


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys, name):
    out = printed(capsys, name, "--help")
    assert out.startswith(f"vlmprune {name}")
    assert "--debug" in out
    of_their_own = {"inspect": "HF_DIR", "diff": "diff A B", "tfds": "--out", "help": "NAME", "recommend": "--ratio",
                    "bench": "--against", "chat": "QUESTION", "env": "bug report", "vocabulary": "--sizes"}  # fmt: skip
    assert of_their_own.get(name, "--workdir") in out


def test_a_typo_is_told_and_help_does_not_load_jax(capsys):
    assert printed(capsys, "rnu", code=2) == "vlmprune: error: no command 'rnu'; did you mean 'run'?\n"
    code = (
        "import sys; from vlmprune_jax.run.cli.main import main; print(main(['run', '--help']), 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0 False"


USERS = """import vlmprune_jax as vp
from vlmprune_jax.run.cli.config_files import experiment_config


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
        line = printed(capsys, "mine", f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/w", code=2)
    finally:
        vp.stages.pop("mine", None)
    assert f"vlmprune mine failed at {tmp_path}/c.py:6 with IndexError: list index out of range: correct that" in line


# --- configs and flags ------------------------------------------------------------------------------------------------


def test_a_config_that_comes_with_vlmprune_is_found_by_name(capsys):
    for config in ("demo:quick", "llava15_7b:width,0.3,uniform", str(ROOT / "configs" / "bunny_3b.py")):
        assert "no workdir given" in printed(capsys, "run", f"--config={config}", code=2)
    wrong = printed(capsys, "run", "--config", "demos", code=2)
    assert "--config=demos: no such file, and no shipped config of this name; did you mean" in wrong
    assert "(--config=NAME): bunny_3b, demo,\n" in printed(capsys)


CONFIG = """
from vlmprune_jax.run.cli.config_files import experiment_config

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
        (["--config={file}", "--config.score.by_kind=True"], "score has no setting 'by_kind': it is now"),
        (["--config={file}", "--config.prune.ratoi=0.2"], "config.prune has no setting 'ratoi'; did you mean 'ratio'?"),
        (["--config={file}", "--config.prune.ratio=much"], "could not convert string to float"),
        (["--config={file}", "--config.prune.ratio.x=1"], "config.prune.ratio is a setting, not a section"),
        (["--config.prune.ratio=0.2"], "name the file as well (--config=FILE.py)"),
        (["--config=nowhere.py"], "--config=nowhere.py: cannot be loaded"),
        (["--config={file}:third"], "cannot be loaded ('third')"),
        (["--config={file}", "--config"], "Missing value for flag --config"),
        (["--config={file}", "config.prune.ratio=0.2"], "takes no argument 'config.prune.ratio=0.2': write settings"),
        (["--config={dir}/dict.py"], "dict.py: cannot be loaded (get_config"),
        (["--config={file}", "--config.data.threads=None"], "config.data.threads=None must be a whole number"),
        ([], "no config given: add --config=FILE.py"),
        (["--config={file}"], "no workdir given: add --workdir=DIR"),
        (["--config={file}", "--workdir={file}"], "is a file, expected a folder"),
        (["--config={file}", "--workdir={dir}/w"], "model.hf_dir is not set"),
        (["--config={file}", "--workdir={dir}/w", "--config.model.hf_dir=/no/where"], "/no/where: no such folder"),
        (["--config={file}", "--workdir={dir}/w", "--config.model.hf_dir={dir}"], "data.eval is not set"),
        (["--config={file}", "--workdir={dir}/w", "--config.export.layout=hf"], "export.layout 'hf' is not one of"),
        (["--config={file}", "--workdir={dir}/w", "--config.score.depth=taylor"], "use block_influence or angular or"),
        (["--config={file}", "--workdir={dir}/w", "--config.score.width=block_influence"], "use taylor or activation"),
        (["--config={file}", "--workdir={dir}/w", "--config.prune.steps=2"], "is only for prune.method='width'"),
    ],
)
def test_wrong_command_lines(capsys, config_file, flags, message):
    filled = [flag.format(file=config_file, dir=config_file.parent) for flag in flags]
    assert message in printed(capsys, "run", *filled, code=2)
    assert not (config_file.parent / "w").exists()


def test_a_setting_can_be_unset(config_file, monkeypatch):
    """What a config file sets, where a recipe or another variant sets something else instead."""
    seen, command = [], "vlmprune_jax.run.cli.stages.run_command"
    monkeypatch.setattr(command, lambda _, flags: seen.append(read_experiment(flags.config)))
    texts = ["--config.data.system=", "--config.data.images=None", "--config.prune.layers_removed=3"]
    texts += ["--config.model.vision_dir", "None"]
    assert main(["run", f"--config={config_file}:half", "--config.prune.ratio=None", *texts]) == 0
    (experiment,) = seen
    assert (experiment.prune.ratio, experiment.prune.layers_removed) == (None, 3)
    assert (experiment.data.system, experiment.data.images, experiment.model.vision_dir) == ("", None, None)


def test_every_spelling_of_a_setting_replaces_that_of_a_variant(config_file):
    spellings = ["--config.data.threads=2", "-config.prune.ratio", "0.4", "--noconfig.data.truncate"]
    found = parse("run", stage_command("run"), [f"--config={config_file}", *spellings])
    assert found.explicit == ["data.threads", "prune.ratio", "data.truncate"]


def test_a_report_is_of_all_models(capsys, tmp_path):
    for flag in ("--dry_run", "--only=width"):
        assert "leave --dry_run and --only out" in printed(capsys, "report", f"--workdir={tmp_path}", flag, code=2)


# --- `vlmprune help NAME` --------------------------------------------------------------------------------------------


def test_help_of_settings(capsys):
    told = "recover.losses.kl = 0.0\n  Weight of the forward KL divergence (teacher to student) at `temperature`.\n"
    told += "  number (weight), at least 0\n  stages that run again after a change: recover\n"
    assert [printed(capsys, "help", name) for name in ("recover.losses.kl", "losses.kl", "kl")] == [told] * 3
    out = printed(capsys, "help", "lora", "group_by")
    assert [line.split(" = ")[0] for line in out.splitlines() if line[:1] not in ("", " ") and " = " in line] == [
        *("recover.lora.rank", "recover.lora.alpha", "recover.lora.dropout", "recover.lora.targets", "data.group_by")
    ]
    assert "section recover.lora: " in out
    assert "  text, one of none, length, modality_length" in out
    assert "after a change: none" in printed(capsys, "help", "log_every")
    assert printed(capsys, "help", "temprature", code=2).endswith("'temprature'; did you mean 'temperature'?\n")
    assert "(sections: model, data, score, " in printed(capsys, "help", "xyzzy", code=2)


def test_help_of_every_section_is_wrapped_to_the_terminal(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    for place, section in sections().items():
        name = place.removesuffix(".NAME")
        out = printed(capsys, "help", name)
        assert out.startswith(f"section {name}: {' '.join(section.__doc__.split())}\n")
        for setting_name, about in settings_of(section).items():
            line = f"{place}.{setting_name} = {getattr(section, setting_name)!r}\n  {about.sentence}\n"
            assert not about.offered or line in out
    for name in ("prune_variants", "recover_variants"):
        assert printed(capsys, "help", name).startswith(f"{name} = {{}}\n  Ways to ")
    whole = printed(capsys, "help", "recover")
    assert max(map(len, whole.splitlines())) > 120
    monkeypatch.setenv("COLUMNS", "60")
    out = printed(capsys, "help", "recover")
    assert (max(map(len, out.splitlines())) <= 60, out.split()) == (True, whole.split())


def test_versions_and_devices(capsys, goldens, monkeypatch, tmp_path):
    version = f"vlmprune {importlib.metadata.version('vlmprune-jax')}"
    monkeypatch.setenv("JAX_SOMETHING", "1")
    out = " ".join(printed(capsys, "env").split())
    assert out.startswith(version)
    for fact in (f"python {platform.python_version()}, ", "devices 8 on cpu: ", f"jax {jax.__version__}, "):
        assert fact in out
    assert "jax-cuda12-plugin" in out.partition(" missing ")[2]
    assert "JAX_SOMETHING=1" in out
    assert printed(capsys, "--version").strip() == version

    monkeypatch.setattr(jax, "devices", mock.Mock(side_effect=RuntimeError("no TPU here")))
    out = " ".join(printed(capsys, "env").split())
    assert "devices none: JAX_PLATFORMS=cpu: jax cannot start this platform (no TPU here): " in out
    flag = write_experiment(tmp_path, goldens, [record("r", None, "Is it?", "yes")])
    out = printed(capsys, "score", flag, f"--workdir={tmp_path}/w", code=2)
    assert "JAX_PLATFORMS=cpu: jax cannot start this platform (no TPU here): " in out
