"""Damaged data files, images and data sets: reading them returns or raises one line that names file and record."""

import contextlib
import io
import json
import struct

import pyarrow as pa
import pytest
from data_cases import write_split
from fuzz_cases import damaged, edited, fuzz_file, fuzz_folder, json_files, json_lines
from hypothesis import strategies as st
from PIL import Image

from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.datasets import read_datasets
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.records import data_files, read_records
from vlmprune_jax.io.data.tfds import read_tfds, write_tfds

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
    loader = load_image_processor(
        goldens / "ckpt/clip_tower", DataSpec(aspect_ratio="pad", max_image_pixels=10**6, cache_megabytes=0)
    )
    with Image.open(goldens / "data/images/img1.png") as image:
        picture = image.convert("RGB")
    path, whole = tmp_path / "img1.jpg", {}
    for name in FORMATS:
        buffer = io.BytesIO()
        picture.save(buffer, name)
        whole[name] = buffer.getvalue()

    def read():
        assert loader.load(path, "r1").shape == (1, *loader.shape)

    fuzz_file(150, path, read, files=st.sampled_from(FORMATS).flatmap(lambda name: damaged(whole[name])))


def test_data_sets(goldens, tmp_path):
    (tmp_path / "records.json").write_text(json.dumps(RECORDS))
    records = read_records(tmp_path / "records.json", goldens / "data/images")
    write_tfds(records, tmp_path / "ds", image_root=goldens / "data/images")

    def read():
        for record in read_tfds(tmp_path / "ds"):
            for image in record.images:
                with contextlib.suppress(OSError):  # a missing image, as a missing file: its record is named by loaders
                    image.read_bytes()

    fuzz_folder(100, tmp_path / "ds", read)


def test_folders_of_datasets(goldens, tmp_path):
    picture = (goldens / "data/images/img1.png").read_bytes()
    rows = [{"question": "A dog?", "answer": "yes", "choices": ["a", "b"], "n": i, "image": picture} for i in range(3)]
    folder = write_split(tmp_path / "set", rows)
    (folder / "dataset_info.json").unlink(missing_ok=True)  # which is not read

    def read():
        return [image.read_bytes()[:4] for record in read_datasets(folder) for image in record.images]

    fuzz_folder(150, folder, read)


COLUMNS = {
    "question": pa.array(["A dog?", "b?", None]),
    "n": pa.array([1, 2, 3], pa.int8()),
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
