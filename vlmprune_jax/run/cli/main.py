"""`vlmprune COMMAND ...`: finds the command, parses its flags, and turns errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import inspect
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

from vlmprune_jax.base.checks import line_of_users, suggest
from vlmprune_jax.base.errors import SharedError, Stopped, UserError, printable, reason
from vlmprune_jax.base.files import last_read
from vlmprune_jax.core.mesh.stop import end, joined
from vlmprune_jax.run.cli.flags import Command, Flags, help_of, parse, split_flag
from vlmprune_jax.run.cli.messages import kept, leave_quietly
from vlmprune_jax.run.cli.stages import commands, stage_command
from vlmprune_jax.run.cli.tools import TOOLS, version
from vlmprune_jax.run.experiment.recipes import shipped_configs

COMMANDS = {**commands(), **{name: command.summary for name, command in TOOLS.items()}}  # with one-line help
_TOOLS = ("help", "env", "tfds")
_LOOK = ("report", *(name for name in TOOLS if name not in _TOOLS))
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

    A `script` with a function `run` and `FLAGS` (specs by name) runs instead of a built-in command; `argv` then
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
    debug = "--debug" in argv or "--debug=true" in argv  # even if parsing the other flags fails
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
    command = " ".join(("vlmprune", *argv[:1]))
    match error:
        case Stopped():
            print(f"vlmprune: {error}", file=sys.stderr)
            return INTERRUPTED if error.signal == "SIGINT" else TERMINATED
        case SharedError():
            print(f"vlmprune: error: {error}", file=sys.stderr)
            return USER_ERROR
        case KeyboardInterrupt():
            terminated = isinstance(error, _Terminated)
            what = "stopped on SIGTERM" if terminated else "interrupted"
            then = "starts from the beginning" if argv and argv[0] in TOOLS else "continues the work"
            line = f"\nvlmprune: {what}; the same command {then}"
            return end(line, what, TERMINATED if terminated else INTERRUPTED)
        case BrokenPipeError() if not joined():
            with contextlib.suppress(OSError, ValueError):  # what is left in the buffer goes there when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
    text = _sentence(command, argv, error, ours)
    if text is not None:
        text = printable(text)
        return end(f"vlmprune: error: {text}", text, USER_ERROR)
    if joined():
        return end(traceback.format_exc(), f"{type(error).__name__}: {printable(str(error))}"[:500], ABORTED)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _PACKAGE in Path(frame.filename).parents]
    location = f" at {Path(frames[-1].filename).relative_to(_PACKAGE)}:{frames[-1].lineno}" if frames else ""
    defect = printable(
        f"{command} failed{location}{_after()} with {type(error).__name__}: {reason(error)}; this is a bug "
        "in vlmprune: please report it with the output of the same command with --debug"
    )
    return end(f"vlmprune: error: {defect}", "", OURS)


def _sentence(command: str, argv: list[str], error: BaseException, ours: list[Path]) -> str | None:
    """Return the message for an error that the user can solve, with what to do; None for a defect of vlmprune.

    With several processes, OS errors other than disk errors return None, because the loss of another process may have
    caused them; the launch script then restarts the run.
    """
    match error:
        case UserError():
            return str(error)
        case OSError() if error.errno in _DISK or not joined():
            location = os.fsdecode(error.filename or split_flag(argv, "workdir")[0] or command)
            todo = _TODO.get(error.errno or 0, "free disk space or repair the disk, and run the same command")
            return f"{location}: {error.strerror or reason(error)}: {todo}"
        case SystemExit():
            return f"{command}: your Python file raised SystemExit({error.code!r}): remove that call"
    if isinstance(error, MemoryError) or (type(error).__name__ == "JaxRuntimeError" and _NO_MEMORY in str(error)):
        todo = "use shorter sequences, a smaller batch or a larger machine"
        return f"{command}{_after()}: not enough memory ({reason(error)}): {todo}"
    if isinstance(error, RuntimeError | AssertionError) and "JAX_PLATFORMS" in os.environ and "jax" in sys.modules:
        from vlmprune_jax.core.mesh.mesh import start_devices

        try:
            start_devices()
        except UserError as problem:
            return str(problem)
    if line := line_of_users(error, ours):
        failure = f"failed at {line} with {type(error).__name__}: {reason(error)}"
        return f"{command} {failure}: correct that file (--debug shows more)"
    return None


def _after() -> str:
    """Return " after reading FILE" for the file read last, as part of an error message; "" if none was read."""
    path = last_read()
    return "" if path is None else f" after reading {path}"


def _call(argv: list[str], script: ModuleType | None) -> tuple[Command, Flags] | None:
    """Return the command to run and its flags; None if the arguments asked for help or the version, now printed."""
    if script is None and (not argv or argv[0] in ("-h", "--help") or argv == ["help"]):
        lines = list[str]()
        for title, names in GROUPS.items():
            lines += ["", f"{title}:", *(_wrapped(f"  {name:<11} {COMMANDS[name]}", 14) for name in names)]
        configs = f"Configs that come with vlmprune (--config=NAME): {', '.join(shipped_configs())}"
        print(OVERVIEW.format(commands="\n".join(lines), configs=_wrapped(configs, 2)))
    elif script is None and argv == ["--version"]:
        print(f"vlmprune {version()}")
    else:
        name, *rest = argv
        command = find_command(name, *rest) if script is None else script_command(script)
        if not any(arg in ("-h", "--help") for arg in rest):
            return command, parse(name, command, rest)
        print(help_of(command))
    return None


def _wrapped(text: str, indent: int) -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def find_command(name: str, *rest: str) -> Command:
    """Return the command named `name`; an unknown name may be a stage that the file in `--config` registers."""
    if name not in COMMANDS and split_flag(rest, "config")[0] is None:
        raise UserError(f"no command {name!r}{suggest(name, COMMANDS)}")
    return TOOLS.get(name) or stage_command(name)


def script_command(script: ModuleType) -> Command:
    """Return the command of a script with `run`, `FLAGS`, perhaps TAKES_ARGUMENTS, and help as docstring."""
    arguments = getattr(script, "TAKES_ARGUMENTS", False)
    return Command(inspect.cleandoc(script.__doc__ or ""), script.run, lambda: script.FLAGS, arguments)


if __name__ == "__main__":
    sys.exit(main())
