"""Damaged headers, shards and weights: one line that names the file or tensor, exit code 2, and nothing left behind."""

import json
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
from damage_cases import FIRST, INDEX, KEY, SECOND, edit_header, refused_by_all
from hf_cases import LLAMA, copy_golden, edit_config, edit_weights, keep_layers, make_folder
from refusal import refused
from safetensors.numpy import load_file

import vlmprune_jax as vp
from vlmprune_jax.run.cli.main import main


@pytest.fixture
def folder(goldens, tmp_path):
    return copy_golden(goldens, "llava_hf", tmp_path / "folder")


@pytest.fixture(scope="module")
def plan(goldens):
    return keep_layers(vp.load(goldens / "ckpt/llava_hf"), [0, 4, 5])[1]


def larger_shape(header):
    header[KEY]["shape"][0] += 1


def longer_range(header):
    header[KEY]["data_offsets"][1] += 4


def overlapping(header):
    end = header[KEY]["data_offsets"][1]
    after = next(one for one in header.values() if one.get("data_offsets", [0])[0] == end)
    after["data_offsets"] = [value - 8 for value in after["data_offsets"]]


def with_a_gap(header):
    del header[KEY]


def without_the_last(header):
    del header[max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])]


def huge(header):
    header[KEY]["shape"], header[KEY]["data_offsets"] = [2**62, 2**62], [0, 2**63]


def twice(header):
    return json.dumps(header)[:-1] + f', "{KEY}": {json.dumps(header[KEY])}}}'


def nested(header):
    return "[" * 100_000


def not_in_utf8(header):
    return json.dumps(header).encode("utf-16")


HEADERS = {
    larger_shape: (KEY, "cannot take"),
    longer_range: (KEY, "cannot take"),
    overlapping: ("overlaps",),
    with_a_gap: ("bytes before tensor", "belong to no tensor"),
    without_the_last: ("bytes after the last tensor belong to no tensor",),
    huge: (KEY, "truncated"),
    twice: (KEY, "is repeated"),
    nested: ("damaged safetensors header", "recursion"),
    not_in_utf8: ("damaged safetensors header", "utf-8"),
}


@pytest.mark.parametrize("edit", HEADERS, ids=lambda edit: edit.__name__)
def test_headers_that_lie(capsys, folder, plan, edit):
    edit_header(folder / SECOND, edit)
    refused_by_all(capsys, folder, plan, f"{folder / SECOND}: ", *HEADERS[edit])


@pytest.mark.parametrize("cut", [0, 7, 100, 3000, -1])
def test_truncated(capsys, folder, plan, cut):
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:cut])
    refused_by_all(capsys, folder, plan, f"{folder / SECOND}: truncated", "download it again")


def test_header_that_claims_more_than_the_file(capsys, folder, plan):
    raw = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(struct.pack("<Q", 2**40) + raw[8:])
    refused_by_all(capsys, folder, plan, f"{folder / FIRST}: truncated or not safetensors")


# Shards ---------------------------------------------------------------------------------------------------------------


def test_missing_shard(capsys, folder, plan):
    (folder / SECOND).unlink()
    refused_by_all(capsys, folder, plan, str(folder), INDEX, f"missing ({SECOND}")


def test_same_key_in_two_shards(capsys, folder, plan):
    value = load_file(folder / SECOND)[KEY]
    edit_weights(folder, lambda tensors: tensors | {KEY: value}, FIRST)
    refused_by_all(capsys, folder, plan, f"{folder / SECOND}: tensor {KEY}", f"is also in {FIRST}")


def test_shards_that_changed_places(capsys, folder, plan):
    """Every tensor is there, but not where the index says: two uploads are mixed."""
    (folder / FIRST).rename(folder / "first")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "first").rename(folder / SECOND)
    refused_by_all(capsys, folder, plan, str(folder), "the index lists", "does not contain it")


def test_shard_of_another_model(capsys, folder, plan):
    """Of the same family and with the same names, but wider."""
    edit_weights(folder, lambda all_: {k: np.concatenate([v, v]) for k, v in all_.items()}, SECOND)
    refused_by_all(capsys, folder, plan, str(folder), "has shape", "config.json says")


def test_shard_of_the_same_shapes_of_another_model(folder, plan):
    """Headers cannot tell; the plan's fingerprint does."""
    draw = np.random.default_rng(0)
    edit_weights(folder, lambda all_: {k: v + draw.normal(size=v.shape).astype("f4") for k, v in all_.items()}, SECOND)
    refused("sizes are equal, but fingerprints differ", vp.prune_folder, folder, plan, folder.parent / "out")


def test_git_lfs_pointers(capsys, folder, plan, goldens, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4000000000\n"
    (folder / FIRST).write_text(pointer)
    refused_by_all(capsys, folder, plan, f"{folder / FIRST}: a Git LFS pointer", "download it again")
    shutil.rmtree(folder)
    binary = copy_golden(goldens, "llava_orig_bin", tmp_path / "binary")
    (binary / "pytorch_model.bin").write_text(pointer)
    assert main(["inspect", str(binary), f"--vision_dir={goldens / 'ckpt/clip_tower'}"]) == 2
    assert "pytorch_model.bin: a Git LFS pointer" in capsys.readouterr().err


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8"])
def test_quantised_dtypes(capsys, folder, plan, dtype):
    edit_weights(folder, lambda all_: all_ | {KEY: all_[KEY].astype(np.int8)}, SECOND)
    edit_header(folder / SECOND, lambda header: header[KEY].update(dtype=dtype))
    refused_by_all(capsys, folder, plan, f"{KEY} has dtype {dtype}", "F32, F16, BF16", "unquantised")


def test_dtypes_that_nobody_knows(capsys, folder, plan):
    edit_header(folder / SECOND, lambda header: header[KEY].update(dtype="F4"))
    refused_by_all(capsys, folder, plan, f"{KEY} has dtype F4")


@pytest.mark.parametrize("where", ["", "text_config"])
def test_quantization_config(capsys, folder, plan, where):
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, **({where: {**config[where], **quantised}} if where else quantised))
    refused_by_all(
        capsys, folder, plan, f"{folder / 'config.json'}: ", "quant_method 'gptq'", "use the unquantised checkpoint"
    )


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite(tmp_path, dtype, value):
    source = make_folder(tmp_path / "source", LLAMA)
    edit_weights(source, lambda all_: {key: array.astype(dtype) for key, array in all_.items()})
    plan = keep_layers(vp.load(source), [1, 3])[1]
    key = "model.layers.3.self_attn.o_proj.weight"
    edit_weights(source, lambda all_: all_[key].__setitem__((7, 20), value))
    for call in (lambda: vp.load(source), lambda: vp.prune_folder(source, plan, tmp_path / "out")):
        refused(f"tensor {key}.* has 1 NaN or infinite", call)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
