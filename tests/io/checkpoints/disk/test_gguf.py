"""Headers of GGUF files against gguf's own writer and reader, and what a hostile one may claim."""

import os
import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from refusal import refused

from vlmprune_jax.io.checkpoints.disk.gguf import read_gguf_header


def written(path, writer):
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


def test_header_is_that_of_the_writer(tmp_path):
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "ccc"])
    writer.add_array("x.floats", [1.5, 2.5])
    writer.add_array("x.layers", [3, -1])
    writer.add_array("x.long", [0] * 1001)
    writer.add_string("x.template", "t" * 5000)
    writer.add_bool("x.flag", True)
    writer.add_tensor("a", np.zeros((4, 32), np.float32))
    writer.add_tensor("b", np.zeros((2, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    header, theirs = read_gguf_header(written(path, writer)), GGUFReader(path)
    assert header.fields == {
        "general.architecture": "llama", "llama.context_length": 64, "x.flag": True, "x.layers": (3, -1),
    }  # fmt: skip
    assert header.types == {"F32": 512, "Q8_0": 68}
    assert header.weights == sum(int(tensor.n_elements) for tensor in theirs.tensors) == 128 + 64


def field(name, kind, payload):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + payload


def header(*fields, tensors=0, n_fields=None, rest=b""):
    count = len(fields) if n_fields is None else n_fields
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + b"".join(fields) + rest


TENSOR = struct.pack("<Q", 1) + b"x"
BOMBS = {
    "an array of 4 GB": header(field(b"x", 9, struct.pack("<IQ", 7, 2**32)), rest=bytes(60)),
    "an array of 2**64 bytes": header(field(b"x", 9, struct.pack("<IQ", 10, 2**61)), rest=bytes(60)),
    "an array of texts": header(field(b"x", 9, struct.pack("<IQ", 8, 2**40)), rest=bytes(60)),
    "an array of arrays": header(field(b"x", 9, struct.pack("<IQ", 9, 2**20)), rest=bytes(60)),
    "a text of 2**63 bytes": header(field(b"x", 8, struct.pack("<Q", 2**63))),
    "fields": header(n_fields=2**60),
    "tensors": header(tensors=2**60),
    "the same field": header(*[field(b"x", 4, bytes(4))] * 2),
    "an unknown type": header(field(b"x", 99, bytes(4))),
    "dimensions": header(tensors=1, rest=TENSOR + struct.pack("<I", 2**31)),
    "a tensor beyond the end": header(tensors=1, rest=TENSOR + struct.pack("<IQIQ", 1, 2**60, 0, 0)),
    "an offset beyond the end": header(tensors=1, rest=TENSOR + struct.pack("<IQIQ", 1, 1, 0, 2**62)),
    "half a block": header(tensors=1, rest=TENSOR + struct.pack("<IQIQ", 1, 33, 8, 0)),
    "a type of tensors": header(tensors=1, rest=TENSOR + struct.pack("<IQIQ", 1, 32, 77, 0)),
    "alignment": header(field(b"general.alignment", 4, bytes(4))),
    "another file": b"PK" + bytes(100),
    "nothing": b"",
}


@pytest.mark.parametrize("name", BOMBS)
def test_claims_are_compared_with_the_bytes_present(tmp_path, name):
    path = tmp_path / "a.gguf"
    path.write_bytes(BOMBS[name])
    refused(r"a\.gguf: cannot be read \(.*: export it again, or download it again", read_gguf_header, path)


@pytest.mark.parametrize(
    ("count", "used", "said"),
    [
        (8, [2, 8], None),
        (7, 2, r"says 7 experts \(some\.expert_count\), but the router blk\.0\.ffn_gate_inp\.weight is 4 x 8"),
        (None, 2, "says 0 experts"),
        (8, 9, r"says that a token uses 9 of 8 experts \(some\.expert_used_count\)"),
        (8, None, "says that a token uses 0 of 8"),
        (8, [2, 9], r"says that a token uses \(2, 9\) of 8"),
    ],
)  # fmt: skip
def test_numbers_of_experts(tmp_path, count, used, said):
    """llama.cpp aborts its process on those that contradict each other."""
    writer = GGUFWriter(tmp_path / "a.gguf", "some")
    if count is not None:
        writer.add_expert_count(count)
    if used is not None:
        (writer.add_array if isinstance(used, list) else writer.add_uint32)("some.expert_used_count", used)
    writer.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((8, 4), np.float32))
    path = written(tmp_path / "a.gguf", writer)
    if said is None:
        assert read_gguf_header(path).weights == 32
    else:
        refused(rf"a\.gguf: cannot be read \({said}.*: export it again", read_gguf_header, path)


def test_a_sparse_file_and_a_fifo(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(header(field(b"x", 9, struct.pack("<IQ", 0, 2**39))))
    os.truncate(path, 2**40)
    refused("has a header of more than 67,108,864 bytes", read_gguf_header, path)
    os.mkfifo(tmp_path / "b.gguf")
    refused(r"b\.gguf: is a FIFO, expected a file", read_gguf_header, tmp_path / "b.gguf")
