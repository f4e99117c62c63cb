"""What holds of every reader: it starts no program, connects nowhere, opens nothing that only a file's content names,
and nothing reaches the terminal, not even from a library in C or Rust.
"""

import logging
import sys
from pathlib import Path

import pytest

from vlmprune_jax.io.data import tokenizer_files
from vlmprune_jax.io.data.video import process

STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "webbrowser.open"}
NAMED = ("/secret", "/dev/zero")  # by the values that fuzz_cases puts into files
_TRIAL = tokenizer_files.LIMITED + tokenizer_files.TRIAL
_DECODER = str(Path(process.__file__).with_name("worker.py"))
_watching: list[str] | None = None


def _audit(event: str, arguments: tuple) -> None:
    """Python calls it with whatever it does; a hook stays until the process ends."""
    if _watching is None:
        return
    if event == "subprocess.Popen" and [*arguments[1]] == [sys.executable, "-P", "-c", _TRIAL]:
        return  # the package's own trial of a tokenizer's rules, which come to it as data
    if event == "subprocess.Popen" and [*arguments[1]][:3] == [sys.executable, "-P", _DECODER]:
        return  # the package's own decoder of videos, which come to it as open files
    if event in STARTS or (event == "open" and str(arguments[0]).endswith(NAMED)):
        _watching.append(f"{event} {arguments[0]}")


sys.addaudithook(_audit)


@pytest.fixture(autouse=True)
def harmless(capfd):
    """Fail a test of which anything else was done than reading the files of the test.

    Python's logs may be written, the command line collects them: the handlers of libraries hold other tests' streams.
    """
    global _watching
    _watching = done = []
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    _watching = None
    assert not done
    assert capfd.readouterr() == ("", "")
