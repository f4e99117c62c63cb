"""Sampled frames: real clips in four containers, frame lists, the cache, and clips that are refused with one line."""

import json
import math
import os
import shutil
import threading
import time

import numpy as np
import pytest

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.media import MemoryBudget, StoredImage
from vlmprune_jax.io.data.records import VideoSource
from vlmprune_jax.io.data.tiling import Tiling
from vlmprune_jax.io.data.video import process
from vlmprune_jax.io.data.video.process import Limits
from vlmprune_jax.io.data.video.reader import VideoReader

pytest.importorskip("av", reason="PyAV is not installed (extra video)")
EVERY = VideoConfig("linspace", min_frames=10**6, max_frames=10**6)
LIMITS = Limits(file_bytes=2**26, frames=1000, seconds=100, pixels=10**6, kept_pixels=10**7, wall=60)
FRAMES = Tiling(16, 1, 1, False, False, (0.5,) * 3, (0.5,) * 3, 3, False)


def limits(**changes):
    return Limits(**{**vars(LIMITS), **changes})


@pytest.fixture
def clips(goldens):
    return goldens / "video/clips"


def test_every_frame_of_every_clip(clips):
    """Pixels bit for bit, rotation applied, and fps and duration by packets, as torchcodec returns them."""
    facts = json.loads((clips / "clips.json").read_text())["clips"]
    with np.load(clips / "frames.npz") as frames:
        for name, expected in facts.items():
            clip = VideoReader(EVERY, LIMITS, FRAMES).read(clips / expected["file"], name)
            assert (clip.total, clip.fps, clip.duration) == tuple(
                expected[field] for field in ("frames", "fps", "duration")
            )
            assert (clip.height, clip.width) == (expected["height"], expected["width"])
            np.testing.assert_array_equal(clip.frames, frames[name])
    assert len(facts) == 11


def test_sampled_and_repeated_frames(clips):
    with np.load(clips / "frames.npz") as frames:
        clip = VideoReader(EVERY, LIMITS, FRAMES, count=8).read(clips / "few.mp4", "r")
        assert clip.indices == (0, 0, 1, 1, 1, 1, 2, 2)
        np.testing.assert_array_equal(clip.frames, frames["few"][list(clip.indices)])


def test_parts_of_a_clip(clips):
    """Frames from the first to the last second, as qwen-vl-utils counts them; times are those of the whole clip."""
    read = VideoReader(EVERY, LIMITS, FRAMES).read
    whole, middle, rest = (read(clips / "main.mp4", "r", part) for part in (None, (0.5, 1.0), (1.6, math.inf)))
    assert (middle.indices, middle.used, middle.duration) == ((4, 5, 6, 7, 8), 5, 5 / 8)
    assert (rest.indices, rest.total, rest.fps) == ((13, 14, 15), 16, 8)
    np.testing.assert_array_equal(middle.frames, whole.frames[4:9])
    assert VideoReader(EVERY, LIMITS, FRAMES, count=3).read(clips / "main.mp4", "r", (0.5, 1.0)).indices == (4, 6, 8)
    with pytest.raises(UserError, match=r"main.mp4 \(record r\): lasts 2.00 s and has no frame from 'start' to 'end'"):
        read(clips / "main.mp4", "r", (3.0, 4.0))


def test_bytes_and_frame_lists(clips):
    class Store:
        def read(self, number):
            return (clips / "second.webm").read_bytes()

        @property
        def identity(self):
            return "store"

    stored = StoredImage("video 0", 0, Store())
    read = VideoReader(EVERY, LIMITS, FRAMES)
    np.testing.assert_array_equal(read.read(stored, "r").frames, read.read(clips / "second.webm", "r").frames)
    listed = read.read(tuple(clips / f"frame_{number}.png" for number in range(5)), "r")
    with np.load(clips / "frames.npz") as frames:
        np.testing.assert_array_equal(listed.frames, frames["main"][[0, 2, 4, 6, 8]])
    assert (listed.fps, listed.total, listed.indices) == (24.0, 5, (0, 1, 2, 3, 4))
    with pytest.raises(UserError, match=r"still.png \(record r\): has 33x45 pixels, but the first frame .* 64x48"):
        read.read((clips / "frame_0.png", clips / "still.png"), "r")


