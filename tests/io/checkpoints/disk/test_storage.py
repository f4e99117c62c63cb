"""Weights that are several tensors: a format that this file alone adds is read, pruned, written, shown and refused."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from hf_cases import (
    LLAMA,
    LLAVA,
    assert_equal,
    assert_same_tensors,
    edit_config,
    edit_weights,
    keep_layers,
    keep_width,
    make_folder,
)
from refusal import refused
from safetensors.numpy import load_file

import vlmprune_jax as vp
from vlmprune_jax.base.weight_files import Entry
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint, storages
from vlmprune_jax.io.checkpoints.read import open_model
from vlmprune_jax.io.exports.reload import check_export
from vlmprune_jax.run.cli.main import main

JsonDict = dict[str, Any]


# The format: everything that a new one has to say --------------------------------------------------------------------


@dataclass(frozen=True)
class Int8Rows:
    """Matrices of the decoder's layers as int8 [rows, columns] and a scale per row, in the weight's dtype."""

    levels: int = 127
    name: str = "int8_rows"
    suffixes: tuple[str, ...] = ("", "_scale")

    @classmethod
    def from_config(cls, settings: JsonDict) -> Int8Rows:
        if type(settings.get("levels")) is not int or not 1 <= settings["levels"] <= 127:
            raise vp.UserError(f"levels is {settings.get('levels')!r}, expected 1 to 127")
        return cls(settings["levels"])

    def to_config(self, shapes: Mapping[str, tuple[int, ...]]) -> JsonDict:
        scaled = {key.removesuffix("_scale") for key in shapes if key.endswith(".weight_scale")}
        plain = sorted(key for key in shapes if key.endswith(".weight") and key not in scaled)
        return {"quant_method": "int8_rows", "levels": self.levels, "ignore": plain}

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        return name.startswith("text/layers/") and len(shape) == 2

    def weight(self, parts: Mapping[str, Entry]) -> tuple[str, tuple[int, ...]]:
        return parts["_scale"].dtype, parts[""].shape

    def tensors(self, dtype: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows, columns = shape
        return {"": ("I8", (rows, columns)), "_scale": (dtype, (rows, 1))}

    def decode(self, parts: Mapping[str, Entry], start: int, stop: int) -> np.ndarray:
        scale = parts["_scale"].rows(start, stop)
        return parts[""].rows(start, stop).astype(scale.dtype) * scale

    def encode(self, name: str, values: np.ndarray) -> dict[str, np.ndarray]:
        scale = np.abs(values).max(axis=1, keepdims=True) / np.asarray(self.levels, values.dtype)
        return {"": np.round(values / np.where(scale == 0, 1, scale)).astype(np.int8), "_scale": scale}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(storages, "int8_rows", Int8Rows.from_config)


def dequantised(folder):
    """What the format says, worked out from the files by other means: key -> array."""
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    scaled = {key: tensors.pop(f"{key}_scale") for key in list(tensors) if f"{key}_scale" in tensors}
    return {
        key: value.astype(scaled[key].dtype) * scaled[key] if key in scaled else value for key, value in tensors.items()
    }


@pytest.fixture(params=["llama", "llava_sharded", "phi3"])
def pair(request, goldens, tmp_path, monkeypatch):
    """A folder in the format, and one with the same values in plain tensors."""
    monkeypatch.setattr("vlmprune_jax.io.exports.folder.MAX_SHARD_BYTES", 40_000)
    if request.param == "phi3":
        from decoder_cases import PHI3

        source = make_folder(tmp_path / "source", PHI3)
    else:
        source = make_folder(tmp_path / "source", LLAMA if request.param == "llama" else LLAVA)
    vp.save(vp.load(source), tmp_path / "int8", source_dir=source, dtype="source", storage=Int8Rows())
    vp.save(vp.load(tmp_path / "int8"), tmp_path / "plain", source_dir=tmp_path / "int8", dtype="source")
    return tmp_path / "int8", tmp_path / "plain"


@pytest.fixture
def int8(tmp_path):
    source = make_folder(tmp_path / "llama", LLAMA)
    vp.save(vp.load(source), tmp_path / "int8", source_dir=source, dtype="source", storage=Int8Rows())
    return tmp_path / "int8"


# Read and written ----------------------------------------------------------------------------------------------------


def test_what_is_in_the_files(pair):
    int8, plain = pair
    checkpoint, expected = Checkpoint(int8), dequantised(int8)
    matrices = {key for key, value in expected.items() if value.ndim == 2 and re.search(r"model\.layers\.\d", key)}
    assert len(matrices) > 8
    assert {key for key, entry in checkpoint.tensors.items() if entry.dtype == "I8"} == matrices
    assert {key for key in checkpoint.tensors if key.endswith("_scale")} == {f"{key}_scale" for key in matrices}
    assert set(checkpoint) == set(expected) == set(Checkpoint(plain).tensors)
    index = json.loads((int8 / "model.safetensors.index.json").read_text())
    held = {key: shard.name for shard in int8.glob("*.safetensors") for key in load_file(shard)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(entry.n_bytes for entry in checkpoint.tensors.values())
    assert len(set(held.values())) > 2
    written = json.loads((int8 / "config.json").read_text())["quantization_config"]
    assert written["ignore"] == sorted(key for key in expected if key.endswith(".weight") and key not in matrices)
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    for key, value in load_all(plain).items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)


def load_all(folder):
    return {key: value for shard in folder.glob("*.safetensors") for key, value in load_file(shard).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_that_of_the_decoded_weights(pair, dtype):
    int8, plain = pair
    model = vp.load(int8, dtype=dtype)
    assert_equal(model, vp.load(plain, dtype=dtype))
    assert vp.fingerprint(open_model(int8)) == vp.fingerprint(model) == vp.fingerprint(vp.load(plain))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_every_device_reads_its_own_slice(tmp_path, monkeypatch, sizes):
    """In pieces that end inside a device's rows, and rows that are cut between devices."""
    config = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 96}
    source = make_folder(tmp_path / "llama", config)
    vp.save(vp.load(source), tmp_path / "int8", source_dir=source, dtype="source", storage=Int8Rows())
    expected = vp.load(tmp_path / "int8")
    monkeypatch.setattr("vlmprune_jax.io.checkpoints.read._PIECE", 5 * 48)
    model = vp.load(tmp_path / "int8", mesh=make_mesh(*sizes))
    assert_equal(model, expected)
    vp.save(model, tmp_path / "again", source_dir=source, dtype="source", storage=Int8Rows())
    assert_same_tensors(tmp_path / "int8", tmp_path / "again")


