"""`vlmprune COMMAND ...`: finds the command, parses its flags, and turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType, ModuleType

from vlmprune_jax.checks import suggest
from vlmprune_jax.cli.flags import help_of, parse, switch, value_of
from vlmprune_jax.distributed.failure import end, joined
from vlmprune_jax.errors import SharedError, Stopped, UserError

# Command -> what it does, in the order of a run. Modules load when they are called: help stays fast.
COMMANDS = {
    "run": "all stages: score, prune, reconstruct, recover, evaluate, export, report",
    "score": "importances of layers, heads and neurons -> scores.npz",
    "prune": "plan from the scores, and the pruned model -> plan.json, pruned/",
    "reconstruct": "solve, without training, for what the kept weights can make up for -> reconstructed/",
    "recover": "train the pruned model -> recovered/",
    "evaluate": "answers to questions and what metrics say of them -> eval/*.json",
    "export": "the best model as a Hugging Face folder, reloaded and compared -> export/",
    "report": "one page with table and plots from result.json -> report.html, report.png",
    "plan": "what recovery needs on a TPU slice, compiled ahead of time on this machine",
    "help": "what a setting does, as `vlmprune help kl`, its default and choices",
    "inspect": "what a Hugging Face folder holds and what can be pruned, from its headers",
    "tfds": "LLaVA records and their images as a tensorflow-datasets data set",
    "demo": "the whole run on bundled real data, on a CPU",
    "pretrain": "train the demo's teacher from scratch",
}
OVERVIEW = """\
vlmprune: structured pruning and recovery of vision-language models, from Hugging Face folder to Hugging Face folder.

usage: vlmprune COMMAND [flags]        vlmprune COMMAND --help

{commands}

  vlmprune demo --workdir=runs/demo
  vlmprune run --config=configs/llava_width.py:0.3 --workdir=runs/llava --config.model.hf_dir=DIR
               --config.data.train=FILE.json --config.data.images=DIR --config.data.eval=FILE.json
"""
USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143
# What a person can do something about: no room (disk, quota, largest file), no right to write.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
# An unforeseen error of one of several processes may be what the loss of another looks like: launch/ starts such a run
# again, as where jax itself aborts.
ABORTED = 134


class _Terminated(KeyboardInterrupt):
    """SIGTERM where nothing waits for it to save first."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 (wrong input), 130 (Ctrl-C) or 143 (stopped by SIGTERM).

    Where several processes run together and one fails, all exit from here with its code, 134 for an unforeseen error.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # transformers would say twice that PyTorch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not argv or argv[0] in ("-h", "--help") or argv == ["help"]:
        print(OVERVIEW.format(commands="\n".join(f"  {name:<11} {text}" for name, text in COMMANDS.items())))
        return 0
    if threading.current_thread() is not threading.main_thread():  # where no signal can be caught
        return _guarded(argv)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _guarded(argv)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _guarded(argv: list[str]) -> int:
    """The command's exit code, with whatever stopped it told in one line."""
    try:
        return _dispatch(argv[0], argv[1:])
    except UserError as error:
        if switch(argv, "debug"):
            traceback.print_exc()
        line = " ".join(str(error).split())
        if isinstance(error, Stopped):
            print(f"vlmprune: {line}", file=sys.stderr)
            return TERMINATED
        if isinstance(error, SharedError):
            print(f"vlmprune: error: {line}", file=sys.stderr)
            return USER_ERROR
        return end(f"vlmprune: error: {line}", line, USER_ERROR)
    except KeyboardInterrupt as error:
        if switch(argv, "debug"):
            traceback.print_exc()
        terminated = isinstance(error, _Terminated)
        what = "stopped on SIGTERM" if terminated else "interrupted"
        line = f"\nvlmprune: {what}; the same command continues with what is left"
        return end(line, what, TERMINATED if terminated else INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            if switch(argv, "debug"):
                traceback.print_exc()
            where = error.filename or value_of(argv, "workdir") or f"vlmprune {argv[0]}"
            line = f"{where}: {error.strerror}: make room or mend the disk, and run the same command"
            return end(f"vlmprune: error: {line}", line, USER_ERROR)
        if not joined():
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return end(traceback.format_exc(), reason, ABORTED)


def _dispatch(name: str, rest: list[str]) -> int:
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}{suggest(name, COMMANDS)}")
    command: ModuleType = importlib.import_module(f"vlmprune_jax.cli.{name}")
    if any(arg in ("-h", "--help") for arg in rest):
        print(help_of(name, command))
        return 0
    command.run(parse(name, command, rest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
