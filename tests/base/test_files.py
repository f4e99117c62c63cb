"""The ways in for foreign files and links: what is no regular file, too large, badly linked or lies is one line."""

import json
import os
import struct
import zipfile
from typing import TypedDict

import numpy as np
import pytest
from refusal import refused
from safetensors.numpy import save_file

from vlmprune_jax.base import files as checked_files
from vlmprune_jax.base.errors import printable
from vlmprune_jax.base.files import (
    checked,
    copy_file,
    open_file,
    parse_json,
    read_arrays,
    read_bytes,
    read_json,
    read_json_lines,
    reading,
)
from vlmprune_jax.base.links import check_links, is_inside, real_path
from vlmprune_jax.base.weight_files import read_header
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.run.cli.config_files import to_workdir

MISSING, TODO = "no such scores", "score again"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "is a FIFO, expected a file"),
        (os.mkdir, "is a folder, expected a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, expected a file"),
        (lambda path: path.symlink_to("nowhere"), "is a link to nowhere, which does not exist"),
        (lambda path: path.symlink_to(path.name), "is a link to itself"),
        (lambda path: None, "no such file"),
    ],
)
def test_what_is_no_file(tmp_path, make, message):
    make(tmp_path / "x")
    assert refused(message, open_file, tmp_path / "x") == f"{tmp_path}/x: {message}"


def test_names_that_no_file_has(tmp_path):
    refused("File name too long", open_file, tmp_path / ("x" * 300))
    refused("path contains an invalid character", open_file, tmp_path / "a\0b")
    refused(r"a\\x1b\[31m\\udcff: no such file", open_file, tmp_path / "a\x1b[31m\udcff")


def test_sizes(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bytes(tmp_path / "x", 5) == b"12345"
    refused("has 5 bytes, more than the maximum of 4", read_bytes, tmp_path / "x", 4)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    refused("bytes, more than", read_json, tmp_path / "sparse")
    refused("bytes, more than", read_json_lines, tmp_path / "sparse", dict)
    refused("bytes, more than", read_arrays, tmp_path / "sparse", missing=MISSING, todo=TODO)
    refused("bytes, more than", read_bytes, checked_files.Path("/proc/self/maps"), 100)  # says it has 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "too deeply nested"),
        ("[" * 101 + "]" * 101, "too deeply nested"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("[1]", "Expected `object`, got `array`"),
        ("", "is not valid JSON"),
    ],
)
def test_json(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    refused(message, read_json, path, todo=TODO)
    if text:
        refused(message, read_json_lines, path, dict)


def test_half_a_surrogate_pair_as_a_name():
    class Kind(TypedDict):
        a: int

    refused("does not have the expected content", checked, {"a": 1, "\ud800": 2}, Kind, "x.json", TODO)
    for unicode in (True, False):
        refused("surrogates not allowed", parse_json, '["\\ud800"]', "x.json", TODO, unicode=unicode)
    assert os.fsencode(parse_json('"\\udcff"', "x.json", TODO, unicode=False)) == b"\xff"  # the name of a file


def test_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a')
    assert read_json_lines(path, dict[str, int], cut=True) == [{"a": 1}, {"a": 2}]
    refused(f"{path}, line 4: is not valid JSON", read_json_lines, path, dict[str, int])
    path.write_text('{"a": 1}\n{"a": true}\n')
    refused("line 2: does not have the expected content", read_json_lines, path, dict[str, int], cut=True)


def test_everything_a_library_raises():
    class Panic(BaseException):
        pass

    def read(error):
        with reading("x.bin"):
            raise error

    for error in (RecursionError(), MemoryError(), Panic("no entry"), SystemExit(3), KeyError("x"), ValueError("\x1b")):
        refused(r"^x.bin: cannot be read \(", read, error)
    with pytest.raises(KeyboardInterrupt):
        read(KeyboardInterrupt())


def test_arrays(tmp_path):
    path, given = tmp_path / "x.npz", {"a": np.arange(6.0).reshape(2, 3).T, "b": np.array("text")}
    np.savez_compressed(path, **given)
    found = read_arrays(path, missing=MISSING, todo=TODO)
    assert {name: array.tolist() for name, array in found.items()} == {k: v.tolist() for k, v in given.items()}
    np.savez_compressed(path, a=np.zeros(10**7))
    refused("unpacks to 80,000,128 bytes", read_arrays, path, missing=MISSING, todo=TODO)
    refused(MISSING, read_arrays, tmp_path / "y.npz", missing=MISSING, todo=TODO)
    for text, data in (
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000,)}", b""),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}", b""),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"12345678"),
        ("{'descr': '<U0', 'fortran_order': False, 'shape': (5,)}", b""),
        ("__import__('os').abort()", b""),
        ("(" * 9000, b""),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
            archive.writestr("a.npy", header + data)
        refused("x.npz", read_arrays, path, missing=MISSING, todo=TODO)


