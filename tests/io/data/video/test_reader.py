"""Frames of real clips, of many encoders, lists and parts; files that anybody may have made end in one line."""

import contextlib
import json
import math
import os
import shutil
import struct
import threading
import time

import numpy as np
import pytest
from refusal import refused

from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.media import MemoryBudget, StoredImage
from vlmprune_jax.io.data.records import VideoSource
from vlmprune_jax.io.data.tiling import Tiling
from vlmprune_jax.io.data.video import process
from vlmprune_jax.io.data.video.process import Limits
from vlmprune_jax.io.data.video.reader import VideoReader

av = pytest.importorskip("av", reason="PyAV is not installed (extra video)")
EVERY = VideoConfig("linspace", min_frames=10**6, max_frames=10**6)
LIMITS = Limits(file_bytes=2**26, frames=1000, seconds=100, pixels=10**6, kept_pixels=10**7, wall=60)
FRAMES = Tiling(16, 1, 1, False, False, (0.5,) * 3, (0.5,) * 3, 3, False)
PICTURES = np.zeros((12, 48, 64, 3), np.uint8)
for _number, _picture in enumerate(PICTURES):
    _picture[10:30, 3 * _number : 3 * _number + 20] = (200, 30, 90)


@pytest.fixture
def clips(goldens):
    return goldens / "video/clips"


def reader(count=0, **limits):
    return VideoReader(EVERY, Limits(**{**vars(LIMITS), **limits}), FRAMES, **({"count": count} if count else {}))


def read(path, *part, **options):
    return reader(**options).read(path, "r7", *part)


def refusal(path, words, content=None, **options):
    """Refused with the file's name and the record's, and these words behind them."""
    if content is not None:
        path.write_bytes(content)
    refused(rf"^{path} \(record r7\): .*{words}", read, path, **options)


def test_every_frame_of_every_clip(clips):
    """Pixels bit for bit, rotation applied, and fps and duration by packets, as torchcodec returns them."""
    facts = json.loads((clips / "clips.json").read_text())["clips"]
    with np.load(clips / "frames.npz") as frames:
        for name, expected in facts.items():
            clip = read(clips / expected["file"])
            found = (clip.total, clip.fps, clip.duration, clip.height, clip.width)
            assert found == tuple(expected[field] for field in ("frames", "fps", "duration", "height", "width"))
            np.testing.assert_array_equal(clip.frames, frames[name])
        assert len(facts) == 11
        clip = read(clips / "few.mp4", count=8)  # more than there are
        assert clip.indices == (0, 0, 1, 1, 1, 1, 2, 2)
        np.testing.assert_array_equal(clip.frames, frames["few"][list(clip.indices)])


def test_parts_of_a_clip(clips):
    """Frames from the first to the last second, as qwen-vl-utils counts them; times are those of the whole clip."""
    path = clips / "main.mp4"
    whole, middle, rest = (read(path, part) for part in (None, (0.5, 1.0), (1.6, math.inf)))
    assert (middle.indices, middle.used, middle.duration) == ((4, 5, 6, 7, 8), 5, 5 / 8)
    assert (rest.indices, rest.total, rest.fps) == ((13, 14, 15), 16, 8)
    np.testing.assert_array_equal(middle.frames, whole.frames[4:9])
    assert read(path, (0.5, 1.0), count=3).indices == (4, 6, 8)
    told = r"main.mp4 \(record r7\): lasts 2.00 s and has no frame from 'start' to 'end'"
    refused(told, read, path, (3.0, 4.0))


def test_bytes_and_frame_lists(clips):
    class Store:
        identity = "store"

        def read(self, number):
            return (clips / "second.webm").read_bytes()

    stored = read(StoredImage("video 0", 0, Store()))
    np.testing.assert_array_equal(stored.frames, read(clips / "second.webm").frames)
    listed = read(tuple(clips / f"frame_{number}.png" for number in range(5)))
    with np.load(clips / "frames.npz") as frames:
        np.testing.assert_array_equal(listed.frames, frames["main"][[0, 2, 4, 6, 8]])
    assert (listed.fps, listed.total, listed.indices) == (24.0, 5, (0, 1, 2, 3, 4))
    told = r"still.png \(record r7\): has 33x45 pixels, but the first frame .* 64x48"
    refused(told, read, (clips / "frame_0.png", clips / "still.png"))


def test_the_key_follows_the_file(clips, tmp_path):
    path = tmp_path / "clip.mp4"
    shutil.copy(clips / "main.mp4", path)
    first = reader().describe(path, "r")
    os.utime(path, ns=(1, 1))
    assert reader().describe(path, "r").key != first.key


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
        first = stack.enter_context(av.open(str(tmp_path / "index_first.mp4"), "w", options={"movflags": "faststart"}))
        no_start = stack.enter_context(av.open(str(tmp_path / "no_start.mkv"), "w"))
        streams = [container.add_stream_from_template(source.streams.video[0]) for container in (first, no_start)]
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            for container, stream in zip((first, no_start), streams, strict=True):
                if number or container is first:
                    packet.stream = stream
                    container.mux(packet)
            size = packet.size
    whole = (tmp_path / "index_first.mp4").read_bytes()
    refusal(tmp_path / "cut.mp4", "is cut off or damaged:", whole[:-5])
    refusal(tmp_path / "cut.mp4", r"is cut off or damaged \(11 of 12 frames are in", whole[:-size])
    refusal(path, r"is cut off or damaged \(\d of 11 frames decode\)", (tmp_path / "no_start.mkv").read_bytes())


# --- files that are refused -------------------------------------------------------------------------------------------


