"""The commands as a person meets them: help, settings by name, versions, typos, exit codes."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys

import jax
import pytest
from repository import ROOT

import vlmprune_jax as vp
from vlmprune_jax.base.settings import settings_of
from vlmprune_jax.run.cli.main import COMMANDS, main
from vlmprune_jax.run.experiment.spec import sections


def printed(capsys, *argv, code=0):
    """What a command prints before it exits with this code: one line of errors if it is 2."""
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert (err.startswith("vlmprune: error: "), err.count("\n")) == (code == 2, code == 2), err
    return err or out


@pytest.mark.parametrize("argv", [[], ["--help"], ["help"]])
def test_overview(capsys, argv):
    out = printed(capsys, *argv)
    for name in COMMANDS:
        assert out.count(f"\n  {name} ") == 1
    assert max(map(len, out.splitlines())) <= 80
    assert [line for line in out.splitlines() if re.fullmatch("[A-Z].*:", line)] == [
        *("Run the pipeline or one stage:", "Look at models and results:", "Tools:", "Examples:")
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys, name):
    out = printed(capsys, name, "--help")
    assert out.startswith(f"vlmprune {name}")
    assert "--debug" in out
    of_their_own = {"inspect": "HF_DIR", "diff": "diff A B", "tfds": "--out", "help": "NAME", "recommend": "--ratio",
                    "bench": "--against", "chat": "QUESTION", "env": "bug report", "vocabulary": "--sizes"}  # fmt: skip
    assert of_their_own.get(name, "--workdir") in out


def test_module_runs_and_help_does_not_load_jax():
    code = (
        "import sys; from vlmprune_jax.run.cli.main import main; main(['run', '--help']); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False"
    done = subprocess.run([sys.executable, "-m", "vlmprune_jax", "rnu"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "vlmprune: error: no command 'rnu'; did you mean 'run'?\n")


def test_debug_shows_where(capsys):
    assert main(["inspect", "/no/where", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("vlmprune: error: /no/where: no such folder")


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


def test_devices_that_are_not_there(tmp_path):
    """In a process of its own, before jax has started any."""
    command = [sys.executable, "-m", "vlmprune_jax", "score", "--config=demo", f"--workdir={tmp_path}"]
    made = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cuda"}, capture_output=True, text=True)
    assert (made.returncode, made.stderr.count("\n")) == (2, 1)
    assert "JAX_PLATFORMS=cuda: jax cannot start" in made.stderr


# --- `vlmprune help NAME` --------------------------------------------------------------------------------------------


def test_help_of_settings(capsys):
    for name in ("recover.losses.kl", "losses.kl", "kl"):
        assert printed(capsys, "help", name).splitlines() == [
            "recover.losses.kl = 0.0",
            "  Weight of the forward KL divergence (teacher to student) at `temperature`.",
            "  number (weight), at least 0",
            "  stages that run again after a change: recover",
        ]
    out = printed(capsys, "help", "lora", "group_by")
    assert [line.split(" = ")[0] for line in out.splitlines() if line[:1] not in ("", " ") and " = " in line] == [
        *("recover.lora.rank", "recover.lora.alpha", "recover.lora.dropout", "recover.lora.targets", "data.group_by")
    ]
    assert "section recover.lora: " in out
    assert "  text, one of none, length, modality_length" in out
    assert "after a change: none" in printed(capsys, "help", "log_every")


def test_help_answers_for_every_section_and_the_variants(capsys, monkeypatch):
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


def test_help_is_wrapped_to_the_terminal(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = printed(capsys, "help", "recover")
    monkeypatch.setenv("COLUMNS", "60")
    out = printed(capsys, "help", "recover")
    assert max(map(len, whole.splitlines())) > 120
    assert max(map(len, out.splitlines())) <= 60
    assert out.split() == whole.split()


def test_help_of_what_does_not_exist(capsys):
    assert printed(capsys, "help", "temprature", code=2).endswith("'temprature'; did you mean 'temperature'?\n")
    assert "(sections: model, data, score, " in printed(capsys, "help", "xyzzy", code=2)


def test_versions_and_devices(capsys, monkeypatch):
    version = f"vlmprune {importlib.metadata.version('vlmprune-jax')}"
    monkeypatch.setenv("JAX_SOMETHING", "1")
    out = " ".join(printed(capsys, "env").split())
    assert out.startswith(version)
    for fact in (f"python {platform.python_version()}, ", "devices 8 on cpu: ", f"jax {jax.__version__}, "):
        assert fact in out
    assert "jax-cuda12-plugin" in out.partition(" missing ")[2]
    assert "JAX_SOMETHING=1" in out
    assert printed(capsys, "--version").strip() == version

    def none():
        raise RuntimeError("no TPU here")

    monkeypatch.setattr(jax, "devices", none)
    out = " ".join(printed(capsys, "env").split())
    assert "devices none: JAX_PLATFORMS=cpu: jax cannot start this platform (no TPU here): " in out
