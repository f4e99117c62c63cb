"""Damaged video files, processors and records: reading returns frames, or raises one line that names the file."""

import copy
import functools
import json
import math
import shutil
import struct
import threading
import tracemalloc
from importlib import import_module

import pytest
from fuzz_cases import _ODD, damaged, edited, fuzz, fuzz_file, reads
from hypothesis import strategies as st

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.video import SAMPLING, VideoConfig, frame_indices
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.media import MemoryBudget, video_part
from vlmprune_jax.io.data.processor_files import load_video_config
from vlmprune_jax.io.data.records import VideoSource
from vlmprune_jax.io.data.tiling import Tiling
from vlmprune_jax.io.data.video import process
from vlmprune_jax.io.data.video.process import Limits
from vlmprune_jax.io.data.video.reader import VideoReader, video_reader
from vlmprune_jax.io.families import find

pytest.importorskip("av", reason="PyAV is not installed (extra video)")
CLIPS = ("main.mp4", "second.webm", "ntsc.mp4", "minutes.mkv", "audio.webm", "rotated.mp4", "no_video.m4a")
LIMITS = Limits(file_bytes=2**20, frames=200, seconds=1000, pixels=10**5, kept_pixels=10**6, wall=20)
FRAMES = Tiling(16, 1, 1, False, False, (0.5,) * 3, (0.5,) * 3, 3, False)
FAMILIES = ("gemma4", "internvl3", "qwen2_5_vl", "qwen3_vl", "smolvlm")
COUNTS = st.sampled_from((1, 2, 3, 7, 100, 4000, 2**20, 2**31)) | st.integers(1, 2**31)


