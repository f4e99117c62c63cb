"""Damaged data files, images, videos and data sets: what is read, or one line that names file and record."""

import contextlib
import copy
import functools
import io
import json
import math
import shutil
import struct
import tracemalloc
from importlib import import_module
from types import SimpleNamespace

import pyarrow as pa
import pytest
from data_cases import write_split
from fuzz_cases import ODD, damaged, edited, fuzz, fuzz_file, fuzz_folder, json_files, json_lines, reads
from hypothesis import strategies as st
from PIL import Image

from vlmprune_jax.base.settings import override
from vlmprune_jax.core.video import SAMPLING, VideoConfig, frame_indices
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.datasets import read_datasets
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.media import video_part
from vlmprune_jax.io.data.processor_files import load_video_config
from vlmprune_jax.io.data.records import VideoSource, data_files, read_records
from vlmprune_jax.io.data.tfds import read_tfds, write_tfds
from vlmprune_jax.io.data.tiling import Tiling
from vlmprune_jax.io.data.video import process
from vlmprune_jax.io.data.video.process import Limits
from vlmprune_jax.io.data.video.reader import VideoReader, video_reader
from vlmprune_jax.io.families import find

RECORDS = [
    {
        "id": f"r{number}",
        "image": f"img{number}.png",
        "answers": ["yes", "no"],
        "category": "dogs",
        "conversations": [{"from": "human", "value": "<image>\nA dog?"}, {"from": "gpt", "value": "yes"}],
    }
    for number in range(3)
]
VIDEO = {
    "id": "v",
    "video": [["img0.png", "img1.png"], "img2.png"],
    "messages": [{"role": "user", "content": [{"type": "video"}, {"type": "video"}, {"type": "text", "text": "?"}]}],
}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "EPS", "ICO", "PPM")


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_records(goldens, tmp_path, name):
    path = tmp_path / name
    files = (json_files if name.endswith(".json") else json_lines)([*RECORDS, VIDEO])

    def read():
        read_records(path, goldens / "data/images", on_error="skip")
        read_records(path, goldens / "data/images", on_error="stop")

    fuzz_file(60, path, read, files=files)


def test_sets_of_records(goldens, tmp_path):
    path, listed = tmp_path / "sets.json", tmp_path / "a.jsonl"
    listed.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    sets = {"a": {"root": str(goldens / "data/images"), "annotation": str(listed), "repeat_time": 2, "length": 3}}
    itself = {**sets, "b": {"root": ".", "annotation": str(path)}}
    files = json_files(sets) | edited(itself, 1).map(lambda value: json.dumps(value).encode())
    fuzz_file(60, path, lambda: (data_files(path, None), read_records(path, None)), "", files=files)


def test_images(goldens, tmp_path):
    data = DataSpec(aspect_ratio="pad", max_image_pixels=10**6, cache_megabytes=0)
    loader, path, whole = load_image_processor(goldens / "ckpt/clip_tower", data), tmp_path / "img1.jpg", {}
    with Image.open(goldens / "data/images/img1.png") as image:
        picture = image.convert("RGB")
    for name in FORMATS:
        picture.save(buffer := io.BytesIO(), name)
        whole[name] = buffer.getvalue()

    def read():
        assert loader.load(path, "r1").shape == (1, *loader.shape)

    fuzz_file(150, path, read, files=st.sampled_from(FORMATS).flatmap(lambda name: damaged(whole[name])))


@pytest.mark.parametrize("kind", ["tfds", "datasets"])
def test_data_sets(goldens, tmp_path, kind):
    folder, picture = tmp_path / "ds", (goldens / "data/images/img1.png").read_bytes()
    if kind == "tfds":
        (tmp_path / "records.json").write_text(json.dumps(RECORDS))
        records = read_records(tmp_path / "records.json", goldens / "data/images")
        write_tfds(records, folder, image_root=goldens / "data/images")
    else:
        row = {"question": "A dog?", "answer": "yes", "choices": ["a", "b"], "image": picture}
        write_split(folder, [{**row, "n": number} for number in range(3)])
        (folder / "dataset_info.json").unlink()  # which is not read

    missing = (OSError,) if kind == "tfds" else ()  # an image, as a missing file: its record is named by loaders

    def read():
        for record in (read_tfds if kind == "tfds" else read_datasets)(folder):
            for image in record.images:
                with contextlib.suppress(*missing):
                    image.read_bytes()

    fuzz_folder(100, folder, read)


