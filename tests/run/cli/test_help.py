"""`vlmprune help NAME`: settings and sections by name."""

import importlib.metadata
import platform

import jax

from vlmprune_jax.base.settings import settings_of
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.experiment.spec import sections


def test_help_of_settings(capsys):
    for name in ("recover.losses.kl", "losses.kl", "kl"):
        assert main(["help", name]) == 0
        out = capsys.readouterr().out
        assert out.splitlines() == [
            "recover.losses.kl = 0.0",
            "  Weight of the forward KL divergence (teacher to student) at `temperature`.",
            "  number (weight), at least 0",
            "  stages that run again after a change: recover",
        ]
    assert main(["help", "lora", "group_by"]) == 0
    out = capsys.readouterr().out
    assert [line.split(" = ")[0] for line in out.splitlines() if line[:1] not in ("", " ") and " = " in line] == [
        *("recover.lora.rank", "recover.lora.alpha", "recover.lora.dropout", "recover.lora.targets", "data.group_by")
    ]
    assert "section recover.lora: " in out
    assert "  text, one of none, length, modality_length" in out
    assert main(["help", "log_every"]) == 0
    assert "after a change: none" in capsys.readouterr().out


def test_help_answers_for_every_section_and_the_variants(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    for place, section in sections().items():
        name = place.removesuffix(".NAME")
        assert main(["help", name]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"section {name}: {' '.join(section.__doc__.split())}\n")
        for setting_name, about in settings_of(section).items():
            assert (
                not about.offered
                or f"{place}.{setting_name} = {getattr(section, setting_name)!r}\n  {about.sentence}\n" in out
            )
    for name in ("prune_variants", "recover_variants"):
        assert main(["help", name]) == 0
        assert capsys.readouterr().out.startswith(f"{name} = {{}}\n  Ways to ")


def test_help_is_wrapped_to_the_terminal(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["help", "recover"]) == 0
    whole = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["help", "recover"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, whole.splitlines())) > 120
    assert max(map(len, out.splitlines())) <= 60
    assert out.split() == whole.split()


def test_help_of_what_does_not_exist(capsys):
    assert main(["help", "temprature"]) == 2
    assert capsys.readouterr().err == "vlmprune: error: no setting 'temprature'; did you mean 'temperature'?\n"
    assert main(["help", "xyzzy"]) == 2
    assert "(sections: model, data, score, " in capsys.readouterr().err


# --- `vlmprune env` and `vlmprune --version` -------------------------------------------------------------------------


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
