"""The wheel: an installed package finds the configs that come with it by name."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile

import yaml
from hatchling.builders.wheel import WheelBuilder
from repository import ROOT

from vlmprune_jax.run.experiment.recipes import shipped_configs

SCRIPT = """
from pathlib import Path
from vlmprune_jax.run.cli.config_files import shipped_config
from vlmprune_jax.run.experiment.recipes import shipped_configs
print(*shipped_configs(), sep=",")
print(next(iter(shipped_configs().values())).is_relative_to(Path.cwd()))
print(shipped_config("llava15_7b:depth,0.3").prune.layers_removed, shipped_config("sweeps/demo_cut").recover.name)
"""


def test_an_installed_package_finds_its_configs(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path / "dist"), versions=["standard"])
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path / "site", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [",".join(shipped_configs()), "True", "10 sft_l2"]
    assert {"demo", "llava15_7b", "sweeps/study_vlm"} <= shipped_configs().keys()


def test_the_container_and_the_release_use_what_there_is():
    """The image copies files of the repository and installs extras that exist; a tag's version is the package's."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    image = (ROOT / "Dockerfile").read_text()
    named = re.findall(r"EXTRAS=([\w,]+)", image + (ROOT / "launch/gke.sh").read_text())
    assert {extra for names in named for extra in names.split(",")} == {"demo", "cuda", "tpu"} <= extras.keys()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", image, re.MULTILINE) for name in line.split()]
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / name).exists() for name in copied)
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    steps = [step.get("run", "") for step in release["jobs"]["build"]["steps"]]
    assert [step for step in steps if "build" in step or "twine check" in step]
    assert release["jobs"]["publish"]["needs"] == "build"
