"""The wheel: an installed package finds the configs that come with it by name."""

import os
import subprocess
import sys
import zipfile

from hatchling.builders.wheel import WheelBuilder
from repository import ROOT

from vlmprune_jax.cli.flags import shipped_configs

SCRIPT = """
from pathlib import Path
from vlmprune_jax.cli.config_files import shipped_config
from vlmprune_jax.cli.flags import shipped_configs
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
