"""`vlmprune COMMAND ...`: finds the command, parses its flags, and turns errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from vlmprune_jax.base.checks import line_of_users, suggest
from vlmprune_jax.base.errors import SharedError, Stopped, UserError, printable, reason
from vlmprune_jax.base.files import last_read
from vlmprune_jax.core.mesh.stop import end, joined
from vlmprune_jax.run.cli import env
from vlmprune_jax.run.cli.flags import help_of, parse, split_flag, switch
from vlmprune_jax.run.cli.messages import kept, leave_quietly
from vlmprune_jax.run.cli.stages import StageCommand, commands
from vlmprune_jax.run.experiment.recipes import shipped_configs

# Command -> one-line help, for commands in modules of this folder, which are imported when called to keep help fast.
OTHERS = {
    "sweep": "run a config with many combinations of settings and compare the results -> sweep.json, sweep.html",
    "inspect": "print the parts of a Hugging Face model that can be pruned, without reading weights",
    "recommend": "recommend a pruning method and recovery for a model and a budget, with the evidence and a config",
    "plan": "compile the recovery step for a TPU slice, without a TPU, and print its memory and minimum time",
    "vocabulary": "print what smaller vocabularies save and cost, without writing files",
    "bench": "measure speed, memory and size of models on this machine in jax, transformers and llama.cpp",
    "chat": "ask models a question about an image, for example before and after pruning",
    "diff": "compare two plans layer by layer",
    "help": "explain a setting (`vlmprune help kl`): meaning, default, choices",
    "env": "print versions, devices and installed packages, for a bug report",
    "tfds": "pack records and images into a tensorflow-datasets data set",
}
COMMANDS = {**commands(), **OTHERS}
_TOOLS = ("help", "env", "tfds")
_LOOK = ("report", *(name for name in OTHERS if name not in ("sweep", *_TOOLS)))
_PIPELINE = tuple(name for name in COMMANDS if name not in (*_LOOK, *_TOOLS))
# The groups of commands in the overview.
GROUPS = {"Run the pipeline or one stage": _PIPELINE, "Look at models and results": _LOOK, "Tools": _TOOLS}
OVERVIEW = """\
vlmprune: structured pruning and recovery of vision-language models,
from Hugging Face folder to Hugging Face folder.

usage: vlmprune COMMAND [flags]
       vlmprune COMMAND --help
       vlmprune --version
{commands}

Examples:
  vlmprune demo --workdir=runs/demo
  vlmprune run --config=llava15_7b:depth,0.3 --workdir=runs/llava \\
      --config.model.hf_dir=DIR --config.data.train=FILE.json \\
      --config.data.images=DIR --config.data.eval=FILE.json

{configs}
"""
_WIDTH = 80  # characters per line of the overview
# Commands that start from the beginning after an interruption, because they store no partial results.
_ANEW = ("bench", "chat", "diff", "env", "help", "inspect", "plan", "recommend", "tfds", "vocabulary")
OURS, USER_ERROR, INTERRUPTED, BROKEN_PIPE, TERMINATED = 1, 2, 130, 141, 143
# Errors that the user can solve: no space left (disk, quota, maximum file size), or no permission to write.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_TODO = {
    errno.ENOENT: "check the path, and whether another program has removed it",
    errno.ENOTDIR: "a part of this path is a file, not a folder: choose another path",
    errno.EEXIST: "remove it, or choose another path",
    errno.EISDIR: "remove that folder, or choose another path",
    errno.ENOTEMPTY: "remove that folder, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the link that leads back to itself",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "use a machine with more memory, or a smaller batch",
}
# Exit code for an unforeseen error of one of several processes, which the loss of another process may have caused.
# launch/ restarts a run that ends with this code, which is also that of jax's own aborts.
ABORTED = 134
_NO_MEMORY = "RESOURCE_EXHAUSTED"
_PACKAGE = Path(__file__).parents[2]


class _Terminated(KeyboardInterrupt):
    """Raised on SIGTERM while no training loop or stage is waiting to save its state."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated


def main(argv: Sequence[str] | None = None, script: ModuleType | None = None) -> int:
    """Run one `vlmprune` command and return its exit code (0 = success).

    Other codes: 1 (a defect in vlmprune), 2 (wrong input, or refused by the system), 130 (Ctrl-C), 141 (the output's
    reader ended), 143 (stopped by SIGTERM).

    A `script` with the functions `define` and `run` of a command module runs instead of a built-in command; `argv` then
    holds only its flags.

    If one of several connected processes fails, all of them exit with its code (134 for an unforeseen error).
    """
    alone = argv is None  # True in a process that runs only this command
    argv = list(sys.argv[1:] if argv is None else argv)
    # transformers would say twice that PyTorch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for stream in (sys.stdout, sys.stderr):  # file names may have characters that the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if script is not None:
        argv = [Path(script.__file__ or "").stem, *argv]
    debug = switch(argv, "debug")
    with contextlib.ExitStack() as at_the_end:
        if threading.current_thread() is threading.main_thread():  # elsewhere no signal can be caught
            if alone and not debug:
                at_the_end.callback(leave_quietly)
            at_the_end.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _terminate))
        try:
            with contextlib.nullcontext() if debug else kept() as messages:
                call = _call(argv, script)
                if call is not None:
                    command, flags = call
                    command.run(flags)
                if sys.stdout is not None:
                    sys.stdout.flush()  # report write errors here, not when Python exits
            if messages is not None:
                messages.tell()
            return 0
        except BaseException as error:  # one line for the user, and the exit code
            if debug:
                traceback.print_exc()
            return _ended(argv, error, [] if script is None else [Path(script.__file__ or "").parent])
    raise AssertionError  # not reached: the context suppresses no exception


