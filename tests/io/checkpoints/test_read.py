"""Reading Hugging Face folders: spellings, dtypes, slices for a mesh, byte for byte there and back, what is wrong."""

import json
import shutil
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
    assert_same_tensors,
    copy_golden,
    edit_config,
    edit_weights,
    keep_layers,
    keep_width,
    make_folder,
    make_vlm_folder,
    random_ids,
    transformers_5,
)
from refusal import refused
from safetensors.numpy import load_file, save_file
from vlm_cases import TEXTS, internvl_chat_config, internvl_config, llava_config

import vlmprune_jax as vp
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.io.checkpoints import read
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.read import read_config


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
def test_dtypes(llama, stored):
    edit_weights(llama, lambda tensors: {key: value.astype(stored) for key, value in tensors.items()})
    tensors = load_file(llama / "model.safetensors")
    for asked in ("float32", "bfloat16", "float16"):
        layers = vp.load(llama, dtype=asked).params["text"]["layers"]["0"]
        expected = [tensors[f"model.layers.{i}.mlp.up_proj.weight"].astype(asked) for i in range(4)]
        np.testing.assert_array_equal(layers["mlp"]["up_proj"]["weight"], expected)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(layers)} == {asked}


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
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


# Vision-language folders of every decoder and tower, there and back ---------------------------------------------------

CONFIGS = {
    **{f"llava-clip-{text}": llava_config(text, "clip") for text in TEXTS},
    "llava-siglip-llama": llava_config("llama", "siglip"),
    "internvl-qwen3": internvl_config("qwen3"),
    "internvl-phi3": internvl_config("phi3"),
    **{f"internvl_chat-{text}": internvl_chat_config(text) for text in ("llama", "qwen2", "phi3")},
}


def survives(new, old):
    """Whether every field of a config is still there."""
    if isinstance(old, dict):
        return all(name in new and survives(new[name], value) for name, value in old.items())
    return new == old


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(tmp_path, name):
    folder = make_vlm_folder(tmp_path / "source", CONFIGS[name])
    model = vp.load(folder)
    vp.save(model, tmp_path / "out", source_dir=folder, dtype="source")
    assert_same_tensors(folder, tmp_path / "out")
    assert survives(json.loads((tmp_path / "out/config.json").read_text()), CONFIGS[name])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["bunny", "internvl"])
def test_golden_there_and_back(goldens, tmp_path, name, whole):
    """In the hub's layout: fused tensors of other widths, and a tower whose unused tensors come along."""
    source, tower = goldens / "ckpt" / name, goldens / "ckpt/siglip_tower" if name == "bunny" else None
    pruned = vp.load(source, vision_dir=tower)
    if not whole:
        pruned, _ = keep_layers(keep_width(pruned, [1, 6], range(0, 70, 2), only=[1, 3])[0], [0, 1, 3])
    vp.save(pruned, tmp_path / "out", source_dir=source, dtype="source")
    again = vp.load(tmp_path / "out", vision_dir=tower)
    assert again.cfg == pruned.cfg
    assert_equal(again, pruned)
    if whole:
        assert_same_tensors(source, tmp_path / "out")
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    unchanged = [key for key in before if "vision" in key]
    assert any(".encoder.layers.2." in key for key in unchanged)
    for key in unchanged:
        assert before.entries[key].raw().tobytes() == after.entries[key].raw().tobytes(), key
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert new["model_type"] == old["model_type"]
    assert not whole or survives(new, old)
    if name == "internvl":
        assert new["llm_config"]["rope_scaling"] == old["llm_config"]["rope_scaling"]
        assert new["llm_config"]["model_type"] == "phi3"


def test_another_spelling_of_the_keys(tmp_path):
    """As in the memory of transformers; LLaVA's and Gemma 3's are in tests/io/exports/test_write.py."""
    source = make_vlm_folder(tmp_path / "source", CONFIGS["internvl-phi3"])
    other = shutil.copytree(source, tmp_path / "other")
    edit_weights(other, lambda tensors: {transformers_5(key): value for key, value in tensors.items()})
    assert set(Checkpoint(other)).isdisjoint(key for key in Checkpoint(source) if "lm_head" not in key)
    model = vp.load(other)
    assert_equal(model, vp.load(source))
    vp.save(model, tmp_path / "out", source_dir=other, dtype="source")
    assert_same_tensors(other, tmp_path / "out")


def test_bunny_takes_the_tower_of_its_own_folder(goldens, tmp_path):
    """As the reference, which drops the tower in the checkpoint: what is in `vision_dir` counts, if it has weights."""
    bunny, tower = goldens / "ckpt/bunny", tmp_path / "tower"
    shutil.copytree(goldens / "ckpt/siglip_tower", tower)
    expected = vp.load(bunny, vision_dir=tower)
    key = "vision_model.embeddings.position_embedding.weight"
    edit_weights(tower, lambda tensors: {**tensors, key: tensors[key] + 1})
    moved = vp.load(bunny, vision_dir=tower)
    tables = [np.asarray(model.params["vision"]["position_embedding"]["weight"]) for model in (expected, moved)]
    np.testing.assert_allclose(tables[1], tables[0] + 1, rtol=1e-6)
    (tower / "model.safetensors").unlink()  # the config describes the tower that the checkpoint holds
    assert_equal(vp.load(bunny, vision_dir=tower), expected)
    fact = r"google/siglip-so400m-patch14-384.*set vision_dir .--config.model.vision_dir. to the tower's folder"
    refused(fact, vp.load, bunny)