def most_bytes(call):
    """What a call returns, and the memory that it held at its peak."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_clips(goldens, tmp_path):
    whole = [(goldens / "video/clips" / name).read_bytes() for name in CLIPS]
    path = tmp_path / "clip.mp4"

    def read():
        clip = VideoReader(VideoConfig("linspace"), LIMITS, FRAMES, count=4).read(path, "r1")
        assert clip.frames.shape == (4, clip.height, clip.width, 3)

    fuzz_file(25, path, read, files=st.sampled_from(whole).flatmap(damaged))


@pytest.mark.parametrize("family", FAMILIES)
def test_video_processors(goldens, tmp_path, family):
    """A small clip, and a processor of any values: arrays for the tower or a line, before anything large is made."""
    source, clip = goldens / "video" / family / "ckpt", goldens / "video/clips/main.mp4"
    for name in ("config.json", "processor_config.json"):
        shutil.copy(source / name, tmp_path)
    default = find(json.loads((source / "config.json").read_text())).video
    path = tmp_path / "processor_config.json"
    whole = json.loads(path.read_text())
    numbers = {name: value for name, value in whole["video_processor"].items() if not isinstance(value, bool | str)}
    counts = st.dictionaries(
        st.sampled_from((*numbers, "patch_size", "merge_size", "min_pixels", "num_frames")), COUNTS
    )
    sizes = st.dictionaries(
        st.sampled_from(("size", "max_image_size")),
        st.dictionaries(st.sampled_from(("height", "width", "shortest_edge", "longest_edge")), COUNTS),
    )
    merged = st.builds(lambda counts, sizes: {**whole["video_processor"], **counts, **sizes}, counts, sizes)

    import_module("transformers.image_utils")  # slow while memory is traced

    @fuzz(25, video=merged | edited(whole["video_processor"]))
    def check(video):
        path.write_text(json.dumps({**whole, "video_processor": video}))

        def read():
            config = load_video_config(tmp_path, default)
            data = DataSpec(aspect_ratio="pad", max_image_pixels=10**6, cache_megabytes=0, max_video_pixels=10**6)
            loader = load_image_processor(tmp_path, data, slot_tokens=9, video=config)
            return loader, loader.load(VideoSource(clip), "r1")

        loaded, peak = most_bytes(lambda: reads(read, tmp_path.name, "record r1"))
        assert peak < 2**26
        if loaded is not None:
            loader, pixels = loaded
            assert pixels.shape[-len(loader.shape) :] == loader.shape

    check()


def test_settings_of_videos(goldens):
    """Whatever the section `data` accepts, a small clip is read, or a line says which limit it exceeds."""
    clip, odd = goldens / "video/clips/main.mp4", st.sampled_from((1, 10**6, 10**12, 2**31, 2**62, 1e300, 1e-300))
    names = ("video_fps", "video_frames", "max_video_megabytes", "max_video_frames", "max_video_seconds")
    limits = ("max_video_pixels", "video_timeout", "max_image_pixels")

    @fuzz(40, rule=st.sampled_from(sorted(SAMPLING)), values=st.dictionaries(st.sampled_from((*names, *limits)), odd))
    def check(rule, values):
        def read():
            data = override(DataSpec(), values, "data")
            return video_reader(data, VideoConfig(rule, size=(16, 16)), 1, FRAMES).read(clip, "r1")

        found, peak = most_bytes(lambda: reads(read, "data.", "record r1"))
        assert peak < 2**26
        assert found is None or len(found.frames) == len(found.indices)

    check()


def test_sampling():
    """Whatever is asked for, the indices are of the clip and no list is longer than the clip or the request."""
    fps = st.sampled_from((1e-6, 0.1, 24, 1e6)) | st.floats(1e-3, 1e6)
    options = {
        "rule": st.sampled_from(sorted(SAMPLING)), "total": st.integers(1, 40_000), "rate": fps, "file_rate": fps,
        "count": COUNTS, "least": COUNTS, "duration": st.floats(1e-6, 1e9), "asked": st.integers(0, 100_000),
        "asked_rate": st.none() | fps, "patch": st.integers(1, 16),
    }  # fmt: skip

    @fuzz(100, **options)
    def check(rule, total, rate, file_rate, count, least, duration, asked, asked_rate, patch):
        config = VideoConfig(rule, file_rate, count, min(least, count), max(least, count), temporal_patch=patch)
        asked = {"video_frames": asked} if asked and asked_rate is None else {"video_fps": asked_rate}
        call = functools.partial(frame_indices, config, total, rate, duration=duration, **asked)
        indices, peak = most_bytes(call)
        assert set(indices) <= set(range(total))
        assert len(indices) <= max(total, asked.get("video_frames") or 0)
        assert peak < 2**26

    check()


@pytest.mark.parametrize("field", ["start", "end", "both"])
def test_parts(goldens, field):
    clip, odd = goldens / "video/clips/main.mp4", st.sampled_from(_ODD) | st.floats() | st.integers(-3, 10**30)
    reader = VideoReader(VideoConfig("linspace"), LIMITS, FRAMES, count=2)

    @fuzz(40, first=odd | st.floats(0, 3), last=odd | st.floats(0, 3))
    def check(first, last):
        entry = {"start": first, "end": last} if field == "both" else {field: first}

        def read():
            return reader.describe(clip, "r1", video_part(entry, [clip], "file, record r1"))

        info = reads(read, "record r1")
        assert info is None or {*info.indices} <= {*range(16)}

    check()


def test_facts_of_a_clip(goldens, monkeypatch):
    """What a decoder says of a file is checked like the file."""

    class Worker:
        def send(self, *_):
            pass

        hang_up = kill = send

        def line(self, name):
            return copy.deepcopy(self.reply)

    worker = Worker()
    monkeypatch.setattr(process, "_IDLE", [worker])
    numbers = st.sampled_from(_ODD) | st.integers(-1, 2**40) | st.floats()
    whole = {"total": 2000, "fps": 24.0, "duration": 80.0, "height": 48, "width": 64}

    @fuzz(60, changes=st.dictionaries(st.sampled_from(sorted(whole)), numbers), kept=st.booleans())
    def check(changes, kept):
        worker.reply = {**whole, **changes} if kept else changes
        process._IDLE[:] = [worker]
        with (goldens / "video/clips/main.mp4").open("rb") as file:
            facts = reads(lambda: process.describe(file, "main.mp4", LIMITS), "main.mp4")
        assert facts is None or (facts.total >= 1 and 0 < facts.fps < math.inf)

    check()


def test_large_screens_of_small_files(tmp_path):
    """Frames of one pixel on a large screen: the work is known before a second frame is decoded."""
    path, head = tmp_path / "clip.gif", b"!\xf9\x04\x04\x0a\0\0\0,"
    frame = head + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2D\1\0"
    limits = Limits(file_bytes=2**20, frames=10**6, seconds=10**6, pixels=10**8, kept_pixels=10**9, wall=10)

    @fuzz(3, width=st.integers(2000, 4000), height=st.integers(2000, 4000), frames=st.integers(1400, 2000))
    def check(width, height, frames):
        screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
        path.write_bytes(b"GIF89a" + screen + frame * frames + b";")
        with pytest.raises(UserError, match=r"frames of \d+x\d+ pixels, which take more than 10 s to decode"):
            VideoReader(VideoConfig("linspace"), limits, FRAMES, count=2).read(path, "r1")

    check()


def test_threads_share_the_memory_for_decoding():
    """The sizes in use at a time are within the budget, or are that of a single request."""

    @fuzz(20, total=st.integers(1, 100), sizes=st.lists(st.integers(0, 150), min_size=1, max_size=12))
    def check(total, sizes):
        budget, lock, used, seen = MemoryBudget(total), threading.Lock(), [], []

        def take(size):
            with budget.reserve(size):
                with lock:
                    used.append(size)
                    seen.append(tuple(used))
                with lock:
                    used.remove(size)

        threads = [threading.Thread(target=take, args=(size,)) for size in sizes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(seen) == len(sizes)
        assert all(sum(together) <= total or len([size for size in together if size]) == 1 for together in seen)

    check()
