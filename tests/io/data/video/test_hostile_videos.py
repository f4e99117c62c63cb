"""Videos of many encoders, and files that anybody may have made: the right frames, or one line."""

import contextlib
import re
import struct

import numpy as np
import pytest

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.tiling import Tiling
from vlmprune_jax.io.data.video import process
from vlmprune_jax.io.data.video.process import Limits
from vlmprune_jax.io.data.video.reader import VideoReader

av = pytest.importorskip("av", reason="PyAV is not installed (extra video)")
EVERY = VideoConfig("linspace", min_frames=10**6, max_frames=10**6)
LIMITS = Limits(file_bytes=2**26, frames=1000, seconds=100, pixels=10**6, kept_pixels=10**7, wall=60)
FRAMES = Tiling(16, 1, 1, False, False, (0.5,) * 3, (0.5,) * 3, 3, False)
FASTSTART = {"movflags": "faststart"}
PICTURES = np.zeros((12, 48, 64, 3), np.uint8)
for _number, _picture in enumerate(PICTURES):
    _picture[10:30, 3 * _number : 3 * _number + 20] = (200, 30, 90)


def read(path):
    return VideoReader(EVERY, LIMITS, FRAMES).read(path, "r7")


def refusal(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert line.startswith(f"{path} (record r7): ")
    assert line.isprintable()
    return line.removeprefix(f"{path} (record r7): ")


def encode(path, codec, pixels="yuv420p", **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        for picture in PICTURES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "options"),
    [
        ("a.avi", "mpeg4", "yuv420p", {}),
        ("a.mp4", "libx264", "yuv420p", {"bf": "3"}),
        ("a.mp4", "libx265", "yuv420p", {"x265-params": "log-level=none"}),
        ("a.webm", "libvpx", "yuv420p", {}),
        ("a.mkv", "ffv1", "bgr0", {}),
        ("a.mov", "mjpeg", "yuvj420p", {}),
        ("a.gif", "gif", "rgb8", {}),
    ],
)
def test_encoders(tmp_path, name, codec, pixels, options):
    clip = read(encode(tmp_path / name, codec, pixels, **options))
    assert (clip.total, clip.duration) == (12, pytest.approx(1.2))
    assert np.abs(clip.frames.astype(int) - PICTURES).mean() < (1e-9 if codec == "ffv1" else 6)


def test_frames_of_vp8_that_are_not_shown(tmp_path):
    """Encoders add them as references (alt-ref); here a shown frame becomes one."""
    path = encode(tmp_path / "a.webm", "libvpx")
    with av.open(str(path)) as container:
        packet = [bytes(packet) for packet in container.demux(video=0) if packet.size][7]
    content = path.read_bytes()
    assert content.count(packet) == 1
    path.write_bytes(content.replace(packet, bytes([packet[0] & ~0x10]) + packet[1:]))
    assert read(path).total == 11


def test_cut_files_whose_frames_would_decode(tmp_path):
    """The last picture lacks bytes, which the decoder makes up; the first pictures refer to one that is missing."""
    path = tmp_path / "a.mp4"
    encode(path, "libx264", g="6", bf="0")
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(av.open(str(path)))
        first = stack.enter_context(av.open(str(tmp_path / "index_first.mp4"), "w", options=FASTSTART))
        no_start = stack.enter_context(av.open(str(tmp_path / "no_start.mkv"), "w"))
        streams = [container.add_stream_from_template(source.streams.video[0]) for container in (first, no_start)]
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            for container, stream in zip((first, no_start), streams, strict=True):
                if number or container is first:
                    packet.stream = stream
                    container.mux(packet)
            size = packet.size
    whole = (tmp_path / "index_first.mp4").read_bytes()
    assert refusal(tmp_path / "cut.mp4", whole[:-5]).startswith("is cut off or damaged:")
    assert refusal(tmp_path / "cut.mp4", whole[:-size]).startswith("is cut off or damaged (11 of 12 frames are in")
    message = refusal(path, (tmp_path / "no_start.mkv").read_bytes())
    assert re.match(r"is cut off or damaged \(\d of 11 frames decode\)", message)


def gif(width, height):
    """A GIF of one frame that says this size and has no pixels."""
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    image = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02L\x01\0"
    return b"GIF89a" + screen + image + b";"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gif(16_000, 16_000), "has frames of 16000x16000 pixels, more than 1,000,000: raise data.max_image_pixels"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n", "cannot be decoded"),
        (b"ffconcat version 1.0\nfile main.mp4\n", "cannot be decoded"),
        (b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n", "cannot be decoded"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n" + b"\0" * 64, "cannot be decoded"),  # JPEG 2000
        (b"\xff\xd8\xff\xe0" + b"\0" * 64, "cannot be decoded"),
    ],
)
def test_files_of_other_kinds(tmp_path, content, message):
    assert refusal(tmp_path / "clip.mp4", content).startswith(message)


def test_a_cover_picture_is_no_video(tmp_path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound, cover = container.add_stream("aac", rate=8000, layout="mono"), container.add_stream("png")
        cover.width, cover.height, cover.pix_fmt = 8, 8, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic.value
        for start in range(0, 4096, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, start
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((8, 8, 3), np.uint8), format="rgb24")))
    with pytest.raises(UserError, match="has no video stream"):
        read(path)


def test_folders_and_pipes(tmp_path):
    with pytest.raises(UserError, match="is a folder, expected a file"):
        read(tmp_path)


def test_memory_is_limited(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", "mpeg4")
    monkeypatch.setattr(process, "MEMORY", 2**20)
    with pytest.raises(UserError, match=r"a.mp4 \(record r7\): (needs more memory|the decoder stopped|cannot be)"):
        read(path)


def test_frames_of_another_size(tmp_path):
    path = encode(tmp_path / "a.mp4", "mpeg4")
    with path.open("rb") as file, pytest.raises(UserError, match="its frames differ in size"):
        process.decode(file, "clip", LIMITS, [0, 1], 12, (32, 32))