def gif(width, height, frames=0):
    """A GIF whose screen has this size: one frame without pixels, or several frames of one pixel."""
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    empty = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02L\x01\0"
    small = b"!\xf9\x04\x04\x0a\0\0\0," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2D\1\0"
    return b"GIF89a" + screen + (small * frames or empty) + b";"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("truncated.mp4", "cannot be decoded"),
        ("truncated_index_first.mp4", "is cut off or damaged"),
        ("empty.mp4", "is empty"),
        ("text.mp4", "cannot be decoded"),
        ("no_video.m4a", "has no video stream"),
        ("picture.mp4", "cannot be decoded"),
        (gif(16_000, 16_000), "has frames of 16000x16000 pixels, more than 1,000,000: raise data.max_image_pixels"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n", "cannot be decoded"),
        (b"ffconcat version 1.0\nfile main.mp4\n", "cannot be decoded"),
        (b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n", "cannot be decoded"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n" + b"\0" * 64, "cannot be decoded"),  # JPEG 2000
        (b"\xff\xd8\xff\xe0" + b"\0" * 64, "cannot be decoded"),
    ],
)
def test_what_is_no_video(clips, tmp_path, content, message):
    stored = isinstance(content, str)
    refusal(clips / content if stored else tmp_path / "clip.mp4", message, None if stored else content)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"file_bytes": 1000}, "4,160 bytes, more than data.max_video_megabytes"),
        ({"frames": 15}, "more than 15 frames: raise data.max_video_frames"),
        ({"seconds": 1.5}, "lasts 2 s, more than 1.5 s: raise data.max_video_seconds"),
        ({"pixels": 3000}, "frames of 64x48 pixels, more than 3,000: raise data.max_image_pixels"),
        ({"kept_pixels": 49_151}, "16 frames of a video have 49,152 pixels, more than data.max_video_pixels=49,151"),
    ],
)
def test_limits(clips, limits, message):
    refused(f"record r7.*{message}", read, clips / "main.mp4", **limits)


def test_large_screens_of_small_files(tmp_path):
    """Frames of one pixel on a large screen: the work is known before a second frame is decoded."""
    limits = {"frames": 10**6, "seconds": 10**6, "pixels": 10**8, "kept_pixels": 10**9, "wall": 10, "count": 2}
    told = "frames of 3000x3000 pixels, which take more than 10 s to decode"
    refusal(tmp_path / "clip.gif", told, gif(3000, 3000, 1600), **limits)


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
    refusal(path, "has no video stream")


def test_memory_and_sizes_of_frames(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", "mpeg4")
    with path.open("rb") as file:
        refused("its frames differ in size", process.decode, file, "clip", LIMITS, [0, 1], 12, (32, 32))
    monkeypatch.setattr(process, "MEMORY", 2**20)
    refusal(path, "(needs more memory|the decoder stopped|cannot be)")


def test_a_worker_that_hangs_or_dies_is_replaced(clips):
    """The next clip is read by a new process."""
    assert read(clips / "one.mp4").total == 1
    (worker,) = process._IDLE[-1:]
    os.kill(worker._process.pid, 19)  # SIGSTOP
    refusal(clips / "one.mp4", "takes too long to decode: raise data.video_timeout", wall=0)
    assert worker._process.returncode is not None
    assert read(clips / "few.mp4").total == 3
    process._IDLE[-1]._process.kill()
    refusal(clips / "few.mp4", "the decoder stopped")
    assert read(clips / "few.mp4").total == 3
    with pytest.raises(ProcessLookupError):
        os.kill(worker._process.pid, 0)


def test_threads_decode_within_one_budget(clips, monkeypatch):
    """Three clips of 147,456 bytes, and 48,000 or so of prepared frames, in a budget for one and for all."""
    reading, most, own = [], [], VideoReader(EVERY, LIMITS, FRAMES, slot_tokens=1)
    read_one = own.read

    def slow(*arguments):
        reading.append(arguments)
        most.append(len(reading))
        time.sleep(0.2)
        clip = read_one(*arguments)
        reading.pop()
        return clip

    monkeypatch.setattr(own, "read", slow)
    for budget, together in ((200_000, 1), (10**6, 3)):
        monkeypatch.setattr("vlmprune_jax.io.data.video.reader.DECODING", MemoryBudget(budget))
        own.shape(VideoSource(clips / "main.mp4"), "r")
        source = VideoSource(clips / "main.mp4")
        threads = [threading.Thread(target=own.load, args=(source, "r")) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert max(most) == together
        most.clear()


def test_a_large_clip_is_not_overtaken_and_failures_free_memory():
    """A request for more than all waits for the first thread alone; a later small one waits behind it."""
    budget, order = MemoryBudget(10), []
    begun = {name: threading.Event() for name in ("large", "small")}

    def take(name, size):
        begun[name].set()
        with budget.reserve(size):
            order.append(name)

    with pytest.raises(KeyError), budget.reserve(20):
        raise KeyError
    threads = [threading.Thread(target=take, args=pair, daemon=True) for pair in (("large", 20), ("small", 1))]
    with budget.reserve(5):
        for thread, event in zip(threads, begun.values(), strict=True):
            thread.start()
            event.wait(30)
            time.sleep(0.1)
        order.append("first")
    for thread in threads:
        thread.join(30)
    assert order == ["first", "large", "small"]


def test_without_files_or_pyav(clips, monkeypatch):
    refused("missing.mp4: no such file", read, clips / "missing.mp4")
    refused("clips: is a folder, expected a file", read, clips)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(r"needs PyAV: pip install 'vlmprune-jax\[video\]'", read, clips / "one.mp4")