def test_the_key_follows_the_file(clips, tmp_path):
    path = tmp_path / "clip.mp4"
    shutil.copy(clips / "main.mp4", path)
    first = VideoReader(EVERY, LIMITS, FRAMES).describe(path, "r")
    os.utime(path, ns=(1, 1))
    assert VideoReader(EVERY, LIMITS, FRAMES).describe(path, "r").key != first.key


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated.mp4", "cannot be decoded"),
        ("truncated_index_first.mp4", "is cut off or damaged"),
        ("empty.mp4", "is empty"),
        ("text.mp4", "cannot be decoded"),
        ("no_video.m4a", "has no video stream"),
        ("picture.mp4", "cannot be decoded"),
        ("missing.mp4", "no such file"),
    ],
)
def test_what_is_no_video(clips, name, message):
    with pytest.raises(UserError, match=message) as error:
        VideoReader(EVERY, LIMITS, FRAMES).read(clips / name, "r7")
    assert str(clips / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_bytes": 1000}, r"4,160 bytes, more than data.max_video_megabytes"),
        ({"frames": 15}, r"more than 15 frames: raise data.max_video_frames"),
        ({"seconds": 1.5}, r"lasts 2 s, more than 1.5 s: raise data.max_video_seconds"),
        ({"pixels": 3000}, r"frames of 64x48 pixels, more than 3,000: raise data.max_image_pixels"),
        ({"kept_pixels": 49_151}, r"16 frames of a video have 49,152 pixels, more than data.max_video_pixels=49,151"),
    ],
)
def test_limits(clips, changes, message):
    with pytest.raises(UserError, match=message):
        VideoReader(EVERY, limits(**changes), FRAMES).read(clips / "main.mp4", "r")


def test_a_worker_that_hangs_or_dies_is_replaced(clips, monkeypatch):
    """The next clip is read by a new process."""
    read = VideoReader(EVERY, LIMITS, FRAMES)
    assert read.read(clips / "one.mp4", "r").total == 1
    (worker,) = process._IDLE[-1:]
    os.kill(worker._process.pid, 19)  # SIGSTOP
    with pytest.raises(UserError, match=r"one.mp4 .record r.: takes too long to decode: raise data.video_timeout"):
        VideoReader(EVERY, limits(wall=0), FRAMES).read(clips / "one.mp4", "r")
    assert worker._process.returncode is not None
    assert VideoReader(EVERY, LIMITS, FRAMES).read(clips / "few.mp4", "r").total == 3
    process._IDLE[-1]._process.kill()
    with pytest.raises(UserError, match=r"the decoder stopped"):
        VideoReader(EVERY, LIMITS, FRAMES).read(clips / "few.mp4", "r")
    assert VideoReader(EVERY, LIMITS, FRAMES).read(clips / "few.mp4", "r").total == 3
    with pytest.raises(ProcessLookupError):
        os.kill(worker._process.pid, 0)


def test_threads_decode_within_one_budget(clips, monkeypatch):
    """Three clips of 147,456 bytes, and 48,000 or so of prepared frames, in a budget for one and for all."""
    reading, most, reader = [], [], VideoReader(EVERY, LIMITS, FRAMES, slot_tokens=1)
    read = reader.read

    def slow(*arguments):
        reading.append(arguments)
        most.append(len(reading))
        time.sleep(0.2)
        clip = read(*arguments)
        reading.pop()
        return clip

    monkeypatch.setattr(reader, "read", slow)
    for budget, together in ((200_000, 1), (10**6, 3)):
        monkeypatch.setattr("vlmprune_jax.io.data.video.reader.DECODING", MemoryBudget(budget))
        reader.shape(VideoSource(clips / "main.mp4"), "r")
        threads = [threading.Thread(target=reader.load, args=(VideoSource(clips / "main.mp4"), "r")) for _ in range(3)]
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


def test_without_pyav(clips, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs PyAV: pip install 'vlmprune-jax\[video\]'"):
        VideoReader(EVERY, LIMITS, FRAMES).read(clips / "one.mp4", "r")
