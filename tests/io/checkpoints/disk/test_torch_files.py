"""`.bin` files: plain tensors are found in their places, all else is named, and no pickle is ever run."""

import collections
import os
import zipfile

import pytest
import torch

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.checkpoints.disk.torch_files import read_torch

MATRIX = torch.arange(12.0).reshape(3, 4)


class Call:
    """What a hostile pickle holds."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_tensors(tmp_path, protocol):
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
    state = {str(kind): MATRIX.to(kind) for kind in kinds}
    state |= {"f8": MATRIX.to(torch.float8_e4m3fn), "u16": torch.ones(3, dtype=torch.uint16)}
    state |= {"part": MATRIX[1:], "scalar": torch.tensor(3), "none": torch.zeros(0, 3), "tied": MATRIX, "again": MATRIX}
    state |= {"parameter": torch.nn.Parameter(MATRIX), "row": MATRIX[:, :1].T[:, :1]}
    torch.save(collections.OrderedDict(state), tmp_path / "a.bin", pickle_protocol=protocol)
    entries = read_torch(tmp_path / "a.bin")
    assert list(entries) == list(state)
    for key, value in state.items():
        assert entries[key].shape == tuple(value.shape)
        plain = value.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        assert entries[key].raw().tobytes() == plain.view(torch.uint8).numpy().tobytes()


def with_an_attribute():
    tensor = MATRIX.clone()
    tensor.note = 3
    return tensor


OTHERS = {
    "whole module": (lambda path: torch.nn.Linear(2, 2), "Linear, not a state dict"),
    "whole list": (lambda path: [MATRIX], "another object"),
    "transposed": (lambda path: MATRIX.T, "is not contiguous"),
    "expanded": (lambda path: torch.zeros(1).expand(5), "is not contiguous"),
    "sparse": (lambda path: MATRIX.to_sparse(), "_rebuild_sparse_tensor"),
    "meta": (lambda path: MATRIX.to("meta"), "_rebuild_meta_tensor_no_storage"),
    "complex": (lambda path: MATRIX.to(torch.complex64), "ComplexFloatStorage"),
    "negative": (lambda path: torch._neg_view(MATRIX), "_rebuild_tensor_v2"),
    "attribute": (lambda path: with_an_attribute(), "_rebuild_from_type_v2"),
    "number": (lambda path: 3, "is a int"),
    "list": (lambda path: [MATRIX], "is a list"),
    "dict": (lambda path: {3: MATRIX}, "key 3 is not a string"),
    "hostile": (Call, "mkdir"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_values(tmp_path, name):
    make, said = OTHERS[name]
    value = make(tmp_path / "ran")
    torch.save(value if name.startswith("whole") else {"good": MATRIX, "odd": value}, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", said)
    assert not (tmp_path / "ran").exists()


def test_archives_that_lie(tmp_path):
    torch.save({"a": MATRIX, "b": MATRIX + 1}, tmp_path / "good.bin")
    with zipfile.ZipFile(tmp_path / "good.bin") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}

    def pack(kind=zipfile.ZIP_STORED, **changes):
        with zipfile.ZipFile(tmp_path / "a.bin", "w", kind) as archive:
            for name, content in records.items():
                new = changes.get(name.rpartition("/")[2].replace(".", "_"), content)
                if new is not None:
                    archive.writestr(name, new)
        return tmp_path / "a.bin"

    records = {f"archive/{name.partition('/')[2]}": content for name, content in records.items()}
    assert list(read_torch(pack())) == ["a", "b"]
    (tmp_path / "cut.bin").write_bytes(pack().read_bytes()[:500])
    refused(tmp_path / "cut.bin", "state dict")
    refused(pack(zipfile.ZIP_DEFLATED), "is compressed")
    refused(pack(data_pkl=None), "cannot be read")
    refused(pack(data_pkl=b"\x80\x02}"), "pickle exhausted")
    refused(pack(data_pkl=b"\x80\x02I3\n."), "its pickle has INT")
    refused(pack(byteorder=b"big"), "big-endian")
    refused(pack(**{"1": b"short"}), "b (shape [3, 4], F32) needs more bytes than the file stores")
    refused(pack(**{"1": None}), "archive/data/1' is missing")
    refused(pack(data_pkl=b"N" * 10_000_001), "an impossible size")
    # tuples of twice the same: 2**200 leaves in 800 bytes, which nobody may walk through, print or hash
    refused(pack(data_pkl=b"\x80\x02})" + b"q\0h\0\x86" * 200 + b"Ns."), "a key is not a string")
    torch.save({"a": MATRIX}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    refused(tmp_path / "a.bin", "since version 1.6")


def refused(path, *parts):
    with pytest.raises(UserError) as error:
        read_torch(path)
    for part in (str(path), *parts):
        assert part in str(error.value), str(error.value)
    assert len(str(error.value)) < 1000