def test_again_is_bitwise(pair, tmp_path):
    """What the format holds exactly comes back as it was: same codes, same scales, same folder."""
    int8, _ = pair
    vp.save(vp.load(int8), tmp_path / "again", source_dir=int8, dtype="source", storage=Int8Rows())
    assert_same_tensors(int8, tmp_path / "again")
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (int8, tmp_path / "again")]
    assert {**files[0], "README.md": b""} == {**files[1], "README.md": b""}


CUTS = {
    "depth": lambda model: keep_layers(model, [0, 2]),
    "width": lambda model: keep_width(model, [0], range(3, 40, 2)),
}


@pytest.mark.parametrize("cut", CUTS)
def test_file_surgery_writes_plain_tensors(pair, tmp_path, cut):
    """Byte for byte what surgery of the plain folder writes, and what `save` writes of the loaded model."""
    int8, plain = pair
    pruned, plan = CUTS[cut](vp.load(plain))
    vp.prune_folder(int8, plan, tmp_path / "cut")
    vp.prune_folder(plain, plan, tmp_path / "expected")
    vp.save(pruned, tmp_path / "saved", source_dir=int8, dtype="source", plan=plan)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("cut", "expected", "saved")]
    for name, other in (("expected", contents[1]), ("saved", contents[2])):
        other["README.md"] = other["README.md"].replace(b"plain", b"int8")
        assert {**contents[0]} == other, name


