"""Requests to worker processes that decode videos; a worker that takes too long or dies is replaced."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np
from msgspec import Meta

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import checked, parse_json

MEMORY = 2**32  # maximum address space of a worker (bytes)
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")  # no keys or tokens
_LINE = 2**16
_PIXELS_PER_SECOND = 2**29  # no decoder of a single thread is faster on frames that a camera made

_Side = Annotated[int, Meta(ge=1, le=2**20)]
_Positive = Annotated[float, Meta(gt=0, le=1e12)]


@dataclass(frozen=True)
class Limits:
    """Limits on a video, checked before its memory is taken; settings of the section `data` have their names."""

    file_bytes: int  # size of the file (`max_video_megabytes`)
    frames: int  # frames in the file (`max_video_frames`)
    seconds: float  # duration (`max_video_seconds`)
    pixels: int  # pixels of a frame (`max_image_pixels`)
    kept_pixels: int  # pixels of all sampled frames together (`max_video_pixels`)
    wall: int  # seconds that decoding may take (`video_timeout`)


class Described(msgspec.Struct, frozen=True):
    """Facts about a video file: its frames, frames per second, seconds, and the size of an upright frame."""

    total: Annotated[int, Meta(ge=1)]
    fps: _Positive
    duration: _Positive
    height: _Side
    width: _Side


class _Worker:
    """Process that runs worker.py, and the connection to it."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        self._answer = self._connection.makefile("rb")
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**environment, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def hang_up(self) -> None:
        """End the connection, so that a thread that waits for the worker continues."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """Kill the worker process immediately."""
        self._answer.close()
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def send(self, request: dict[str, Any], file: BinaryIO) -> None:
        """Send a request with an open file."""
        line = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(self._connection, [line], [file.fileno()])
        self._connection.sendall(line[sent:])

    def line(self, name: str) -> dict[str, Any]:
        """Return the next line of the answer, as JSON; raise UserError if the worker refuses the file `name`."""
        line = self._answer.readline(_LINE)
        if len(line) == _LINE:
            raise UserError(f"{name}: the decoder's answer is too long: replace the file")
        if not line.endswith(b"\n"):
            raise EOFError
        reply = dict(parse_json(line, "decoder", "run the same command again"))
        if "error" in reply:
            raise UserError(f"{name}: {reply['error']}")
        return reply

    def fill(self, array: np.ndarray) -> None:
        """Fill an array with the next bytes of the answer."""
        if self._answer.readinto(array.data.cast("B")) < array.nbytes:
            raise EOFError


_IDLE: list[_Worker] = []  # idle workers, at most one per thread that has read videos
_LOCK = threading.Lock()


@atexit.register
def _end_all() -> None:
    while _IDLE:
        _IDLE.pop().kill()


def describe(file: BinaryIO, name: str, limits: Limits) -> Described:
    """Return frame count, frame rate, duration and frame size of an open video file.

    Raises UserError, which begins with `name`, if PyAV is missing, or the file is not a readable video or exceeds a
    limit.
    """
    with _asked(file, name, limits, {}) as worker:
        reply = worker.line(name)
    return msgspec.convert(checked(reply, Described, name, "encode the video again"), Described)


def decode(
    file: BinaryIO, name: str, limits: Limits, indices: Sequence[int], total: int, size: tuple[int, int]
) -> np.ndarray:
    """Return the frames uint8[frames, height, width, 3] of an open video file that have these indices.

    `total` frames must decode, and all have `size` (height, width). Raises UserError as `describe` does.
    """
    distinct, places = np.unique(np.asarray(indices, np.int64), return_inverse=True)
    frames = np.empty((len(distinct), *size, 3), np.uint8)
    with _asked(file, name, limits, {"indices": distinct.tolist(), "total": total, "size": size}) as worker:
        for frame in frames:
            worker.line(name)
            worker.fill(frame)
        worker.line(name)
    return frames if len(distinct) == len(indices) else frames[places]


@contextlib.contextmanager
def _asked(file: BinaryIO, name: str, limits: Limits, request: dict[str, Any]) -> Iterator[_Worker]:
    """Context that sends a request to a worker and yields the worker, which must answer in time.

    After any error the worker is killed, since its state is unknown.
    """
    if importlib.util.find_spec("av") is None:
        raise UserError(f"{name}: reading videos needs PyAV: pip install 'vlmprune-jax[video]'")
    length = os.fstat(file.fileno()).st_size
    if not length:
        raise UserError(f"{name}: is empty: replace the file")
    if length > limits.file_bytes:
        raise UserError(
            f"{name}: has {length:,} bytes, more than data.max_video_megabytes={limits.file_bytes >> 20}: raise it"
        )
    sent = {**vars(limits), "decoded_pixels": limits.wall * _PIXELS_PER_SECOND, "memory": MEMORY}
    deadline = time.monotonic() + limits.wall
    with _LOCK:
        worker = _IDLE.pop() if _IDLE else _Worker()
    alarm, problem = threading.Timer(limits.wall, worker.hang_up), "the decoder stopped: run the same command again"
    alarm.daemon = True
    alarm.start()
    try:
        worker.send({**request, "limits": sent}, file)
        problem = "the decoder stopped at this file: replace the file, or encode it again"
        yield worker
    except BaseException as error:
        worker.kill()
        if not isinstance(error, EOFError | OSError):
            raise
        if time.monotonic() >= deadline:
            problem = "takes too long to decode: raise data.video_timeout, or encode the file again"
        raise UserError(f"{name}: {problem}") from None
    finally:
        alarm.cancel()
    if time.monotonic() >= deadline:
        worker.kill()  # its connection may have ended
        return
    with _LOCK:
        _IDLE.append(worker)
