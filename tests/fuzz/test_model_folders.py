"""Damaged model folders: whatever their files hold, reading them returns or raises one line."""

import copy
import dataclasses
import functools
import json
import math
import operator
import shutil
import struct
import zipfile

import numpy as np
import pytest
from fuzz_cases import damaged, damaged_archives, edited, fuzz, fuzz_file, json_files, reads
from gguf import GGMLQuantizationType, GGUFWriter
from hf_cases import LFM2_VL, LLAMA, copy_golden, copy_llava, make_folder
from hypothesis import strategies as st
from safetensors.numpy import save

from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.disk.gguf import read_gguf_header
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.exports.describe import describe
from vlmprune_jax.io.exports.folder import mtp_tensors
from vlmprune_jax.io.exports.token_sources import Source
from vlmprune_jax.io.exports.vocabulary import trim_files

TOWERS = {"bunny": "siglip_tower", "llava_orig": "clip_tower", "llava_orig_bin": "clip_tower"}
FOLDERS = ("llava_hf", "llava_orig", "llava_orig_bin", "bunny", "internvl", "llama_gqa")
TEXT = "Is the river small or large? <image> Small."


def every_array(folder):
    """Read all weights of a folder, as pruning does."""
    checkpoint = Checkpoint(folder)
    return {key: checkpoint[key].shape for key in checkpoint}


# --- weights ---------------------------------------------------------------------------------------------------------


def safetensors_files(content):
    """Files whose header was edited, with a length that fits; or damaged as bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def written(changed):
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + data

    return edited(header).map(written) | damaged(content)


def test_safetensors(tmp_path):
    folder = make_folder(tmp_path, {**LLAMA, "num_hidden_layers": 1})
    path = folder / "model.safetensors"
    fuzz_file(150, path, lambda: every_array(folder), files=safetensors_files(path.read_bytes()))


def torch_files(path):
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
    return damaged_archives(path.read_bytes(), pickled, pickled)


@pytest.mark.parametrize(
    ("name", "file", "files"),
    [("llava_hf", "model.safetensors.index.json", None), ("llava_orig_bin", "pytorch_model.bin", torch_files)],
)
def test_weights_of_folders(goldens, tmp_path, name, file, files):
    folder = copy_golden(goldens, name, tmp_path / "model")
    path, names = folder / file, (file,) if files else (file, "model")
    fuzz_file(100, path, lambda: every_array(folder), *names, files=files and files(path))


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FOLDERS, "clip_tower"])
def test_config(goldens, tmp_path, name):
    folder, tower = copy_golden(goldens, name, tmp_path / "model"), TOWERS.get(name)
    model = (
        (goldens / "ckpt/llava_orig", folder) if name == "clip_tower" else (folder, tower and goldens / "ckpt" / tower)
    )
    examples = {"clip_tower": 20, "llava_orig_bin": 5}.get(name, 60)
    fuzz_file(examples, folder / "config.json", lambda: describe(*model), "config.json", str(folder))


NUMBERS = [-(2**31), -1, 0, 1, 3, 300, 5000, 10**9, 2**31 - 1, 10**400, -0.5, 1e-300, 1e308, float("nan"), float("inf")]


def numbers_within(value, at=()):
    """Paths to the numbers of a JSON value, outside lists."""
    if isinstance(value, dict):
        return [path for key, inner in value.items() for path in numbers_within(inner, (*at, key))]
    return [at] * (type(value) in (int, float))


def has_no_odd_number(value):
    if dataclasses.is_dataclass(value) or isinstance(value, tuple):
        return all(map(has_no_odd_number, value if isinstance(value, tuple) else vars(value).values()))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "internvl_moe", "lfm2_vl"])
def test_numbers_of_experts_and_hybrids(goldens, tmp_path, name):
    """Counts that no file of this size can hold, and numbers that no layer can compute with."""
    folder = tmp_path / "model"
    if name == "lfm2_vl":
        make_folder(folder, {**LFM2_VL, "projector_hidden_size": 20})
    else:
        shutil.copytree(goldens / "families" / name / "ckpt", folder)
    path = folder / "config.json"
    whole = json.loads(path.read_text())

    @fuzz(40, places=st.lists(st.sampled_from(numbers_within(whole)), min_size=1, max_size=3), values=st.data())
    def check(places, values):
        changed = copy.deepcopy(whole)
        for *outer, key in places:
            functools.reduce(operator.getitem, outer, changed)[key] = values.draw(st.sampled_from(NUMBERS))
        path.write_text(json.dumps(changed))
        found = reads(lambda: (describe(folder), read_config(folder)[1]), path.name, str(folder))
        assert found is None or has_no_odd_number(found[1])

    check()


@st.composite
def damaged_heads(draw, tensors):
    """The file of an MTP module's tensors: missing, renamed, repeated, of other shapes or dtypes, or not finite."""
    changed = dict(tensors)
    for key in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3)):
        kind, array = draw(st.sampled_from(["missing", "name", "again", "shape", "dtype", "value"])), tensors[key]
        name = key.replace("layers.0", draw(st.sampled_from(["layers.1", "layers.x", "layers", "layers.99", "0"])))
        if kind in ("missing", "name"):
            changed.pop(key, None)
        if kind in ("name", "again"):
            changed[name] = array
        elif kind == "shape":
            sizes = st.sampled_from([*array.shape, 0, 1, 8, 16, 48, 2 * array.shape[0]])
            changed[key] = np.ones(draw(st.lists(sizes, max_size=3)), np.float32)
        elif kind == "dtype":
            changed[key] = array.astype(draw(st.sampled_from(["int8", "float16", "float64", "bool"])))
        elif kind == "value":
            changed[key] = np.where(draw(st.booleans()), np.roll(array, 1), np.float32(draw(st.floats(width=32))))
    return save({key: np.ascontiguousarray(array) for key, array in changed.items()})


