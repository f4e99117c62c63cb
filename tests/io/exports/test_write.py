"""Writing Hugging Face folders: byte for byte, atomically, with everything that belongs into one."""

import itertools
import json
import os
import shutil

import hf_cases
import jax
import ml_dtypes
import numpy as np
import pytest
from hf_cases import (
    LLAMA,
    LLAVA,
    assert_same_tensors,
    copy_golden,
    edit_weights,
    keep_layers,
    keep_width,
    make_folder,
    make_vlm_folder,
    random_ids,
)
from refusal import refused
from rounding import assert_same_function, double_logits
from safetensors.numpy import load_file
from vlm_cases import gemma3_config

import vlmprune_jax as vp
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.params import init_params
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint


@pytest.fixture
def llama(tmp_path):
    return make_folder(tmp_path / "llama", LLAMA)


# The same bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava_hf", "llava_orig", "llava_orig_bin", "llama_gqa"])
def test_round_trip_is_bitwise(goldens, tmp_path, name):
    source = goldens / "ckpt" / name
    tower = goldens / "ckpt/clip_tower" if "orig" in name else None
    model = vp.load(source, vision_dir=tower, mesh=make_mesh(2, 2, 2) if name == "llava_hf" else None)
    vp.save(model, tmp_path / "out", source_dir=source, dtype="source")
    assert_same_tensors(source, tmp_path / "out")


