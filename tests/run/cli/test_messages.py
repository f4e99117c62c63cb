"""Whatever stops a command is one line and an exit code; what libraries say meanwhile is kept and told at the end."""

import errno
import io
import logging
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import jax
import pytest
from repository import ROOT

from vlmprune_jax.base.console import make_reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import read_bytes
from vlmprune_jax.run.cli.flags import Command
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.cli.messages import kept
from vlmprune_jax.run.cli.tools import TOOLS


class Panic(BaseException):
    """As pyo3's: no Exception."""


def raising(error):
    def run(*arguments):
        raise error

    return run


def ended(capsys, monkeypatch, run, *argv):
    """(exit code, standard error) of `vlmprune report`, with this in its place."""
    monkeypatch.setattr("vlmprune_jax.run.cli.stages.run_command", lambda _, flags: run(flags))
    code = main(["report", *argv])
    return code, capsys.readouterr().err


def deep(flags):
    return deep(flags)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: Not a directory: a part of this path is a file, not"),
        (OSError(errno.EIO, "Input/output error", b"\xff\x1b[2J"), r"\udcff\x1b[2J: Input/output error: free disk"),
        (OSError("told nothing"), "W: told nothing: free disk space or repair the disk"),
        (MemoryError(), ": not enough memory (MemoryError): use shorter sequences"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating"),
            "(RESOURCE_EXHAUSTED: Out of mem",
        ),
        (SystemExit(3), "vlmprune report: your Python file raised SystemExit(3): remove that call"),
        (UserError("record \x1b]0;a\nb"), "vlmprune: error: record \\x1b]0;a b\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_person_can_change(capsys, monkeypatch, error, line):
    code, said = ended(capsys, monkeypatch, raising(error), "--workdir=W")
    assert (code, said.count("\n"), said.isascii()) == (2, 1, True)
    assert line in said
    assert "Traceback" in ended(capsys, monkeypatch, raising(error), "--workdir=W", "--debug")[1]


@pytest.mark.parametrize(
    ("run", "line"),
    [
        (raising(KeyError("x\ny")), "with KeyError: 'x\\ny'; this is a bug in vlmprune"),
        (raising(Panic("a\x1b[31mb")), "with Panic: a\\x1b[31mb; this is a bug in vlmprune"),
        (deep, "with RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_defects_are_told_with_what_was_read(capsys, monkeypatch, tmp_path, run, line):
    monkeypatch.setattr("vlmprune_jax.base.checks._LIBRARIES", {Path(__file__).parent})  # this file is not a user's
    (tmp_path / "f.json").write_text("{}")
    read_bytes(tmp_path / "f.json")
    code, said = ended(capsys, monkeypatch, run)
    assert (code, said.count("\n")) == (1, 1)
    for fact in ("failed at run/cli/main.py:", f" after reading {tmp_path}/f.json with ", line):
        assert fact in said
    code, said = ended(capsys, monkeypatch, run, "--debug")
    assert (code, "Traceback (most recent call last)" in said) == (1, True)


@pytest.mark.parametrize(
    ("command", "then"),
    [("bench", "starts from the beginning"), ("plan", "starts from the beginning"), ("report", "continues the work")],
)
def test_what_an_interruption_costs(capsys, monkeypatch, command, then):
    monkeypatch.setattr("vlmprune_jax.run.cli.stages.run_command", raising(KeyboardInterrupt()))
    if command in TOOLS:
        monkeypatch.setitem(TOOLS, command, Command("", raising(KeyboardInterrupt())))
    assert main([command]) == 130
    assert capsys.readouterr().err == f"\nvlmprune: interrupted; the same command {then}\n"


def test_a_reader_that_goes_ends_silently(capsys, monkeypatch):
    assert ended(capsys, monkeypatch, raising(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == (141, "")
    read, write = os.pipe()
    os.close(read)
    with monkeypatch.context() as patch, open(write, "w") as stream:
        patch.setattr(sys, "stdout", stream)
        assert ended(capsys, patch, lambda flags: make_reporter(True).say("line"))[0] == 141
    command = [sys.executable, "-m", "vlmprune_jax"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 141)
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert done.stderr.startswith(b"vlmprune: error: vlmprune: No space left on device: free disk space")


def test_a_terminal_without_the_characters(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("vlmprune_jax.run.cli.stages.run_command", lambda name, flags: print("中 \udcff é"))
    assert main(["report"]) == 0
    assert stream.buffer.getvalue() == b"\\u4e2d \\udcff \\xe9\n"


def noisy(flags):
    logger = logging.getLogger("noise")
    logger.error("first\n\x1b[2Jline", exc_info=ValueError("why\nso"))
    logger.info("not worth a line")
    for _ in range(3):
        logger.warning("again")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("matters", UserWarning, stacklevel=1)
        warnings.warn("an old name", DeprecationWarning, stacklevel=1)
    print("Traceback (most recent call last):\n  File x\nOSError: lost", file=sys.stderr)
    print("\r 10 %", end="", file=sys.stderr)
    thread = threading.Thread(target=raising(OSError("in a thread")), args=[None])
    thread.start()
    thread.join()
    for number in range(40):
        logger.warning("number %d", number)


def test_what_libraries_say(capsys, monkeypatch):
    """Once, after the command, one line each; nothing beside an error; all at once with --debug."""
    hooks = warnings.showwarning, sys.unraisablehook, threading.excepthook, sys.stderr, logging.getLogger().handlers[:]
    code, said = ended(capsys, monkeypatch, noisy)
    assert code == 0
    first = ["first \\x1b[2Jline (why so)", "again", "matters", "OSError: lost", "OSError: in a thread"]
    numbers = [f"number {number}" for number in range(15)]
    lines = [*first, *numbers, "and 25 more warnings (--debug shows all)"]
    assert said.splitlines() == [f"vlmprune: warning: {line}" for line in lines]

    def failing(flags):
        noisy(flags)
        raise UserError("wrong")

    assert ended(capsys, monkeypatch, failing) == (2, "vlmprune: error: wrong\n")
    assert hooks == (
        warnings.showwarning, sys.unraisablehook, threading.excepthook, sys.stderr, logging.getLogger().handlers[:]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import sys; sys.exit(3)", "cannot be loaded (SystemExit(3))"),
        ("class P(BaseException): pass\ndef get_config(_): raise P", "cannot be loaded (P())"),
        ("def f(): f()\ndef get_config(_): f()", "cannot be loaded (maximum recursion depth exceeded)"),
        ("def get_config(_): raise ValueError('\\x1b[31mred \\u202e')", r"(\x1b[31mred \u202e)"),
        ("def get_config(_): return 3", "(get_config() returned int, expected an experiment_config()"),
        (None, "c.py: is a FIFO, expected a file"),
    ],
)
def test_config_files_that_do_not_load(capsys, tmp_path, text, line):
    path = tmp_path / "c.py"
    os.mkfifo(path) if text is None else path.write_text(text)
    assert main(["run", f"--config={path}:variant"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert line in said


@pytest.mark.parametrize(
    ("workdir", "line"),
    [
        ("file", "file is a file, expected a folder: choose another path"),
        ("file/below", "--workdir=file/below: file is a file, expected a folder"),
        ("x" * 300, "File name too long: choose a shorter name"),
        ("a\0b", "--workdir: a\\x00b: contains a NUL character or half of a surrogate pair: choose another path"),
        ("\ud800", "--workdir: \\ud800: contains a NUL character or half of a surrogate pair"),
        ("fifo", "fifo is a file, expected a folder"),
        ("loop", "loop is a dangling or circular link, expected a folder: choose another path"),
        ("loop/below", "--workdir=loop/below: loop is a dangling or circular link"),
        ("dangling", "dangling is a dangling or circular link"),
        (os.fsdecode(b"\xff\x1b[2J"), "\\udcff\\x1b[2J: no such folder: run `vlmprune run` first"),
    ],
)
def test_workdirs_that_are_none(capsys, monkeypatch, tmp_path, workdir, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    assert main(["report", f"--workdir={workdir}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert line in said


def test_what_orbax_logs_and_handlers_that_print_are_not_seen(capsys):
    """Its errors are raised as well; a handler that a library has set up holds the stderr of before."""
    root, printing = logging.getLogger(), logging.StreamHandler(sys.stderr)
    before = root.handlers[:]
    root.addHandler(printing)
    record = logging.LogRecord("absl", logging.ERROR, "/site-packages/orbax/checkpoint/x.py", 1, "damaged", (), None)
    try:
        with kept() as messages:
            root.handle(record)
            logging.getLogger("noise").warning("mine")
        messages.tell()
    finally:
        root.handlers = before
    assert capsys.readouterr().err == "vlmprune: warning: mine\n"