def test_heads_for_several_tokens(goldens, tmp_path):
    """A head that is cut has finite tensors of the decoder's widths, whatever the file holds."""
    source = goldens / "families/qwen3_5/ckpt"
    cfg = read_config(source)[1]
    whole, config = Checkpoint(source), json.loads((source / "config.json").read_text())
    heads = {key: whole[key] for key in whole if key.startswith("mtp.")}
    sizes = {"kv_heads": 1, "q_heads": 2, "delta_groups": 1, "delta_heads": 2, "mlp": 7}
    cfg = cfg.with_layers([layer.resized(sizes) for layer in cfg.text.layers])

    def cut():
        tensors = mtp_tensors(Checkpoint(tmp_path), cfg, "float32")
        return {tensor.key: tensor.fetch().view(np.float32).reshape(tensor.shape) for tensor in tensors}

    @fuzz(80, content=damaged_heads(heads), count=st.sampled_from([1, 1, 1, 0, 2, None, 10**9, -1, "1"]))
    def check(content, count):
        (tmp_path / "model.safetensors").write_bytes(content)
        text = {**config["text_config"], "mtp_num_hidden_layers": count}
        (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": text}))
        found = reads(cut, tmp_path.name)
        if found is not None:
            assert found["mtp.layers.0.mlp.up_proj.weight"].shape == (7, 28)
            assert found["mtp.layers.0.self_attn.o_proj.weight"].shape == (28, 32)
            assert all(np.isfinite(array).all() for array in found.values())

    check()


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


def files_of(path):
    return damaged(path.read_bytes()) if path.suffix == ".model" else json_files(json.loads(path.read_text()))


@pytest.mark.parametrize("name", TOKENIZER)
def test_tokenizer(goldens, tmp_path, name):
    folder = tmp_path / "tokenizer"
    shutil.copytree(goldens / "tokenizers/llava", folder)
    if name == "tokenizer.model":  # what is read where there is no other
        (folder / "tokenizer.json").unlink()

    def read():
        tokenizer = load_tokenizer(folder)
        return tokenizer.decode(tokenizer(TEXT, return_offsets_mapping=True)["input_ids"])

    fuzz_file(60 if name == "tokenizer.json" else 30, folder / name, read, "tokenizer", files=files_of(folder / name))


@pytest.mark.parametrize("name", [*TOKENIZER, "generation_config.json"])
def test_trimmed_vocabularies(goldens, tmp_path, name):
    """Files that a smaller vocabulary rewrites, and the tokenizer that it is chosen from."""
    folder = copy_llava(goldens, tmp_path / "model")
    generation = {"eos_token_id": [2], "bad_words_ids": [[5, 6]], "suppress_tokens": [7]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    cfg = read_config(folder)[1]
    vocabulary = Source.of(folder, cfg).keep({}, (), 380, 4)

    def trim():
        Source.of(folder, cfg).check(vocabulary)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").mkdir()
        trim_files(folder, tmp_path / "out", vocabulary, vocabulary.apply_to(cfg))

    trim()
    fuzz_file(25, folder / name, trim, "model", "prune plan", "template", files=files_of(folder / name))


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json", "config.json", "patches"])
def test_image_processor(goldens, tmp_path, name):
    sizes = {"image_size": 28}
    if name == "patches":  # of images of any size
        shutil.copytree(goldens / "families/qwen3_vl/ckpt", folder := tmp_path / "model")
        (folder / "processor_config.json").unlink()
        value = json.loads((goldens / "families/qwen3_vl/preprocessor_config_hub_style.json").read_text())
        name, sizes = "preprocessor_config.json", {"patches": (144, 2)}
    elif name == "config.json":  # which says how images are cut
        folder = copy_golden(goldens, "internvl", tmp_path / "model")
        value = json.loads((folder / name).read_text()) | {"min_dynamic_patch": 1, "max_dynamic_patch": 4}
    else:
        folder = copy_llava(goldens, tmp_path / "model")
        value = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").unlink()
        value = {"image_processor": value, "processor_class": "x"} if name == "processor_config.json" else value
    path, data = folder / name, DataSpec(aspect_ratio="pad", max_image_pixels=10**6, cache_megabytes=0)

    def read():
        loader = load_image_processor(folder, data, **sizes)
        return loader.load(goldens / "data/images/img1.png", "r1").shape

    fuzz_file(80, path, read, name, folder.name, files=json_files(value))


# --- GGUF ------------------------------------------------------------------------------------------------------------


def test_gguf_headers(tmp_path):
    """Whatever comes back has the types and sizes that `vlmprune bench` relies on."""
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "ccc"] * 20)
    writer.add_array("tokenizer.ggml.scores", [0.5] * 60)
    writer.add_string("tokenizer.chat_template", "t" * 2000)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.add_tensor("output.weight", np.zeros((2, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()

    def read():
        found = read_gguf_header(path)
        assert sum(found.types.values()) <= path.stat().st_size
        assert all(isinstance(value, int | float | str | tuple) for value in found.fields.values())

    fuzz_file(200, path, read, files=damaged(path.read_bytes()))
