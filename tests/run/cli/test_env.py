"""`vlmprune env` and `vlmprune --version`: what a bug report needs, on a machine in trouble as well."""

import importlib.metadata
import platform

import jax

from vlmprune_jax.run.cli.main import main


def shown(capsys, *argv):
    assert main(argv) == 0
    return " ".join(capsys.readouterr().out.split())


def test_versions_and_devices(capsys, monkeypatch):
    monkeypatch.setenv("JAX_SOMETHING", "1")
    out = shown(capsys, "env")
    assert out.startswith(f"vlmprune {importlib.metadata.version('vlmprune-jax')}")
    assert f"python {platform.python_version()}, " in out
    assert "devices 8 on cpu: " in out
    assert f"jax {jax.__version__}, " in out
    assert "jax-cuda12-plugin" in out.partition(" missing ")[2]
    assert "JAX_SOMETHING=1" in out
    assert shown(capsys, "--version") == f"vlmprune {importlib.metadata.version('vlmprune-jax')}"


def test_without_devices_it_says_why(capsys, monkeypatch):
    def none():
        raise RuntimeError("no TPU here")

    monkeypatch.setattr(jax, "devices", none)
    assert "devices none: JAX_PLATFORMS=cpu: jax cannot start this platform (no TPU here): " in shown(capsys, "env")
