"""Reading Hugging Face folders: spellings, dtypes, slices for a mesh, and everything that can be wrong with one."""

import json
import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from hf_cases import LLAMA, LLAVA, assert_equal, copy_golden, edit_config, edit_weights, make_folder
from refusal import refused
from safetensors.numpy import load_file, save_file

import vlmprune_jax as vp
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.io.checkpoints import read


@pytest.fixture
def llama(tmp_path):
    return make_folder(tmp_path / "llama", LLAMA)


# Spellings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    ["vision_model.", "", "model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower."],
)
def test_original_layout_tower_spellings_and_places(goldens, tmp_path, spelling):
    """The tower in its own folder (transformers 4 and 5 names), or inside the checkpoint with a config beside it."""
    expected = vp.load(goldens / "ckpt/llava_orig", vision_dir=goldens / "ckpt/clip_tower")
    folder = copy_golden(goldens, "llava_orig", tmp_path / "llava")
    tower = copy_golden(goldens, "clip_tower", tmp_path / "tower")
    renamed = {
        spelling + key.removeprefix("vision_model."): value
        for key, value in load_file(tower / "model.safetensors").items()
        if key.startswith("vision_model.")
    }
    if not spelling.startswith("model."):
        save_file(renamed, tower / "model.safetensors")
        assert_equal(vp.load(folder, vision_dir=tower), expected)
        return
    edit_weights(folder, lambda tensors: tensors | renamed)
    (tower / "model.safetensors").unlink()
    assert_equal(vp.load(folder, vision_dir=tower), expected)  # a folder with the config alone
    refused("clip-vit-large-patch14-336.*vision_dir", vp.load, folder)
    edit_config(folder, vision_config=json.loads((tower / "config.json").read_text())["vision_config"])
    assert_equal(vp.load(folder), expected)


def test_bin_and_index_and_single_file_are_one_model(goldens, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # which .bin files do not need
    tower = goldens / "ckpt/clip_tower"
    expected = vp.load(goldens / "ckpt/llava_orig", vision_dir=tower)
    assert_equal(vp.load(goldens / "ckpt/llava_orig_bin", vision_dir=tower), expected)
    sharded = copy_golden(goldens, "llava_hf", tmp_path / "llava_hf")
    whole = {}
    for shard in sorted(sharded.glob("*.safetensors")):
        whole |= load_file(shard)
        shard.unlink()
    (sharded / "model.safetensors.index.json").unlink()
    save_file(whole, sharded / "model.safetensors")
    assert_equal(vp.load(sharded), vp.load(goldens / "ckpt/llava_hf"))


def test_threads_share_the_rows_of_a_tensor(goldens, monkeypatch):
    """Parts of few rows give the same arrays, whole and sliced over a mesh."""
    folder, mesh = goldens / "ckpt/llava_hf", make_mesh(1, 4, 2)
    whole, sliced = vp.load(folder), vp.load(folder, mesh=mesh)
    monkeypatch.setattr(read, "_PART", 100)
    assert_equal(vp.load(folder), whole)
    assert_equal(vp.load(folder, mesh=mesh), sliced)


# Dtypes and placement -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_dtypes(llama, stored, asked):
    edit_weights(llama, lambda tensors: {key: value.astype(stored) for key, value in tensors.items()})
    tensors = load_file(llama / "model.safetensors")
    layers = vp.load(llama, dtype=asked).params["text"]["layers"]["0"]
    for i in range(4):
        expected = tensors[f"model.layers.{i}.mlp.up_proj.weight"].astype(asked)
        np.testing.assert_array_equal(layers["mlp"]["up_proj"]["weight"][i], expected)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(layers)} == {asked}


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (2, 4, 1)])
def test_every_device_reads_its_own_slice(tmp_path, sizes):
    config = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 96}
    folder = make_folder(tmp_path / "llama", config)
    expected, mesh = vp.load(folder), make_mesh(*sizes)
    model = vp.load(folder, mesh=mesh)
    assert_equal(model, expected)
    up = model.params["text"]["layers"]["0"]["mlp"]["up_proj"]["weight"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(4, 56 // sizes[2], 48 // sizes[1])}


def test_a_mesh_that_does_not_divide_is_refused_before_reading(llama):
    (llama / "model.safetensors").write_bytes(b"")
    assert "vocab_size = 97" in refused("does not divide", vp.load, llama, mesh=make_mesh(2, 1, 4))


def test_no_second_copy_of_the_weights(tmp_path):
    """The allocations of a load are the parameters themselves, page-cache maps aside."""
    folder = make_folder(tmp_path / "wide", {**LLAMA, "intermediate_size": 20000, "num_hidden_layers": 6})
    vp.load(folder)
    tracemalloc.start()
    model = vp.load(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert size > 50e6
    assert peak < 1.1 * size


# Config ---------------------------------------------------------------------------------------------------------------


def test_generation_config_supplies_missing_ids_only(llama, tmp_path):
    (llama / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 8], "pad_token_id": 9, "bos_token_id": 1})
    )
    assert vp.load(llama).cfg.eos_token_ids == (5,)
    edit_config(llama, eos_token_id=None, pad_token_id=None)
    cfg = vp.load(llama).cfg
    assert (cfg.eos_token_ids, cfg.pad_token_id, cfg.bos_token_id) == ((7, 8), 9, 3)
    folder = make_folder(tmp_path / "llava", LLAVA)  # whose ids are in text_config
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert vp.load(folder).cfg.eos_token_ids == (5,)


def test_folder_and_hub_names(tmp_path):
    (tmp_path / "file").write_text("")
    hub = r"^some-org/some-model: no such folder, and not available from the hub \("  # the tests run offline
    for fact, folder, options in (
        ("no such folder", tmp_path / "nothing", {}),
        ("no such folder", tmp_path / "file", {}),
        (hub, "some-org/some-model", {}),
        (r"config\.json: is missing", tmp_path, {}),
        ("float64", tmp_path, {"dtype": "float64"}),
    ):
        refused(fact, vp.load, folder, **options)


# Weights --------------------------------------------------------------------------------------------------------------


def test_weights_too_large_for_the_dtype(llama):
    key = "model.layers.1.mlp.up_proj.weight"
    edit_weights(llama, lambda tensors: tensors[key].__setitem__((0, 0), -7e4))
    vp.load(llama, dtype="bfloat16")
    refused(f"{key}.*float16", vp.load, llama, dtype="float16")


def test_tied_embeddings_that_are_stored_twice(goldens, tmp_path):
    folder = copy_golden(goldens, "llama_gqa", tmp_path / "tied")
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert_equal(vp.load(folder), vp.load(goldens / "ckpt/llama_gqa"))
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})
    refused("tie_word_embeddings.*lm_head.weight differs", vp.load, folder)