def test_surgery_from_file_to_file_in_the_format(int8, tmp_path):
    model = open_model(int8)
    _, plan = keep_width(vp.load(int8), [0, 2], range(0, 56, 2))
    vp.save(vp.apply_plan(model, plan), tmp_path / "lazy", source_dir=int8, dtype="source", storage=Int8Rows())
    loaded = vp.apply_plan(vp.load(int8), plan)
    vp.save(loaded, tmp_path / "loaded", source_dir=int8, dtype="source", storage=Int8Rows())
    assert_same_tensors(tmp_path / "lazy", tmp_path / "loaded")
    assert {"I8", "F32"} == {entry.dtype for entry in Checkpoint(tmp_path / "lazy").tensors.values()}


def test_the_check_of_an_export(int8):
    """In JAX: PyTorch does not know the format."""
    edit_config(int8, architectures=["LlamaForCausalLM"])
    model = vp.load(int8)
    layout = "vlmprune_jax.io.exports.reload.torch_loads"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, lambda *args: False)
        assert check_export(model, int8)["max_abs_logit_difference"] == 0


def test_inspect_names_it(int8, capsys):
    assert main(["inspect", str(int8)]) == 0
    assert re.search(r"files .* 28 x I8.*, weights in int8_rows\n", capsys.readouterr().out)
    assert main(["inspect", str(int8), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["storage"], found["tensors"]) == ("int8_rows", 67)
    assert found["bytes"] == sum(entry.n_bytes for entry in Checkpoint(int8).tensors.values())


# Refused -------------------------------------------------------------------------------------------------------------

KEY = "model.layers.1.mlp.up_proj.weight"


def renamed(before, after):
    return lambda tensors: {key.replace(before, after): value for key, value in tensors.items()}


def without(key):
    return lambda tensors: {name: value for name, value in tensors.items() if name != key}


def replaced(key, edit):
    return lambda tensors: tensors | {key: edit(tensors[key])}


DAMAGE = {
    "no_values": (without(KEY), f"{KEY}_scale has no {KEY} beside it"),
    "unknown_weight": (renamed("1.mlp.up_proj", "1.mlp.high_proj"), "unknown key model.layers.1.mlp.high_proj.weight"),
    "plain_values": (replaced(KEY, lambda it: it.astype("f4")), f"{KEY} is F32 [56, 48], expected I8 [56, 48]"),
    "wide_scales": (replaced(f"{KEY}_scale", lambda it: it.astype("f8")), f"{KEY}: is decoded to F64, supported are"),
    "one_axis": (replaced(KEY, lambda it: it.reshape(-1)), f"{KEY}: not enough values to unpack"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused_by_name(int8, tmp_path, damage):
    edit, fact = DAMAGE[damage]
    plan = keep_layers(vp.load(int8), [1, 3])[1]
    edit_weights(int8, edit)
    for call, *args in ((vp.load, int8), (vp.prune_folder, int8, plan, tmp_path / "out")):
        assert str(int8) in refused(re.escape(fact), call, *args)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "int8_rows", "levels": 200}, "quantization_config: levels is 200, expected 1 to 127"),
        ({"quant_method": "int4_rows"}, "quant_method 'int4_rows'.* use the unquantised checkpoint"),
        ({"quant_method": ["int8_rows"]}, "use the unquantised checkpoint"),
        ("int8_rows", "use the unquantised checkpoint"),
    ],
)
def test_settings_that_are_not_known(int8, settings, said):
    edit_config(int8, quantization_config=settings)
    for call in (lambda: vp.load(int8), lambda: Checkpoint(int8)):
        refused(f"config.json: .*{said}", call)


def test_without_the_format(int8, monkeypatch):
    monkeypatch.delitem(storages, "int8_rows")
    refused(r"quantised .*quant_method 'int8_rows'", vp.load, int8)


# Memory --------------------------------------------------------------------------------------------------------------


def test_decoded_in_pieces(tmp_path):
    """A load has no decoded weight beside the parameters, and a save no encoded model."""
    source = make_folder(tmp_path / "wide", {**LLAMA, "intermediate_size": 60_000, "num_hidden_layers": 5})
    int8 = tmp_path / "int8"
    vp.load(source)
    tracemalloc.start()
    model = open_model(source)
    vp.save(model, int8, source_dir=source, dtype="source", storage=Int8Rows())
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    loaded = vp.load(int8)
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    assert size > 170e6
    assert written < 60e6  # one matrix of 12 MB, its temporaries, and the codes of the one before
    assert read < size + 25e6
