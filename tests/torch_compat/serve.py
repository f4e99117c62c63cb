"""`python serve.py FD`: answer the jobs that come in through the listening socket FD, one connection each.

Ends when it is killed, or when nobody holds the other end of its stdin any more.
"""

import contextlib
import os
import select
import socket
import sys
import threading


def end_with_stdin() -> None:
    """Wait for the end of stdin, which comes however the process that started this one ended."""
    sys.stdin.read()
    os._exit(0)


threading.Thread(target=end_with_stdin, daemon=True).start()
listener = socket.socket(fileno=int(sys.argv[1]))
select.select([listener], [], [])  # importing torch takes ten seconds: not before somebody asks

from run import answer  # noqa: E402

while True:
    connection, _ = listener.accept()
    with contextlib.suppress(ConnectionError), connection, connection.makefile("rw") as lines:  # who asked may be gone
        lines.write(answer(lines.readline()) + "\n")
