"""Damaged model folders, and settings of any value: what is read, or one line that names the file or the setting."""

import dataclasses
import json
import math
import shutil
import struct
import zipfile

import numpy as np
import pytest
from fuzz_cases import ESCAPES, damaged, damaged_archives, edited, fuzz, fuzz_file, json_files, reads
from gguf import GGMLQuantizationType, GGUFWriter
from hf_cases import LFM2_VL, LLAMA, copy_golden, copy_llava, make_folder
from hypothesis import strategies as st
from repository import ROOT

from vlmprune_jax.base.settings import override
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.disk.gguf import read_gguf_header
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.exports.describe import describe
from vlmprune_jax.io.exports.token_sources import Source
from vlmprune_jax.io.exports.vocabulary import trim_files
from vlmprune_jax.run.cli.config_files import read_experiment
from vlmprune_jax.run.cli.flags import parse
from vlmprune_jax.run.cli.stages import stage_command
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.experiment.variants import check_experiment

TOWERS = {"bunny": "siglip_tower", "llava_orig": "clip_tower", "llava_orig_bin": "clip_tower"}
FOLDERS = ("llava_hf", "llava_orig", "llava_orig_bin", "bunny", "internvl", "llama_gqa", "clip_tower")
MIXTURES = ("qwen3_vl_moe", "internvl_moe")
TEXT = "Is the river small or large? <image> Small."


# --- weights ---------------------------------------------------------------------------------------------------------


def safetensors_files(path):
    """Files whose header was edited, with a length that fits; or damaged as bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def written(changed):
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + data

    return edited(header).map(written) | damaged(content)


def torch_files(path):
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
    return damaged_archives(path.read_bytes(), pickled, pickled)


@pytest.mark.parametrize(
    ("name", "file", "files"),
    [
        ("llava_hf", "model.safetensors.index.json", None),
        ("llava_orig_bin", "pytorch_model.bin", torch_files),
        ("llama", "model.safetensors", safetensors_files),
    ],
)
def test_weights(goldens, tmp_path, name, file, files):
    """All weights of a folder, as pruning reads them."""
    folder = tmp_path / "model"
    if name == "llama":
        make_folder(folder, {**LLAMA, "num_hidden_layers": 1})
    else:
        copy_golden(goldens, name, folder)
    path, names = folder / file, (file,) if files else (file, "model")

    def read():
        checkpoint = Checkpoint(folder)
        return {key: checkpoint[key].shape for key in checkpoint}

    fuzz_file(100, path, read, *names, files=files and files(path))


# --- JSON ------------------------------------------------------------------------------------------------------------


def has_no_odd_number(value):
    if dataclasses.is_dataclass(value) or isinstance(value, tuple):
        return all(map(has_no_odd_number, value if isinstance(value, tuple) else vars(value).values()))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("name", [*FOLDERS, *MIXTURES, "lfm2_vl"])
def test_config(goldens, tmp_path, name):
    """Any values: counts that no file of this size can hold, and numbers that no layer can compute with."""
    folder, tower = tmp_path / "model", TOWERS.get(name)
    if name == "lfm2_vl":
        make_folder(folder, {**LFM2_VL, "projector_hidden_size": 20})
    elif name in MIXTURES:
        shutil.copytree(goldens / "families" / name / "ckpt", folder)
    else:
        copy_golden(goldens, name, folder)
    model = (folder, tower and goldens / "ckpt" / tower)
    if name == "clip_tower":
        model = (goldens / "ckpt/llava_orig", folder)

    def read():
        describe(*model)
        assert has_no_odd_number(read_config(*model)[1])

    examples = {"clip_tower": 20, "llava_orig_bin": 5}.get(name, 60)
    fuzz_file(examples, folder / "config.json", read, "config.json", str(folder))


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


def files_of(path):
    return damaged(path.read_bytes()) if path.suffix == ".model" else json_files(json.loads(path.read_text()))


@pytest.mark.parametrize("name", TOKENIZER)
def test_tokenizer(goldens, tmp_path, name):
    folder = shutil.copytree(goldens / "tokenizers/llava", tmp_path / "tokenizer")
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
    folder, sizes, file = tmp_path / "model", {"image_size": 28}, name
    if name == "patches":  # of images of any size
        shutil.copytree(goldens / "families/qwen3_vl/ckpt", folder)
        (folder / "processor_config.json").unlink()
        value = json.loads((goldens / "families/qwen3_vl/preprocessor_config_hub_style.json").read_text())
        file, sizes = "preprocessor_config.json", {"patches": (144, 2)}
    elif name == "config.json":  # which says how images are cut
        copy_golden(goldens, "internvl", folder)
        value = json.loads((folder / name).read_text()) | {"min_dynamic_patch": 1, "max_dynamic_patch": 4}
    else:
        copy_llava(goldens, folder)
        value = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").unlink()
        value = {"image_processor": value, "processor_class": "x"} if name == "processor_config.json" else value
    data = DataSpec(aspect_ratio="pad", max_image_pixels=10**6, cache_megabytes=0)

    def read():
        return load_image_processor(folder, data, **sizes).load(goldens / "data/images/img1.png", "r1").shape

    fuzz_file(80, folder / file, read, file, folder.name, files=json_files(value))


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
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()

    def read():
        found = read_gguf_header(path)
        assert sum(found.types.values()) <= path.stat().st_size
        assert all(isinstance(value, int | float | str | tuple) for value in found.fields.values())

    fuzz_file(200, path, read, files=damaged(path.read_bytes()))


# --- settings ---------------------------------------------------------------------------------------------------------


WHOLE = json.loads(json.dumps(dataclasses.asdict(Experiment())))
YAML = b"recipe: llava\nmodel: {hf_dir: DIR}\nrecover:\n  epochs: 2.5e-1\n  losses: {l2_layers: [-1, 2]}\n"
CONFIG = ROOT / "configs/llava15_7b.py"
VALUES = (
    "", "x", "None", "True", "-1", "0", "1.5", "nan", "inf", "1e400", "9" * 5000, "()", "(1,", "[1,2]", "{'a': 1}",
    "__import__('os').abort()", "(" * 3000, "-" * 3000 + "1", ESCAPES.replace("\0", ""), "../x", "a/b", "\udcff",
)  # fmt: skip


def test_overrides():
    @fuzz(200, values=edited(WHOLE, 3))
    def check(values):
        if isinstance(values, dict):
            reads(lambda: check_experiment(override(Experiment(), values)))


def names(section, where=""):
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        yield from names(value, f"{where}{field.name}.") if dataclasses.is_dataclass(value) else [where + field.name]


def experiment_of(*flags):
    return read_experiment(parse("score", stage_command("score"), [*flags]).config)


def test_flags(tmp_path):
    known = [*names(Experiment()), "prune_variants.a", "data", "data.max_lenght", "x", ESCAPES.replace("\0", "")]

    @fuzz(60, name=st.sampled_from(known), value=st.sampled_from(VALUES))
    def check(name, value):
        reads(lambda: experiment_of(f"--config={CONFIG}", f"--workdir={tmp_path}", f"--config.{name}={value}"))


def test_yaml(tmp_path):
    file = tmp_path / "my.yaml"
    fuzz_file(60, file, lambda: experiment_of(f"--config={file}"), files=damaged(YAML))