def test_the_hubs_bunny_needs_no_vision_dir(goldens, tmp_path):
    config = json.loads((goldens / "ckpt/bunny/config.json").read_text())
    config |= {
        "mm_hidden_size": 1152, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 50295,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, cfg = read_config(tmp_path)
    assert (cfg.tokens_per_image, len(cfg.vision.layers), cfg.vision.n_layers_total) == (729, 26, 27)
    # docs of the reference: 3,182,254,624 with the post layer norm, which is not computed
    assert vp.count_params(cfg) == 3_182_254_624 - 2 * 1152
    assert vp.count_params(cfg, "text") == 2_774_999_040
    assert vp.count_params(cfg, "projector") == 9_507_840


def test_what_an_internvl_chat_config_leaves_out(goldens, tmp_path):
    """The defaults of the hub's InternVLChatConfig: the first pixel shuffle, all blocks, half the side."""
    config = json.loads((goldens / "ckpt/internvl/config.json").read_text())
    stated = ("ps_version", "select_layer", "downsample_ratio")
    assert all(name in config for name in stated)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in stated}))
    _, cfg = read_config(tmp_path)
    assert (cfg.projector.shuffle_version, cfg.projector.downsample) == ("v1", 2)
    assert len(cfg.vision.layers) == cfg.vision.n_layers_total


def test_parameters_of_mini_internvl(goldens, tmp_path):
    config = json.loads((goldens / "ckpt/internvl/config.json").read_text())
    config["force_image_size"] = config["vision_config"]["image_size"] = 448
    config["vision_config"] |= {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    }  # fmt: skip
    scaling = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config["llm_config"] |= {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32020, "rope_scaling": scaling,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, cfg = read_config(tmp_path)
    assert (cfg.tokens_per_image, cfg.image_token_id) == (256, 32013)
    assert vp.count_params(cfg) == 4_146_855_936
    assert (vp.count_params(cfg, "vision"), vp.count_params(cfg, "projector")) == (304_012_288, 22_034_432)


NO_TOKENS = "does not have the expected content"
REFUSED = [
    ("internvl", "config", "vision_config.qk_normalization", True, "qk_normalization"),
    ("internvl", "config", "vision_config.norm_type", "rms_norm", "norm_type"),
    ("internvl", "config", "downsample_ratio", 5e-324, "downsample_ratio.*expected a number above 0"),
    ("internvl", "config", "downsample_ratio", 0.3, "downsample_ratio.*1 divided by an integer"),
    ("internvl", "config", "downsample_ratio", 2.0, "downsample_ratio.*1 divided by an"),
    ("internvl", "config", "ps_version", "v3", "ps_version"),
    ("internvl", "config", "force_image_size", 70, "are not divisible by the downsampling factor"),
    ("internvl", "config", "llm_config.model_type", "internlm2", "internlm2"),
    ("internvl", "added_tokens", "<IMG_CONTEXT>", "x", NO_TOKENS),
    ("internvl", "tokenizer_config", "added_tokens_decoder", {"393": "<IMG_CONTEXT>"}, NO_TOKENS),
    ("internvl", "tokenizer_config", "added_tokens_decoder", 5, NO_TOKENS),
    ("internvl", "tokenizer", "added_tokens", [{"content": "<IMG_CONTEXT>"}], NO_TOKENS),
    ("bunny", "config", "mm_projector_type", "linear", "mm_projector_type"),
    ("bunny", "config", "use_s2", True, "use_s2"),
    ("bunny", "config", "mm_hidden_size", 32, "mm_hidden_size is 32"),
]


@pytest.mark.parametrize(("name", "file", "field", "value", "fact"), REFUSED)
def test_options_that_are_not_computed(goldens, tmp_path, name, file, field, value, fact):
    shutil.copy(goldens / "ckpt" / name / "config.json", tmp_path)
    path, (*section, field) = tmp_path / f"{file}.json", field.split(".")
    content = json.loads(path.read_text()) if path.exists() else {}
    (content[section[0]] if section else content)[field] = value
    path.write_text(json.dumps(content))
    tower = goldens / "ckpt/siglip_tower" if name == "bunny" else None
    refused(f"{path.name}: .*{fact}", read_config, tmp_path, tower)


def test_images_of_a_wrong_size_are_refused(goldens):
    model = vp.load(goldens / "ckpt/internvl")
    inputs = random_ids(model)
    inputs["pixel_values"] = inputs["pixel_values"][..., :42, :42]
    refused(r"\[2, 3, 42, 42\], expected \[images, 3, 56, 56\]", vp.forward, model, **inputs)


def test_native_internvl_ties_unless_told_otherwise(tmp_path):
    config = internvl_config("qwen2")
    del config["tie_word_embeddings"]
    folder = make_vlm_folder(tmp_path / "five", config)
    assert vp.load(folder).cfg.text.tie_embeddings
    assert "language_model.lm_head.weight" not in Checkpoint(folder)
    four = make_vlm_folder(tmp_path / "four", {**config, "transformers_version": "4.57.1"})
    assert not vp.load(four).cfg.text.tie_embeddings