COLUMNS = {
    "question": pa.array(["A dog?", "b?", None]),
    "options": pa.array([["a", "b"], [], None]),
    "none": pa.nulls(3),
    "deep": pa.array([{"a": [{"b": 1.5}]}] * 3),
    "views": pa.ListViewArray.from_arrays(pa.array([0] * 3, pa.int32()), pa.array([2] * 3, pa.int32()), [1, 2]),
    "codes": pa.array(["x"] * 3).dictionary_encode(),
    "runs": pa.RunEndEncodedArray.from_arrays(pa.array([3], pa.int32()), pa.array(["y"])),
    "image": pa.array([{"bytes": b"GIF8", "path": "../../secret"}] * 3),
}


def test_columns_of_datasets(tmp_path):
    """Any columns, compressed or not, with lengths that were edited: what is read is no larger than its file."""

    def written(names, codec):
        batch, buffer = pa.record_batch({name: COLUMNS[name] for name in names}), io.BytesIO()
        with pa.ipc.new_stream(buffer, batch.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as stream:
            stream.write_batch(batch)
        return buffer.getvalue()

    def edited_length(content, at, value):
        at = 8 * (at % (len(content) // 8))
        return content[:at] + struct.pack("<q", value) + content[at + 8 :]

    chosen = st.lists(st.sampled_from(sorted(COLUMNS)), min_size=1, max_size=4, unique=True)
    files = st.builds(written, chosen, st.sampled_from((None, None, "zstd")))
    lengths = st.sampled_from((-1, 0, 1, 2**20, 2**31 - 1, 2**40, 2**62))
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    path, edits = tmp_path / "a.arrow", st.builds(edited_length, files, st.integers(0, 10**6), lengths)

    def read():
        assert len(read_datasets(tmp_path, on_error="skip")) <= path.stat().st_size

    fuzz_file(200, path, read, tmp_path.name, files=edits | files.flatmap(damaged))


# --- videos -----------------------------------------------------------------------------------------------------------


CLIPS = ("main.mp4", "second.webm", "ntsc.mp4", "minutes.mkv", "audio.webm", "rotated.mp4", "no_video.m4a")
LIMITS = Limits(file_bytes=2**20, frames=200, seconds=1000, pixels=10**5, kept_pixels=10**6, wall=20)
FRAMES = Tiling(16, 1, 1, False, False, (0.5,) * 3, (0.5,) * 3, 3, False)
FAMILIES = ("gemma4", "internvl3", "qwen2_5_vl", "qwen3_vl", "smolvlm")
COUNTS = st.sampled_from((1, 2, 3, 7, 100, 4000, 2**20, 2**31)) | st.integers(1, 2**31)


def in_little_memory(call):
    """What a call returns, which holds less than 64 MiB at any time."""
    tracemalloc.start()
    try:
        found = call()
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    return found


@pytest.fixture
def clip(goldens):
    pytest.importorskip("av", reason="PyAV is not installed (extra video)")
    return goldens / "video/clips/main.mp4"


def test_clips(clip, tmp_path):
    whole, path = [clip.with_name(name).read_bytes() for name in CLIPS], tmp_path / "clip.mp4"

    def read():
        found = VideoReader(VideoConfig("linspace"), LIMITS, FRAMES, count=4).read(path, "r1")
        assert found.frames.shape == (4, found.height, found.width, 3)

    fuzz_file(25, path, read, files=st.sampled_from(whole).flatmap(damaged))


@pytest.mark.parametrize("family", FAMILIES)
def test_video_processors(goldens, clip, tmp_path, family):
    """A small clip, and a processor of any values: arrays for the tower or a line, before anything large is made."""
    for name in ("config.json", "processor_config.json"):
        shutil.copy(goldens / "video" / family / "ckpt" / name, tmp_path)
    default, path = find(json.loads((tmp_path / "config.json").read_text())).video, tmp_path / "processor_config.json"
    whole = json.loads(path.read_text())
    values, sides = whole["video_processor"], ("height", "width", "shortest_edge", "longest_edge")
    numbers = {name for name, value in values.items() if not isinstance(value, bool | str)}
    names = sorted(numbers | {"patch_size", "merge_size", "min_pixels", "num_frames"})
    sizes = st.dictionaries(st.sampled_from(sides), COUNTS)
    counts = st.dictionaries(st.sampled_from(names), COUNTS)
    counts |= st.dictionaries(st.sampled_from(("size", "max_image_size")), sizes)
    import_module("transformers.image_utils")  # slow while memory is traced

    @fuzz(25, video=counts.map(lambda changes: {**values, **changes}) | edited(values))
    def check(video):
        path.write_text(json.dumps({**whole, "video_processor": video}))

        def read():
            config = load_video_config(tmp_path, default)
            data = DataSpec(aspect_ratio="pad", max_image_pixels=10**6, cache_megabytes=0, max_video_pixels=10**6)
            loader = load_image_processor(tmp_path, data, slot_tokens=9, video=config)
            return loader.shape, loader.load(VideoSource(clip), "r1")

        loaded = in_little_memory(lambda: reads(read, tmp_path.name, "record r1"))
        assert loaded is None or loaded[1].shape[-len(loaded[0]) :] == loaded[0]


def test_settings_of_videos(clip):
    """Whatever the section `data` accepts, a small clip is read, or a line says which limit it exceeds."""
    names = ("video_fps", "video_frames", "max_video_megabytes", "max_video_frames", "max_video_seconds")
    names += ("max_video_pixels", "video_timeout", "max_image_pixels")
    odd = st.sampled_from((1, 10**6, 10**12, 2**31, 2**62, 1e300, 1e-300))

    @fuzz(40, rule=st.sampled_from(sorted(SAMPLING)), values=st.dictionaries(st.sampled_from(names), odd))
    def check(rule, values):
        def read():
            data = override(DataSpec(), values, "data")
            return video_reader(data, VideoConfig(rule, size=(16, 16)), 1, FRAMES).read(clip, "r1")

        found = in_little_memory(lambda: reads(read, "data.", "record r1"))
        assert found is None or len(found.frames) == len(found.indices)


def test_sampling():
    """Whatever is asked for, the indices are of the clip and no list is longer than the clip or the request."""
    fps = st.sampled_from((1e-6, 0.1, 24, 1e6)) | st.floats(1e-3, 1e6)
    asked = st.builds(dict, video_frames=st.integers(1, 100_000)) | st.builds(dict, video_fps=st.none() | fps)

    def config(rule, fps, count, least, patch):
        return VideoConfig(rule, fps, count, *sorted((least, count)), temporal_patch=patch)

    configs = st.builds(config, st.sampled_from(sorted(SAMPLING)), fps, COUNTS, COUNTS, st.integers(1, 16))

    @fuzz(100, config=configs, total=st.integers(1, 40_000), rate=fps, duration=st.floats(1e-6, 1e9), asked=asked)
    def check(config, total, rate, duration, asked):
        call = functools.partial(frame_indices, config, total, rate, duration=duration, **asked)
        indices = in_little_memory(call)
        assert set(indices) <= set(range(total))
        assert len(indices) <= max(total, asked.get("video_frames") or 0)


def test_parts(clip):
    odd, reader = (
        st.sampled_from(ODD) | st.floats() | st.integers(-3, 10**30),
        VideoReader(VideoConfig("linspace"), LIMITS, FRAMES, count=2),
    )

    @fuzz(100, part=st.dictionaries(st.sampled_from(("start", "end")), odd | st.floats(0, 3), min_size=1))
    def check(part):
        info = reads(lambda: reader.describe(clip, "r1", video_part(part, [clip], "file, record r1")), "record r1")
        assert info is None or {*info.indices} <= {*range(16)}


def test_facts_of_a_clip(clip, monkeypatch):
    """What a decoder says of a file is checked like the file."""
    numbers = st.sampled_from(ODD) | st.integers(-1, 2**40) | st.floats()
    whole = {"total": 2000, "fps": 24.0, "duration": 80.0, "height": 48, "width": 64}

    @fuzz(60, changes=st.dictionaries(st.sampled_from(sorted(whole)), numbers), kept=st.booleans())
    def check(changes, kept):
        reply, nothing = {**whole, **changes} if kept else changes, lambda *_: None
        answer = {"line": lambda name: copy.deepcopy(reply)}
        monkeypatch.setattr(process, "_IDLE", [SimpleNamespace(send=nothing, hang_up=nothing, kill=nothing, **answer)])
        with clip.open("rb") as file:
            facts = reads(lambda: process.describe(file, "main.mp4", LIMITS), "main.mp4")
        assert facts is None or (facts.total >= 1 and 0 < facts.fps < math.inf)
