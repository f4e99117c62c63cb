"""One engine with one model in a process of its own, whose memory is its own: a job comes in, readings go out.

The first line of standard input is the job; every line after it asks for a reading. A line goes out when the model is
ready and for every reading: `{}`, or `first` and `rest` (seconds) and `peak_bytes`; or `{"error": ...}`, the last.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from vlmprune_jax.core.errors import UserError, reason
from vlmprune_jax.core.files import parse_json, read_text
from vlmprune_jax.evaluation.speed.clock import TRIES, often, reading


def serve() -> None:
    """Answer until standard input ends."""
    lines, out = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=out, flush=True)

    try:
        job = parse_json(lines.readline(), "the job", "report it")
        if hasattr(os, "sched_setaffinity"):  # before jax counts them
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
        from vlmprune_jax.evaluation.speed.programs import ENGINES

        program = ENGINES[job["backend"]](job)
        program.generate()
        times = often(program, fewest=1)
        answer(prompt_tokens=getattr(program, "prompt_tokens", len(job["ids"][0])))
        for _ in lines:
            found = reading(program, times)
            if found is None:
                raise UserError(
                    f"generating tokens took no longer than the prompt alone, {TRIES} times: generate more of them "
                    "(--new_tokens)"
                )
            answer(first=found[0], rest=found[1], peak_bytes=_peak_bytes())
    except Exception as error:
        answer(error=reason(error) if isinstance(error, UserError) else f"{type(error).__name__}: {reason(error)}")


def _peak_bytes() -> int:
    """The most memory that this process has held: weights, caches, libraries, and what loading took."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's begins with what the parent held
        return int(read_text(status).partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    serve()
