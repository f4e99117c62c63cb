"""Script of the process that decodes videos with PyAV; `process.py` starts it, gives it files, and may kill it.

It imports nothing of this package, and reads only file descriptors that it is given: no paths, URLs or protocols.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import av
import numpy as np

# Demuxers and decoders that may run; FFmpeg refuses all others, such as playlists, image sequences and JPEG 2000.
FORMATS = ("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "gif")
CODECS = (
    *("h264", "hevc", "vp8", "vp9", "libdav1d", "av1", "mpeg4", "msmpeg4v2", "msmpeg4", "h263", "mpeg1video"),
    *("mpeg2video", "mjpeg", "gif", "ffv1"),
)
_VP8_SHOWN = 0x10  # bit of a VP8 frame's first byte; other frames are only references for later ones


_AGAIN = "replace the file, or encode it again (MP4 with H.264)"


class Refused(Exception):
    """Reason why a video is not read, and what the user should do, as texts of a message."""

    def __init__(self, problem: str, todo: str = _AGAIN) -> None:
        super().__init__(f"{problem}: {todo}")


def describe(file: Any, limits: dict[str, Any]) -> dict[str, Any]:
    """Return {total, fps, duration, height, width} of a video from all its packets and its first frame.

    Raises Refused if the file has no video stream, exceeds a limit, or is damaged.
    """
    with _opened(file, limits) as (container, stream):
        total, first, last, frame = 0, None, 0, None
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                if packet.is_corrupt:
                    raise Refused("is cut off or damaged")
                if stream.codec_context.name != "vp8" or bytes(packet)[0] & _VP8_SHOWN:
                    total += 1
                start = packet.pts if packet.pts is not None else packet.dts
                if start is not None:
                    first = start if first is None else min(first, start)
                    last = max(last if total > 1 else start, start + (packet.duration or 0))
            if total > limits["frames"]:
                raise Refused(f"has more than {limits['frames']:,} frames", "raise data.max_video_frames")
            if total * stream.codec_context.width * stream.codec_context.height > limits["decoded_pixels"]:
                size = f"{stream.codec_context.width}x{stream.codec_context.height}"
                raise Refused(
                    f"has {total:,} or more frames of {size} pixels, which take more than {limits['wall']} s to decode",
                    "raise data.video_timeout, or shorten or shrink the video",
                )
            if frame is None:
                frame = next(iter(packet.decode()), None)
        # Only this container's header has the exact number, in a table of all samples.
        promised = stream.frames if container.format.name.startswith("mov") else total
        if frame is None or total < promised:
            raise Refused(f"is cut off or damaged ({total} of {promised} frames are in the file)")
        duration = float((last - (first or 0)) * stream.time_base)
        if duration <= 0:  # a single frame without a duration
            duration = total / float(stream.average_rate or 24)
        if not duration <= limits["seconds"]:
            raise Refused(f"lasts {duration:,.0f} s, more than {limits['seconds']:,} s", "raise data.max_video_seconds")
        height, width = _upright(frame).shape[:2]
        return {"total": total, "fps": total / duration, "duration": duration, "height": height, "width": width}


def frames(
    file: Any, limits: dict[str, Any], indices: list[int], total: int, size: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Yield the frames uint8[*size, 3] with these ascending indices; all `total` frames are decoded.

    Raises Refused if a frame is damaged, missing or of another size.
    """
    wanted, number = set(indices), 0
    with _opened(file, limits) as (container, stream):
        for frame in container.decode(stream):
            if number in wanted:
                pixels = _upright(frame)
                if pixels.shape[:2] != tuple(size):
                    raise Refused("its frames differ in size", "encode it again with one size")
                yield pixels
            number += 1
    if number != total:
        raise Refused(f"is cut off or damaged ({number} of {total} frames decode)")


def _upright(frame: Any) -> np.ndarray:
    """Return a frame's RGB values, turned as the file's display matrix says."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


@contextlib.contextmanager
def _opened(file: Any, limits: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Context that yields the container and its first video stream; the limits apply before memory is taken."""
    file.seek(0)
    whitelists = {"format_whitelist": ",".join(FORMATS), "codec_whitelist": ",".join(CODECS)}
    options = {**whitelists, "protocol_whitelist": "none", "max_streams": "20", "probesize": "5000000"}
    with av.open(file, options=options, metadata_errors="ignore") as container:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise Refused("has no video stream")
        stream, context = streams[0], streams[0].codec_context
        if context is None or context.codec.name not in CODECS:
            raise Refused(f"is encoded in {'an unknown codec' if context is None else context.codec.name!r}")
        if context.width * context.height > limits["pixels"]:
            size = f"{context.width}x{context.height}"
            raise Refused(f"has frames of {size} pixels, more than {limits['pixels']:,}", "raise data.max_image_pixels")
        context.thread_count, context.thread_type = 1, "NONE"
        context.options = {"max_pixels": str(min(limits["pixels"], 2**31 - 1))}  # the largest value FFmpeg takes
        yield container, stream


def _limit(memory: int, seconds: int) -> None:
    """Limit this process's memory (bytes) and further processor time, and keep it from writing files."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has all limits
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 1, -1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _answer(connection: socket.socket, request: dict[str, Any], file: Any) -> None:
    """Send the answer to a request: one line of JSON, or one before the bytes of each frame and one at the end."""

    def send(reply: dict[str, Any]) -> None:
        connection.sendall(json.dumps(reply).encode() + b"\n")

    try:
        limits = request["limits"]
        if "indices" not in request:
            send(describe(file, limits))
            return
        for frame in frames(file, limits, request["indices"], request["total"], request["size"]):
            send({})
            connection.sendall(np.ascontiguousarray(frame).data)
        send({})
    except Refused as error:
        send({"error": str(error)})
    except MemoryError:
        send({"error": f"needs more memory than a decoder may take: {_AGAIN}"})
    except (av.FFmpegError, OSError, ValueError) as error:
        send({"error": f"cannot be decoded ({getattr(error, 'strerror', None) or error}): {_AGAIN}"})


def main(descriptor: int) -> None:
    """Answer requests, each a line of JSON with a file descriptor, until the other end is closed."""
    av.logging.set_level(None)
    with socket.socket(fileno=descriptor) as connection:
        while True:
            line, descriptors, *_ = socket.recv_fds(connection, 2**20, 1)
            while line and not line.endswith(b"\n"):
                line += connection.recv(2**20)
            if not line:
                return
            request = json.loads(line)
            _limit(request["limits"]["memory"], request["limits"]["wall"])
            with os.fdopen(descriptors[0], "rb") as file:
                _answer(connection, request, file)


if __name__ == "__main__":
    main(int(sys.argv[1]))
