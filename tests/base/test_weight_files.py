"""Weight files that lie, change, or are none: every claim is checked, and what is read is read, never mapped."""

import json
import os
import struct

import numpy as np
import pytest
from refusal import refused
from safetensors.numpy import save_file

from vlmprune_jax.base.weight_files import read_header
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint

VALUES = np.arange(4000, dtype=np.float32).reshape(100, 40)


@pytest.fixture
def path(tmp_path):
    save_file({"a": VALUES, "b": VALUES + 1}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


READS = {
    "raw": lambda entry: entry.raw(),
    "array": lambda entry: entry.array(),
    "values": lambda entry: entry.values(3990, 10),
    "rows": lambda entry: entry.rows(90, 100),
    "elements": lambda entry: entry.elements(np.array([[1, 3999]])),
    "pieces": lambda entry: [piece.copy() for piece in entry.pieces([0, 10, 4000])],
}


def test_every_way_to_read(path):
    entry = read_header(path)["b"]
    flat = VALUES.reshape(-1) + 1
    assert entry.raw().tobytes() == flat.tobytes()
    np.testing.assert_array_equal(entry.array(), VALUES + 1)
    np.testing.assert_array_equal(entry.values(3990, 10), flat[3990:])
    np.testing.assert_array_equal(entry.rows(90, 100), VALUES[90:] + 1)
    np.testing.assert_array_equal(entry.elements(np.array([[1, 3999]])), flat[[[1, 3999]]])
    np.testing.assert_array_equal(np.concatenate(READS["pieces"](entry)), flat)


@pytest.mark.parametrize("read", READS)
def test_a_shard_that_becomes_shorter(path, read):
    """A mapped file would end the process with SIGBUS."""
    entry = read_header(path)["b"]
    os.truncate(path, entry.end - 8)
    refused(r"model\.safetensors: became shorter while it was read", READS[read], entry)


@pytest.mark.parametrize("read", READS)
def test_a_shard_that_goes(path, read):
    entry = read_header(path)["b"]
    path.unlink()
    refused(r"model\.safetensors: no such file", READS[read], entry)


def header(**fields):
    text = json.dumps({"name": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"shape": [1] * 400_000}, "a tensor of 400000 dimensions"),
        ({"shape": [2**31] * 64}, "cannot take 8 bytes"),
        ({"shape": [1]}, "cannot take 8 bytes"),
        ({"shape": [10**4000]}, "not a list of whole numbers"),
        ({"shape": [2.0]}, "not a list of whole numbers"),
        ({"shape": [-2]}, "not a list of whole numbers"),
        ({"shape": "ab"}, "not a list of whole numbers"),
        ({"data_offsets": [0, 10**4000]}, "offsets"),
        ({"data_offsets": [8, 0]}, "offsets"),
        ({"shape": [2**60], "data_offsets": [0, 2**62]}, ""),
        ({"dtype": "\x1b[31mF32"}, r"dtype \x1b[31mF32"),
        ({"dtype": "F" * 10**6}, "FFF...)"),
        ({"dtype": 7}, "dtype 7"),
    ],
)
def test_numbers_that_cannot_be(path, fields, said):
    path.write_bytes(header(**fields) + bytes(8))
    line = refused(f"^{path}: ", read_header, path)
    assert said in line
    assert len(line) < 2500


def test_files_that_end_elsewhere_or_are_none(path):
    no_tensor = b'{"a": 3}'
    for content in (
        b"", bytes(8), b"\xff" * 64, (10**9).to_bytes(8, "little") + b"{}", header(), header()[:-1],
        header() + bytes(4), header() + bytes(9), struct.pack("<Q", len(no_tensor)) + no_tensor,
    ):  # fmt: skip
        path.write_bytes(content)
        refused(f"^{path}: ", read_header, path)


def test_a_dtype_of_the_future_can_be_copied_but_not_read(path):
    path.write_bytes(header(dtype="F6_E3M2") + bytes(8))
    entry = read_header(path)["name"]
    assert entry.raw().tolist() == [0] * 8
    refused(r"tensor name has the unsupported dtype F6_E3M2 \(supported: F64", entry.array)


def test_many_names_one_of_them_twice(path):
    """Found in one pass over the names."""
    one = '{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
    names = [f'"{number}":{one}' for number in range(100_000)]
    text = ("{" + ",".join([*names, names[-1]]) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    refused("99999 is repeated", read_header, path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_no_file(tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path)
    for said in ("is a FIFO, expected a file", "is a link to gone, which does not exist", "is a link to itself"):
        refused(f"{name}: .*{said}", Checkpoint, tmp_path)
        path.unlink()
        path.symlink_to("gone" if "FIFO" in said else name)


@pytest.mark.parametrize("shard", ["", "..", ".", "a/../b", "/etc/passwd", "x" * 300, "a\0b", "\ud800"])
def test_shard_names(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(r"is outside the folder|missing|is a folder|surrogates not allowed", Checkpoint, tmp_path)


def test_a_folder_of_the_hub_cache(path, tmp_path):
    """Links to ../../blobs."""
    snapshot = tmp_path / "models--a--b/snapshots/1"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    path.rename(tmp_path / "models--a--b/blobs/0")
    (snapshot / path.name).symlink_to("../../blobs/0")
    np.testing.assert_array_equal(Checkpoint(snapshot)["a"], VALUES)
