"""The commands as a person meets them: help, typos, exit codes, and the experiments that configs describe."""

import os
import re
import subprocess
import sys

import pytest
from repository import ROOT

import vlmprune_jax as vp
from vlmprune_jax.run.cli.main import COMMANDS, main


def failing(capsys, *argv):
    """The one line that a command prints when it exits with code 2."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("vlmprune: error: ")
    assert err.count("\n") == 1, err
    return out + err


# --- help and typos --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["help"]])
def test_overview(capsys, argv):
    assert main(argv) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert out.count(f"\n  {name} ") == 1
    assert max(map(len, out.splitlines())) <= 80
    assert [line for line in out.splitlines() if re.fullmatch("[A-Z].*:", line)] == [
        *("Run the pipeline or one stage:", "Look at models and results:", "Tools:", "Examples:")
    ]


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


def test_inspect(capsys, goldens):
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
        "qwen3_vl": [
            "at most 25.2 % by depth",
            "of the vision tower is 3.5 %",
            "              no layer can be removed; at most ",
        ],
    }.items():
        assert main(["inspect", str(goldens / "families" / family / "ckpt")]) == 0
        out = capsys.readouterr().out
        assert [line for line in said if line not in out] == []
    assert "takes one folder" in failing(capsys, "inspect")
    assert "set vision_dir (--config.model.vision_dir) to the tower's folder" in failing(
        capsys, "inspect", str(goldens / "ckpt/bunny")
    )


# --- experiments -----------------------------------------------------------------------------------------------------


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
