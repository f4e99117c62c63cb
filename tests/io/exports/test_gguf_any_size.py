"""Qwen-VL in llama.cpp: images of any size, positions by rows and columns, features for several decoder layers."""

import shutil

import numpy as np
import pytest
from gguf import GGUFReader
from gguf_cases import FAMILIES, LIMITS, compare_answers, compare_limit, differences, make_qwen, prepared
from hf_cases import keep_layers, keep_width
from hf_cases import prune as prune_by_hand
from llama_cpp import MARKER, llama_cpp
from prune_cases import tower_neurons
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.io.exports.write import check_saved

pytest.importorskip("xllamacpp")


def compare(source, model, out, cells):
    """An image of so many tokens (rows, columns), and a text alone."""
    compare_answers(source, model, out, cells, "What is it?")
    ids = np.random.default_rng(0).integers(4, 340, (1, 50))
    assert differences(vp.forward(model, ids)[0][0], llama_cpp(out, rows=ids)["logits"][0])[0] <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cells"), [("qwen3_vl", (7, 3)), ("qwen3_vl", (2, 2)), ("qwen2_5_vl", (5, 6))])
def test_the_same_is_computed(tmp_path, name, cells):
    """More and fewer patches than the table has positions; whole windows and parts of some."""
    source, model = make_qwen(tmp_path, name)
    vp.save(model, tmp_path / "out", source_dir=source, format="gguf", dtype="float32")
    compare(source, model, tmp_path / "out", cells)
    assert check_saved(model, tmp_path / "out", source_dir=source, format="gguf")["backend"] == "llama.cpp"
    assert "sides that are multiples of" in (tmp_path / "out/README.md").read_text()


def test_limits_of_tokens_are_options(tmp_path):
    compare_limit(*make_qwen(tmp_path, "qwen3_vl"), tmp_path, 2, 20)


def pruned(model, how):
    if how == "layers":
        return keep_layers(model, [0, 1, 3])[0]
    if how == "heads":
        return keep_width(model, range(1), range(3, 51))[0]
    if how == "neurons":
        return keep_width(model, range(2), range(3, 51))[0]
    return prune_by_hand(model, tower_neurons(model), "vision")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"), [("qwen3_vl", "layers"), ("qwen3_vl", "heads"), ("qwen3_vl", "tower"), ("qwen2_5_vl", "neurons")]
)
def test_pruned_models(tmp_path, name, how):
    source, whole = make_qwen(tmp_path, name)
    model = pruned(whole, how)
    vp.save(model, tmp_path / "out", source_dir=source, format="gguf", dtype="float32")
    compare(source, model, tmp_path / "out", (4, 3))


def test_limits_of_the_processor(tmp_path):
    """Larger images become as many tokens as here, by the limits in the file."""
    source, model = make_qwen(tmp_path, "qwen3_vl")
    vp.save(model, tmp_path / "out", source_dir=source, format="gguf", dtype="float32")
    tower = GGUFReader(next((tmp_path / "out").glob("mmproj-*")))
    limits = [tower.fields[f"clip.vision.image_{name}_pixels"].contents() for name in ("min", "max")]
    assert limits == [LIMITS["shortest_edge"], LIMITS["longest_edge"]]
    image = np.zeros((400, 200, 3), np.uint8)
    found = llama_cpp(tmp_path / "out", image=image, prompt=f"{MARKER}What?")["features"]
    assert len(found) == len(prepared(source, image)) // 4 < 400 * 200 // 64


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen3_vl", {"temporal_patch_size": 3}, r"patches of 3 copies of an image \(2\)"),
        ("qwen3_vl", {"spatial_merge_size": 3}, r"tokens of 3 x 3 patches \(2 x 2\)"),
        ("qwen3_vl", {"rope_parameters": {"rope_theta": 500.0}}, "rotary base 500 in a tower"),
        ("qwen2_5_vl", {"window_size": 56}, r"windows of 2 tokens per side \(4\)"),
        ("qwen2_5_vl", {"fullatt_block_indexes": [0, 3]}, r"full attention in blocks \[0, 3\] of 4"),
    ],
)
def test_what_is_not_computed(tmp_path, name, changes, said):
    source, model = make_qwen(tmp_path, name, **changes)
    refused(f"llama.cpp has no {said}", vp.save, model, tmp_path / "out", source_dir=source, format="gguf")
    assert not (tmp_path / "out").exists()


def test_biases_of_the_decoder(tmp_path):
    source, model = make_qwen(tmp_path, "qwen3_vl")
    biased = shutil.copytree(FAMILIES / "qwen3_vl/ckpt", tmp_path / "biased")
    with pytest.raises(vp.UserError, match=r"qwen3vl has no biases .qkv_bias, out_bias."):
        vp.save(vp.load(biased), tmp_path / "out", source_dir=biased, format="gguf")
    (source / "processor_config.json").unlink()
    with pytest.raises(vp.UserError, match=r"has no preprocessor_config\.json, which limits the size of images"):
        vp.save(model, tmp_path / "out", source_dir=source, format="gguf")