def test_lines_for_a_terminal():
    assert printable("a\x1b[2J\r\nb\u202ec\ud800\0") == "a\\x1b[2J b\\u202ec\\ud800\\x00"
    assert len(printable("x" * 10**6)) < 500
    assert len(printable("x " * 10**6)) < 2100
    for text in ("x" * 10**5, "x " * 10**4, "\x1b" * 3000):
        assert printable(printable(text)) == printable(text)


# Links.


def test_links_in_a_folder_that_is_copied(tmp_path):
    blobs, folder = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/1"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    (blobs / "0f").write_text("licence")
    (tmp_path / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to("../../blobs/0f")
    (folder / "COPY").symlink_to("LICENSE")
    (folder / "README").symlink_to(tmp_path / "secret")
    for name in ("LICENSE", "COPY"):
        copy_file(folder / name, tmp_path / "copy", folder)
        assert (tmp_path / "copy").read_text() == "licence"
    refused("outside the folder", copy_file, folder / "README", tmp_path / "copy", folder)
    assert (tmp_path / "copy").read_text() == "licence"


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("eval", "outside"), ("training/tensorboard", "outside"), ("eval", "w/training"),
        ("shared/x/pruned/.hidden", "outside/mine"), ("eval", "nowhere"),
    ],
)  # fmt: skip
def test_a_workdir_leads_nowhere_else(tmp_path, link, target):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/mine").write_text("mine")
    (tmp_path / "w/training").mkdir(parents=True)
    place = tmp_path / "w" / link
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(tmp_path / target)
    refused(rf"w/{link}: is a symbolic link to .*{target}, and vlmprune .*: replace", to_workdir, str(tmp_path / "w"))


def test_links_inside_are_as_good_as_files_and_some_paths_lead_nowhere(tmp_path):
    """As in a hub cache; the workdir itself may be a link; a link to itself is told when it is opened."""
    (tmp_path / "w/hub/blobs").mkdir(parents=True)
    (tmp_path / "w/hub/snapshots").mkdir()
    (tmp_path / "w/hub/blobs/1").write_text("{}")
    (tmp_path / "w/hub/snapshots/config.json").symlink_to("../blobs/1")
    os.symlink("loop", tmp_path / "w/loop")
    (tmp_path / "other").symlink_to(tmp_path / "w")
    for folder in ("w", "other", "none"):
        check_links(tmp_path / folder)
    assert real_path(tmp_path / "w/loop/x") == tmp_path / "w/loop/x"
    assert is_inside(tmp_path / "w/loop", tmp_path)
    for text in ("a\0b", "\ud800"):
        assert not is_inside(tmp_path / text, tmp_path)
        refused("contains a NUL character or half of a surrogate pair: choose another", real_path, text)


# Weight files: every claim is checked, and what is read is read, never mapped.

VALUES = np.arange(4000, dtype=np.float32).reshape(100, 40)
READS = {
    "raw": (lambda entry: entry.raw().view("f4"), VALUES.ravel()),
    "array": (lambda entry: entry.array(), VALUES),
    "values": (lambda entry: entry.values(3990, 10), VALUES.ravel()[3990:]),
    "rows": (lambda entry: entry.rows(90, 100), VALUES[90:]),
    "elements": (lambda entry: entry.elements(np.array([[1, 3999]])), VALUES.ravel()[[[1, 3999]]]),
    "pieces": (lambda entry: np.concatenate([part.copy() for part in entry.pieces([0, 10, 4000])]), VALUES.ravel()),
}


@pytest.fixture
def path(tmp_path):
    save_file({"a": VALUES - 1, "b": VALUES}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", READS)
def test_a_shard_that_becomes_shorter_or_goes(path, name):
    """A mapped file would end the process with SIGBUS."""
    (read, expected), entry = READS[name], read_header(path)["b"]
    np.testing.assert_array_equal(read(entry), expected)
    os.truncate(path, entry.end - 8)
    refused(r"model\.safetensors: became shorter while it was read", read, entry)
    path.unlink()
    refused(r"model\.safetensors: no such file", read, entry)


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
    path.write_bytes(header(dtype="F6_E3M2") + bytes(8))  # of the future: can be copied, but not read
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


def test_shards_lie_in_the_folder_or_its_hub_cache(path, tmp_path):
    (tmp_path / "listed").mkdir()
    for shard in ("", "..", ".", "a/../b", "/etc/passwd", "x" * 300, "a\0b", "\ud800"):
        (tmp_path / "listed/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        refused(r"is outside the folder|missing|is a folder|surrogates not allowed", Checkpoint, tmp_path / "listed")
    snapshot = tmp_path / "models--a--b/snapshots/1"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    path.rename(tmp_path / "models--a--b/blobs/0")
    (snapshot / path.name).symlink_to("../../blobs/0")
    np.testing.assert_array_equal(Checkpoint(snapshot)["b"], VALUES)
