"""Reading Hugging Face folders: spellings, dtypes, slices for a mesh, and everything that can be wrong with one."""

import json
import struct
import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from hf_cases import (
    LLAMA,
    LLAVA,
    assert_equal,
    copy_golden,
    edit_config,
    edit_weights,
    make_folder,
    transformers_4_52,
    transformers_5,
)
from safetensors.numpy import load_file, save_file

import vlmprune_jax as vp
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.io.checkpoints import read


def refused(folder, *parts, **options):
    """The message of loading `folder`: one line that holds all `parts`."""
    with pytest.raises(vp.UserError) as error:
        vp.load(folder, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


@pytest.fixture
def llama(tmp_path):
    return make_folder(tmp_path / "llama", LLAMA)


# Spellings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rename", [transformers_5, transformers_4_52])
def test_llava_hf_spellings(goldens, tmp_path, rename):
    folder = copy_golden(goldens, "llava_hf", tmp_path / "renamed")
    for shard in sorted(folder.glob("*.safetensors")):
        edit_weights(folder, lambda tensors: {rename(key): value for key, value in tensors.items()}, shard.name)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {rename(key): shard for key, shard in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_equal(vp.load(folder), vp.load(goldens / "ckpt/llava_hf"))


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
    refused(folder, "vision_dir", "clip-vit-large-patch14-336")
    edit_config(folder, vision_config=json.loads((tower / "config.json").read_text())["vision_config"])
    assert_equal(vp.load(folder), expected)


def test_bin_and_index_and_single_file_are_one_model(goldens, tmp_path):
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


def test_bin_is_read_without_torch(goldens, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert vp.load(goldens / "ckpt/llava_orig_bin", vision_dir=goldens / "ckpt/clip_tower").params


def test_damaged_or_unsafe_bin(goldens, tmp_path):
    import torch

    folder = copy_golden(goldens, "llava_orig_bin", tmp_path / "bin")
    path, tower = folder / "pytorch_model.bin", goldens / "ckpt/clip_tower"
    path.write_bytes(path.read_bytes()[:5000])
    refused(folder, "pytorch_model.bin", "state dict", vision_dir=tower)
    torch.save({"model.norm.weight": pytest.approx(1)}, path)  # an object that must not be unpickled
    refused(folder, "pytorch_model.bin", "state dict", vision_dir=tower)
    torch.save({"step": 3}, path)
    refused(folder, "step is a int", "contains only plain tensors", vision_dir=tower)


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
    refused(llama, "does not divide", "vocab_size = 97", mesh=make_mesh(2, 1, 4))


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


def test_generation_config_supplies_missing_ids_only(llama):
    (llama / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 8], "pad_token_id": 9, "bos_token_id": 1})
    )
    assert vp.load(llama).cfg.eos_token_ids == (5,)
    edit_config(llama, eos_token_id=None, pad_token_id=None)
    cfg = vp.load(llama).cfg
    assert (cfg.eos_token_ids, cfg.pad_token_id, cfg.bos_token_id) == ((7, 8), 9, 3)


def test_generation_config_and_nested_ids(tmp_path):
    folder = make_folder(tmp_path / "llava", LLAVA)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert vp.load(folder).cfg.eos_token_ids == (5,)


@pytest.mark.parametrize("text", [None, "", "{", "[]"], ids=["missing", "empty", "cut", "list"])
def test_bad_config_json(llama, text):
    (llama / "config.json").unlink()
    if text is not None:
        (llama / "config.json").write_text(text)
    refused(llama, "config.json")


def test_unknown_family(llama):
    edit_config(llama, model_type="gpt2")
    refused(llama, "'gpt2'", "llama")


def test_folder_and_hub_names(tmp_path):
    refused(tmp_path / "nothing", "no such folder")
    refused("some-org/some-model", "some-org/some-model", "hub")  # the tests run offline
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "no such folder")
    refused(tmp_path, "config.json", "is missing")
    with pytest.raises(vp.UserError, match="float64"):
        vp.load(tmp_path, dtype="float64")


# Files ----------------------------------------------------------------------------------------------------------------


def test_no_weights(llama):
    (llama / "model.safetensors").unlink()
    refused(llama, "no weights", "model.safetensors.index.json")


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_truncated_file(llama, keep):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(llama, str(path), "truncated", "download it again")