def test_narrow_dtypes_and_shards_are_bitwise(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmprune_jax.io.exports.folder.MAX_SHARD_BYTES", 20_000)
    stored = itertools.cycle([np.float16, ml_dtypes.bfloat16, np.float32])
    edit_weights(llama, lambda held: {key: value.astype(next(stored)) for key, value in held.items()})
    vp.save(vp.load(llama), tmp_path / "out", source_dir=llama, dtype="source")
    assert_same_tensors(llama, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert [shard.name for shard in shards] == names
    assert len(shards) > 2
    assert max(sum(value.nbytes for value in load_file(shard).values()) for shard in shards) <= 20_000


def test_every_tensor_is_aligned_to_its_dtype(tmp_path):
    """Torch maps a tensor in place only at a multiple of its element size."""
    source, buffer = make_folder(tmp_path / "llava", LLAVA), "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(source, lambda tensors: tensors | {buffer: np.ones(3, np.float32)})
    vp.save(vp.load(source), tmp_path / "out", source_dir=source, dtype="bfloat16")
    entries = Checkpoint(tmp_path / "out").entries
    unused = [key for key in entries if "vision_tower" in key and ".layers.2." in key]
    assert unused  # weights of a tower layer that is not computed with follow the dtype, rotary tables keep theirs
    assert {key for key, entry in entries.items() if entry.dtype != "BF16"} == {buffer}
    after = load_file(tmp_path / "out/model.safetensors")
    for key, value in load_file(source / "model.safetensors").items():
        np.testing.assert_array_equal(after[key], value.astype(after[key].dtype))
    assert all(entry.begin % {"BF16": 2, "F32": 4}[entry.dtype] == 0 for entry in entries.values())


# What a folder holds --------------------------------------------------------------------------------------------------


def test_depth_pruned_layers_are_renumbered(goldens, tmp_path):
    source = goldens / "ckpt/llava_orig"
    model, plan = keep_layers(vp.load(source, vision_dir=goldens / "ckpt/clip_tower"), [0, 2, 3, 5])
    vp.save(model, tmp_path / "out", source_dir=source, dtype="source", plan=plan)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for new, old in enumerate([0, 2, 3, 5]):
        names = {key.split(".", 3)[3] for key in before if key.startswith("model.layers.0.")}
        assert "self_attn.rotary_emb.inv_freq" in names
        for name in names:
            np.testing.assert_array_equal(after[f"model.layers.{new}.{name}"], before[f"model.layers.{old}.{name}"])
    assert len(after) == len(before) - 2 * len(names)
    config = json.loads((tmp_path / "out/config.json").read_text())
    expected = json.loads((source / "config.json").read_text())
    assert config == {**expected, "num_hidden_layers": 4, "head_dim": 6}
    assert vp.PrunePlan.from_json(tmp_path / "out/plan.json") == plan


@pytest.mark.parametrize(
    ("name", "rename"), [("gemma3", "transformers_5"), ("llava", "transformers_4_52"), ("llava", "saved_by_5")]
)
def test_exports_are_spelled_as_on_the_hub(tmp_path, name, rename):
    """Whatever the source's spelling: transformers 4.57, vLLM and mlx-vlm know no other, of unused tensors as well."""
    hub = make_vlm_folder(tmp_path / "hub", gemma3_config() if name == "gemma3" else LLAVA)
    source = shutil.copytree(hub, tmp_path / "source")
    spell = getattr(hf_cases, rename)
    edit_weights(source, lambda tensors: {spell(key): value for key, value in tensors.items()})
    assert set(load_file(source / "model.safetensors")) != set(load_file(hub / "model.safetensors"))
    for folder, out in ((hub, "expected"), (source, "out")):
        model, _ = keep_layers(vp.load(folder), [1, 3])
        vp.save(model, tmp_path / out, source_dir=folder, dtype="source")
    assert_same_tensors(tmp_path / "expected", tmp_path / "out")
    assert set(load_file(tmp_path / "out/model.safetensors")) < set(load_file(hub / "model.safetensors"))


@pytest.mark.parametrize("dtype", ["float16", "source"])
def test_dtype_of_weights_and_config(tmp_path, dtype):
    source = make_folder(tmp_path / "llava", {**LLAVA, "text_config": {**LLAVA["text_config"], "dtype": "float32"}})
    vp.save(vp.load(source), tmp_path / "out", source_dir=source, dtype=dtype)
    written = "float32" if dtype == "source" else dtype
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["torch_dtype"], config["text_config"]["dtype"]) == (written, written)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for key in ("language_model.lm_head.weight", "multi_modal_projector.linear_1.bias"):
        np.testing.assert_array_equal(after[key], before[key].astype(written))


def test_files_beside_the_weights(llama, tmp_path):
    passthrough = {
        "tokenizer.json": "{}", "tokenizer_config.json": "{}", "tokenizer.model": "a", "special_tokens_map.json": "{}",
        "added_tokens.json": "{}", "vocab.json": "{}", "merges.txt": "b", "chat_template.jinja": "c",
        "chat_template.json": "{}", "preprocessor_config.json": "{}", "processor_config.json": "{}",
        "generation_config.json": "{}", "LICENSE.txt": "d",
    }  # fmt: skip
    not_passed = dict.fromkeys(("optimizer.pt", "model.safetensors.index.json.bak", "train.py"), "no")
    for name, text in (passthrough | not_passed).items():
        (llama / name).write_text(text)
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates/tools.jinja").write_text("e")
    vp.save(vp.load(llama), tmp_path / "out", source_dir=llama)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {*passthrough, "config.json", "model.safetensors", "README.md", "additional_chat_templates"}
    assert all((tmp_path / "out" / name).read_text() == text for name, text in passthrough.items())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["a_field_of_the_future"] == {"kept": True}


def test_a_model_remembers_its_folder_and_its_plans(llama, tmp_path, monkeypatch):
    """Two plans compose, a changed working directory does not matter, and explicit arguments take precedence."""
    monkeypatch.chdir(tmp_path)
    model = vp.load("llama")
    (middle, first), other = keep_layers(model, [0, 1, 3]), make_folder(tmp_path / "other", LLAMA)
    pruned, second = keep_layers(middle, [0, 2])
    monkeypatch.chdir("/")
    assert (model.plan, middle.plan, pruned.plan) == (None, first, vp.compose(first, second))
    pruned.save(tmp_path / "out")
    vp.save(pruned, tmp_path / "explicit", source_dir=llama, plan=vp.compose(first, second))
    for file in (tmp_path / "explicit").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    vp.save(pruned, tmp_path / "chosen", source_dir=other, plan=first)
    assert vp.PrunePlan.from_json(tmp_path / "chosen/plan.json") == first
    assert "Made from `other`" in (tmp_path / "chosen/README.md").read_text()
    pruned = pruned.replace(source=None)
    refused("source_dir is not set, and the model was not loaded from a", vp.save, pruned, tmp_path / "x")


@pytest.mark.parametrize("text", ['{"layers_before": 5}', "[]", "no"])
def test_a_plan_that_is_none(llama, tmp_path, text):
    """Whatever else a source calls plan.json."""
    (llama / "plan.json").write_text(text)
    refused(r"plan\.json", vp.save, vp.load(llama), tmp_path / "out", source_dir=llama)
    assert sorted(path.name for path in tmp_path.iterdir()) == [llama.name]


def test_embedding_stored_twice_is_written_twice(goldens, tmp_path):
    source = copy_golden(goldens, "llama_gqa", tmp_path / "tied")
    edit_weights(source, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    model = vp.load(source)
    text = model.params["text"]
    trained = {**text, "embed_tokens": {"weight": text["embed_tokens"]["weight"] + 1}}
    vp.save(vp.Model({**model.params, "text": trained}, model.cfg), tmp_path / "out", source_dir=source, dtype="source")
    after = load_file(tmp_path / "out/model.safetensors")
    np.testing.assert_array_equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    vp.load(tmp_path / "out")


# Unequal layers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def uneven(tmp_path):
    """A model of which two layers lost a group of heads and some neurons, biases included."""
    source = make_folder(tmp_path / "uneven", {**LLAMA, "attention_bias": True, "mlp_bias": True})
    return source, *keep_width(vp.load(source), [0, 2], range(3, 43), only=[1, 2])


def test_per_layer_keeps_true_sizes(uneven, tmp_path):
    source, model, plan = uneven
    vp.save(model, tmp_path / "out", source_dir=source, uneven="per_layer", dtype="source", plan=plan)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["per_layer_shapes"] == [[6, 3, 56], [4, 2, 40], [4, 2, 40], [6, 3, 56]]
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_per_layer.PerLayerLlamaForCausalLM"}
    again = vp.load(tmp_path / "out")
    assert again.cfg == model.cfg
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert "trust_remote_code=True" in (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/modeling_per_layer.py").is_file()


def test_pad_is_the_same_function(uneven, tmp_path):
    """Layers with other group sizes: one query head for each of 4 groups, 3 for one group, 1 for each of 2."""
    source, first = uneven[0], uneven[1].cfg.text.layers[0]
    sizes = [(4, 4, 20), (3, 1, 8), (2, 2, 20), (2, 2, 9)]
    shapes = [first.resized(dict(zip(("q_heads", "kv_heads", "mlp"), numbers, strict=True))) for numbers in sizes]
    cfg = uneven[1].cfg.with_layers(shapes)
    model = vp.Model(init_params(cfg, jax.random.key(0), np.float32), cfg)
    vp.save(model, tmp_path / "out", source_dir=source, uneven="pad", dtype="float32")
    assert "per_layer_shapes" not in json.loads((tmp_path / "out/config.json").read_text())
    padded = vp.load(tmp_path / "out")
    assert all(layer.sizes == {"kv_heads": 4, "q_heads": 12, "mlp": 20} for layer in padded.cfg.text.layers)
    inputs = random_ids(model)
    assert_same_function(double_logits(padded, **inputs), double_logits(model, **inputs))
    card = (tmp_path / "out/README.md").read_text()
    assert "padded with zeros: each with 4 key/value heads, 12 query heads, 20 neurons, heads of 12 channels" in card
    after, before = vp.count_params(padded.cfg), vp.count_params(model.cfg)
    assert f"{after:,} parameters in files, memory and computation instead of {before:,}" in card
    fact = 'one width for all layers: .*uneven="pad"'
    refused(fact, vp.save, model, tmp_path / "no", source_dir=source, uneven="refuse")
    assert not (tmp_path / "no").exists()


def test_fields_of_qwen2_5_vl_lie_where_the_hub_has_them_too(goldens, tmp_path):
    """mlx-vlm reads the decoder's fields in config.json itself, transformers those in text_config."""
    source = goldens / "families/qwen2_5_vl/ckpt"
    model, _ = keep_layers(vp.load(source), [0, 2])
    vp.save(model, tmp_path / "out", source_dir=source)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == config["text_config"]["num_hidden_layers"] == 2
    assert config["model_type"] == "qwen2_5_vl"
    assert vp.load(tmp_path / "out").cfg == model.cfg


# What is copied from the source: its files, and nothing that a link leads to elsewhere -------------------------------

TEMPLATES = "additional_chat_templates"


def link(target):
    return lambda path: path.symlink_to(target)


def huge(path):
    with path.open("wb") as file:
        file.truncate(2**40)


def folder_with(name, target):
    def make(path):
        (path / name).parent.mkdir(parents=True)
        (path / name).symlink_to(target)

    return make


NOT_COPIED = {
    "absolute": ("LICENSE", lambda path: path.symlink_to(path.parents[1] / "secret"), "", "outside the folder"),
    "relative": ("tokenizer.model", link("../secret"), "", "outside the folder"),
    "in a folder": (TEMPLATES, folder_with("deep/a.jinja", "../../../secret"), "/deep/a.jinja", "outside the folder"),
    "linked folder": (TEMPLATES, link("../private"), "", "outside the folder"),
    "inner folder": (TEMPLATES, folder_with("more", "../../private"), "/more", "is a folder, expected a file"),
    "gone": ("merges.txt", link("gone"), "", "is a link to gone, which does not exist"),
    "gone folder": (TEMPLATES, link("gone"), "", "is a link to gone, which does not exist"),
    "gone inside": (TEMPLATES, folder_with("a.jinja", "../gone"), "/a.jinja", "is a link to ../gone, which does not"),
    "itself": ("vocab.json", link("vocab.json"), "", "is a link to itself"),
    "file for a folder": (TEMPLATES, lambda path: path.write_text("a"), "", "is a file, expected a folder"),
    "fifo": ("LICENSE", os.mkfifo, "", "is a FIFO, expected a file"),
    "huge": ("LICENSE", huge, "", "has 1,099,511,627,776 bytes, more than the maximum"),
}


@pytest.mark.parametrize("case", NOT_COPIED)
def test_what_is_not_copied(llama, tmp_path, case):
    name, make, inner, fact = NOT_COPIED[case]
    (tmp_path / "secret").write_text("private")
    (tmp_path / "private").mkdir()
    (tmp_path / "private/a.jinja").write_text("private")
    make(llama / name)
    refused(f"^{llama / name}{inner}: .*{fact}", vp.save, vp.load(llama), tmp_path / "out", source_dir=llama)
    assert not (tmp_path / "out").exists()


def test_what_is_copied(llama, tmp_path):
    """Links within the folder, whatever their names; folders that happen to fit a pattern are not."""
    (llama / "files").mkdir()
    (llama / "files/mit").write_text("terms")
    (llama / "LICENSE").symlink_to("files/mit")
    (llama / os.fsdecode(b"LICENSE-\xff")).write_text("more")
    (llama / "LICENSES").mkdir()
    (llama / TEMPLATES / "deep").mkdir(parents=True)
    (llama / TEMPLATES / "deep/a.jinja").write_text("a")
    out = tmp_path / "out"
    vp.save(vp.load(llama), out, source_dir=llama)
    assert not (out / "LICENSE").is_symlink()
    assert (out / "LICENSE").read_text() == "terms"
    assert (out / os.fsdecode(b"LICENSE-\xff")).read_text() == "more"
    assert (out / TEMPLATES / "deep/a.jinja").read_text() == "a"
    assert not (out / "LICENSES").exists()
    # a snapshot of the hub, in which every file is a link to ../../blobs
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in out.rglob("*") if path.is_file())):
        path.rename(cache / f"blobs/{number}")
        snapshot = cache / "snapshots/1" / path.relative_to(out)
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        snapshot.symlink_to(os.path.relpath(cache / f"blobs/{number}", snapshot.parent))
    vp.save(vp.load(cache / "snapshots/1"), tmp_path / "again", source_dir=cache / "snapshots/1")
    assert (tmp_path / "again/LICENSE").read_text() == "terms"
    assert (tmp_path / "again" / TEMPLATES / "deep/a.jinja").read_text() == "a"
    assert not any(path.is_symlink() for path in (tmp_path / "again").rglob("*"))
