"""When one process of a run fails all of them end, each with a line that says which one it was.

The others would wait in a collective until the coordination service misses a heartbeat, and end by SIGABRT, which a pod
takes for a preemption and starts again. jax has no public way to tell them, so every process keeps a connection to
process 0, which passes a failure on.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vlmprune_jax.errors import UserError

JOIN_SECONDS = 60.0  # for all processes to connect
GRACE_SECONDS = 1.0  # from hearing of a failure to the end: this process may have found the same, and be cleaning up
LEAVE_SECONDS = 10.0  # for the others to be gone
_KEEPALIVE = 60  # seconds; Google Cloud's firewall forgets connections that are silent for ten minutes
_group: Group | None = None


class Group:
    """This process among those of a run: `peers` are all others for process 0, and process 0 for the others."""

    def __init__(self, number: int, peers: Sequence[socket.socket]):
        self._number, self._peers = number, list(peers)
        self._own, self._mouth = socket.socketpair()
        self._failed, self._ending = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def fail(self, text: str, reason: str, code: int) -> NoReturn:
        """Print `text` and end all processes with `code`; the others print the reason, one line."""
        if not self._ending.is_set():  # else this is what comes of another's failure: a broken connection, mostly
            print(text, file=sys.stderr, flush=True)
            self._failed.set()
            _send(self._mouth, {"process": self._number, "reason": reason, "code": code})
        while True:
            time.sleep(LEAVE_SECONDS)  # `_watch` ends the process

    def _watch(self) -> None:
        heard = [self._own, *self._peers]
        while True:
            for source in select.select(heard, [], [])[0]:
                line = _line(source)
                if line:
                    self._end(source, json.loads(line))
                heard.remove(source)  # a process that ended well, or that jax will miss

    def _end(self, source: socket.socket, said: dict[str, Any]) -> NoReturn:
        """Pass the failure on, wait until those who heard it are gone, and go."""
        others = [peer for peer in self._peers if peer is not source]
        for peer in others:
            _send(peer, said)
        if not self._failed.wait(GRACE_SECONDS):
            self._ending.set()
            print(f"vlmprune: error: process {said['process']} failed: {said['reason']}", file=sys.stderr, flush=True)
        until = time.monotonic() + LEAVE_SECONDS  # process 0 goes last: without it jax aborts the others
        while others and (left := until - time.monotonic()) > 0:
            gone = select.select(others, [], [], left)[0]
            others = [peer for peer in others if peer not in gone]
        sys.stdout.flush()
        os._exit(said["code"])  # not sys.exit, which would wait for all processes to disconnect from jax


def join(number: int, count: int, host: str | None, from_main: Callable[[Callable[[], Any]], Any]) -> None:
    """From here on the failure (`end`) of one of `count` processes ends all of them. All must call it, in step.

    `host`: where process 0 is reached (None: at its own address). `from_main`: gives process 0's value to all.

    Raises:
      UserError: process 0 cannot be reached.
    """
    global _group
    server = None
    if number == 0:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        host = host or socket.gethostbyname(socket.gethostname())
    host, port, token = from_main(lambda: [host, server and server.getsockname()[1], secrets.token_hex(16)])
    peers = [_connect(host, port, token)] if server is None else _accept(server, token, count - 1)
    for peer in peers:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE)
    _group = Group(number, peers)


def joined() -> bool:
    """Whether this process is one of several."""
    return _group is not None


def end(text: str, reason: str, code: int) -> int:
    """Print why this process ends and return its exit code; one of several ends all of them instead (`Group.fail`)."""
    if _group is not None:
        _group.fail(text, reason, code)
    print(text, file=sys.stderr)
    return code


def _accept(server: socket.socket, token: str, count: int) -> list[socket.socket]:
    """A connection to each of the other processes, which prove themselves by the token."""
    found: list[socket.socket] = []
    until = time.monotonic() + JOIN_SECONDS
    with server:
        while len(found) < count:
            server.settimeout(max(until - time.monotonic(), 0.001))
            try:
                peer = server.accept()[0]
            except OSError as error:
                raise UserError(f"{count - len(found)} processes did not connect to process 0: {error}") from error
            peer.settimeout(JOIN_SECONDS)
            if _line(peer) == token.encode():
                found.append(peer)
            else:
                peer.close()
    return found


def _connect(host: str, port: int, token: str) -> socket.socket:
    try:
        peer = socket.create_connection((host, port), timeout=JOIN_SECONDS)
    except OSError as error:
        raise UserError(f"process 0 cannot be reached at {host}:{port} ({error}): allow TCP between workers") from error
    peer.sendall(token.encode() + b"\n")
    return peer


def _line(source: socket.socket) -> bytes:
    """The next line without its end; empty where the other side has gone."""
    data = b""
    try:
        while not data.endswith(b"\n"):
            part = source.recv(1)
            if not part:
                return b""
            data += part
    except OSError:
        return b""
    return data[:-1]


def _send(peer: socket.socket, said: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it has gone already
        peer.sendall(json.dumps(said).encode() + b"\n")