def test_git_lfs_pointer(llama):
    (llama / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refused(llama, "Git LFS pointer")


def rewrite_header(path, edit):
    """Change the JSON header of a safetensors file, leaving the data as it is."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = edit(json.loads(raw[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


KEY = "model.layers.1.mlp.up_proj.weight"


def edited(field, value):
    def edit(header):
        header[KEY][field] = value(header[KEY][field])
        return header

    return edit


def swapped_with_the_next(header):
    other = next(key for key in header if key != KEY and header[key].get("shape") == header[KEY]["shape"])
    header[KEY]["data_offsets"] = header[other]["data_offsets"]
    return header


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (edited("shape", lambda shape: [shape[0] + 1, shape[1]]), "cannot take"),
        (edited("dtype", lambda _: "F16"), "cannot take"),
        (edited("data_offsets", lambda ends: [ends[1], ends[0]]), "damaged"),
        (edited("data_offsets", lambda ends: [10**12, 10**12 + ends[1] - ends[0]]), "truncated"),
        (edited("shape", lambda _: "wide"), "damaged"),
        (swapped_with_the_next, "overlaps"),
        (lambda header: b"{not json", "damaged"),
        (lambda header: [1, 2], "damaged"),
        (lambda header: {**header, KEY: None}, "damaged"),
    ],
    ids=["size", "dtype", "backwards", "out_of_range", "shape", "overlap", "no_json", "list", "null"],
)
def test_header_that_lies(llama, edit, part):
    rewrite_header(llama / "model.safetensors", edit)
    refused(llama, "model.safetensors", part)


def sharded(goldens, tmp_path, edit):
    folder = copy_golden(goldens, "llava_hf", tmp_path / "sharded")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(folder, index)
    path.write_text(json.dumps(index))
    return folder


def test_missing_shard(goldens, tmp_path):
    folder = sharded(goldens, tmp_path, lambda f, index: (f / "model-00002-of-00002.safetensors").unlink())
    refused(folder, "model-00002-of-00002.safetensors", "missing")


def test_same_key_in_two_shards(goldens, tmp_path):
    def edit(folder, index):
        key = "multi_modal_projector.linear_1.bias"
        first, second = sorted(folder.glob("*.safetensors"))
        value = {**load_file(first), **load_file(second)}[key]
        for shard in (first, second):
            edit_weights(folder, lambda tensors: tensors | {key: value}, shard.name)

    refused(sharded(goldens, tmp_path, edit), "multi_modal_projector.linear_1.bias", "is also in")


def test_index_naming_a_key_that_its_shard_does_not_hold(goldens, tmp_path):
    def edit(folder, index):
        index["weight_map"]["language_model.model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"

    refused(sharded(goldens, tmp_path, edit), "layers.9.mlp.up_proj", "does not contain it")


@pytest.mark.parametrize("weight_map", [None, {}, {"a": "../other/model.safetensors"}])
def test_bad_index(goldens, tmp_path, weight_map):
    def edit(folder, index):
        index["weight_map"] = weight_map

    refused(sharded(goldens, tmp_path, edit), "index.json", "is outside the folder" if weight_map else "weight_map")


# Weights --------------------------------------------------------------------------------------------------------------


def test_every_problem_is_named_in_one_line(llama):
    def edit(tensors):
        tensors["model.layers.0.mlp.extra.weight"] = np.zeros(3, np.float32)
        del tensors["model.layers.1.self_attn.o_proj.weight"]
        tensors["model.norm.weight"] = np.zeros(49, np.float32)
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((56, 48), np.int8)

    edit_weights(llama, edit)
    refused(
        llama,
        "unknown key model.layers.0.mlp.extra.weight",
        "missing key model.layers.1.self_attn.o_proj.weight",
        "model.norm.weight has shape [49], config.json says [48]",
        "model.layers.2.mlp.up_proj.weight has dtype I8",
    )


def test_fp8_is_named(llama):
    edit_weights(llama, lambda tensors: tensors | {KEY: tensors[KEY].astype(ml_dtypes.float8_e4m3fn).view(np.int8)})
    rewrite_header(llama / "model.safetensors", edited("dtype", lambda _: "F8_E4M3"))
    refused(llama, f"{KEY} has dtype F8_E4M3", "unquantised")


def test_more_layers_in_the_file_than_in_the_config(llama):
    edit_config(llama, num_hidden_layers=3)
    refused(llama, "unknown key model.layers.3.", "; and 1 more")


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.vision_model.encoder.layers.0.mlp.fc3.weight",
        "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
    ],
)
def test_unknown_key_in_the_tower(tmp_path, name):
    """Blocks above the feature layer are known; a stray tensor in a computed block, or a block too many, is not."""
    folder = make_folder(tmp_path / "llava", LLAVA)
    vp.load(folder)
    edit_weights(folder, lambda tensors: tensors | {name: np.zeros((40, 24), np.float32)})
    refused(folder, f"unknown key {name}")


def test_one_weight_under_two_names(tmp_path):
    folder = make_folder(tmp_path / "llava", LLAVA)
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors["language_model.lm_head.weight"]})
    refused(folder, "lm_head.weight", "are the same weight")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite(llama, stored, value):
    def edit(tensors):
        tensors = {key: array.astype(stored) for key, array in tensors.items()}
        tensors[KEY][3, 5] = value
        return tensors

    edit_weights(llama, edit)
    refused(llama, KEY, "has 1 NaN or infinite")


def test_weights_too_large_for_the_dtype(llama):
    edit_weights(llama, lambda tensors: tensors[KEY].__setitem__((0, 0), -7e4))
    vp.load(llama, dtype="bfloat16")
    refused(llama, KEY, "float16", dtype="float16")


def test_tied_embeddings_that_are_stored_twice(goldens, tmp_path):
    folder = copy_golden(goldens, "llama_gqa", tmp_path / "tied")
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert_equal(vp.load(folder), vp.load(goldens / "ckpt/llama_gqa"))
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})
    refused(folder, "tie_word_embeddings", "lm_head.weight differs")