def _ended(argv: list[str], error: BaseException, ours: list[Path]) -> int:
    """Print as one line why a command ended, notify the run's other processes, and return the exit code."""
    if isinstance(error, Stopped):
        print(f"vlmprune: {error}", file=sys.stderr)
        return INTERRUPTED if error.signal == "SIGINT" else TERMINATED
    if isinstance(error, SharedError):
        print(f"vlmprune: error: {error}", file=sys.stderr)
        return USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        terminated = isinstance(error, _Terminated)
        what = "stopped on SIGTERM" if terminated else "interrupted"
        anew = argv[:1] and argv[0] in _ANEW
        line = f"\nvlmprune: {what}; the same command {'starts from the beginning' if anew else 'continues the work'}"
        return end(line, what, TERMINATED if terminated else INTERRUPTED)
    if isinstance(error, BrokenPipeError) and not joined():
        with contextlib.suppress(OSError, ValueError):  # what is left in the buffer goes there when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    text = _sentence(argv, error, ours)
    if text is not None:
        return end(f"vlmprune: error: {text}", text, USER_ERROR)
    if joined():
        return end(traceback.format_exc(), f"{type(error).__name__}: {printable(str(error))}"[:500], ABORTED)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _PACKAGE in Path(frame.filename).parents]
    location = f" at {Path(frames[-1].filename).relative_to(_PACKAGE)}:{frames[-1].lineno}" if frames else ""
    defect = printable(
        f"{_command_line(argv)} failed{location}{_after()} with {type(error).__name__}: {reason(error)}; this is a bug "
        "in vlmprune: please report it with the output of the same command with --debug"
    )
    return end(f"vlmprune: error: {defect}", "", OURS)


def _sentence(argv: list[str], error: BaseException, ours: list[Path]) -> str | None:
    """Return the message for an error that the user can solve, with what to do; None for a defect of vlmprune.

    These are errors of the user's input and Python files, of the operating system, and of too little memory. With
    several processes, OS errors other than disk errors return None, because the loss of another process may have caused
    them; the launch script then restarts the run.
    """
    command = _command_line(argv)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and (error.errno in _DISK or not joined()):
        location = error.filename or split_flag(argv, "workdir")[0] or command
        location = os.fsdecode(location) if isinstance(location, bytes) else location
        todo = "free disk space or repair the disk, and run the same command"
        return printable(f"{location}: {error.strerror or reason(error)}: {_TODO.get(error.errno or 0, todo)}")
    if isinstance(error, MemoryError) or (type(error).__name__ == "JaxRuntimeError" and _NO_MEMORY in str(error)):
        return printable(
            f"{command}{_after()}: not enough memory ({reason(error)}): use shorter sequences, a "
            "smaller batch or a larger machine"
        )
    if isinstance(error, RuntimeError | AssertionError) and "JAX_PLATFORMS" in os.environ and "jax" in sys.modules:
        from vlmprune_jax.core.mesh.mesh import start_devices

        try:
            start_devices()
        except UserError as problem:
            return str(problem)
    if isinstance(error, SystemExit):
        return printable(f"{command}: your Python file raised SystemExit({error.code!r}): remove that call")
    if line := line_of_users(error, ours):
        failure = f"failed at {line} with {type(error).__name__}: {reason(error)}"
        return printable(f"{command} {failure}: correct that file (--debug shows more)")
    return None


def _command_line(argv: list[str]) -> str:
    return " ".join(("vlmprune", *argv[:1]))


def _after() -> str:
    """Return " after reading FILE" for the file read last, as part of an error message; "" if none was read."""
    path = last_read()
    return "" if path is None else f" after reading {path}"


def _call(argv: list[str], script: ModuleType | None) -> tuple[Any, Any] | None:
    """Return the command to run and its flags; None if the arguments asked for help or the version, now printed."""
    if script is None and (not argv or argv[0] in ("-h", "--help") or argv == ["help"]):
        lines = [line for title, names in GROUPS.items() for line in ("", f"{title}:", *map(_listed, names))]
        print(OVERVIEW.format(commands="\n".join(lines), configs=_shipped()))
    elif script is None and argv == ["--version"]:
        print(f"vlmprune {env.version()}")
    else:
        name, *rest = argv
        command = _command(name, *rest) if script is None else script
        if not any(arg in ("-h", "--help") for arg in rest):
            return command, parse(name, command, rest)
        print(help_of(name, command))
    return None


def _shipped() -> str:
    """Return the names of the bundled configs as wrapped help text."""
    text = f"Configs that come with vlmprune (--config=NAME): {', '.join(shipped_configs())}"
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _listed(name: str) -> str:
    """Return a command's entry in the overview: its name and its wrapped one-line help."""
    text = f"  {name:<11} {COMMANDS[name]}"
    return textwrap.fill(text, _WIDTH, subsequent_indent=" " * 14, break_on_hyphens=False)


def _command(name: str, *rest: str) -> ModuleType | StageCommand:
    """Return the command named `name`; an unknown name may be a stage that the file in `--config` registers."""
    if name in OTHERS:
        return importlib.import_module(f"vlmprune_jax.run.cli.{name}")
    if name not in COMMANDS and split_flag(rest, "config")[0] is None:
        raise UserError(f"no command {name!r}{suggest(name, COMMANDS)}")
    return StageCommand(name)


if __name__ == "__main__":
    sys.exit(main())
