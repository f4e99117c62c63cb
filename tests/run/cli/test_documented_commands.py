"""Commands on pages for people: each exists, with these flags, settings and files; scripts print what they call."""

import importlib
import os
import re
import shlex
import subprocess

import pytest
from repository import ROOT

from vlmprune_jax.run.cli.flags import define, parse
from vlmprune_jax.run.cli.main import COMMANDS, find_command, script_command
from vlmprune_jax.run.experiment.recipes import shipped_configs

PAGES = ("README.md", "launch/README.md", "docs/**/*.md", "configs/*.py", "configs/sweeps/*.py")
VARIABLES = {
    "BUCKET": "bucket", "PROJECT": "p", "ZONE": "z", "TPU_NAME": "t", "ACCELERATOR": "v5litepod-64", "RUNTIME": "r",
    "CLUSTER": "c", "WORKLOAD": "w", "TPU_TYPE": "v5litepod-64", "IMAGE": "i", "TOPOLOGY": "2x2x2",
    "BLUEPRINT": "b.yaml",
}  # fmt: skip


def lines_of(page):
    """Return the lines of a Python file, or of the code blocks of a page; a backslash joins lines."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".md"):
        blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        text = "\n".join(block for language, block in blocks if language in ("", "bash"))
    return re.sub(r"\\\n\s*", " ", text).splitlines()


def commands():
    """(page, words from the command's name on) of every whole line of `vlmprune` or of a script in tools/."""
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            page = path.relative_to(ROOT).as_posix()
            for line in lines_of(page):
                line = re.sub(r"^(\s*)python tools/(\w+)\.py ", r"\1vlmprune \2 ", line.replace("$BUCKET", "bucket"))
                found = re.match(r"\s*vlmprune (\w[\w-]* .*)", line)
                if found and not re.search(r" \| |\.\.\.|\[", found[1].partition(" #")[0]):
                    yield page, shlex.split(found[1], comments=True)


FOUND = [pytest.param(page, words, id=f"{page}: {' '.join(words)[:50]}") for page, words in commands()]


@pytest.mark.parametrize(("page", "words"), FOUND)
def test_commands_are_as_documented(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *rest = words
    assert name in COMMANDS or (ROOT / f"tools/{name}.py").is_file()
    command = find_command(name) if name in COMMANDS else script_command(importlib.import_module(name))
    config = next((word.removeprefix("--config=") for word in rest if word.startswith("--config=")), None)
    file = (config or "").partition(":")[0]
    if file in shipped_configs() or (file.endswith(".py") and (ROOT / file).is_file()):
        parse(name, command, rest)  # loads it, and refuses settings that do not exist
    else:
        known = set(define(command))
        flags = [word[2:].partition("=")[0].removeprefix("no") for word in rest if word.startswith("--")]
        assert [flag for flag in flags if flag not in known and not flag.startswith("config")] == []


def test_there_are_commands():
    assert len(FOUND) > 15


@pytest.mark.parametrize("page", ["launch/README.md", "docs/how-to/run-on-a-pod.md"])
def test_scripts_are_as_documented(page):
    """Every line that calls a script, with its arguments, prints commands and does nothing."""
    text = (ROOT / page).read_text(encoding="utf-8")
    run = re.search(r"^run=\(.*?\)$", text, re.MULTILINE | re.DOTALL)[0]
    calls = re.findall(r"^(launch/\w+\.sh)(.*?)(?:\s+#.*)?$", text, re.MULTILINE)
    assert len(calls) >= 9
    lines = [f"{script} --dry-run {rest.strip()}" for script, rest in calls]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join([run, *lines])],
        cwd=ROOT, env={**os.environ, **VARIABLES}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= len(lines)
