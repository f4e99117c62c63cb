"""Damaged headers, shards and weights: one line that names the file or tensor, exit code 2, and nothing left behind."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from damage_cases import FIRST, INDEX, KEY, SECOND, edit_header, edit_index, refused_by_all
from hf_cases import LLAMA, copy_golden, edit_config, edit_weights, keep_layers, make_folder
from refusal import refused
from safetensors.numpy import load_file

import vlmprune_jax as vp
from vlmprune_jax.run.cli.main import main

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4000000000\n"


@pytest.fixture
def folder(goldens, tmp_path):
    return copy_golden(goldens, "llava_hf", tmp_path / "folder")


@pytest.fixture(scope="module")
def plan(goldens):
    return keep_layers(vp.load(goldens / "ckpt/llava_hf"), [0, 4, 5])[1]


# Each damages a folder.


def header(edit):
    return lambda folder: edit_header(folder / SECOND, edit)


def field(name, change):
    """Another value of one field of a tensor's entry in the header."""
    return header(lambda entries: entries[KEY].update({name: change(entries[KEY][name])}))


def text(write):
    """Another text in place of the header."""
    return header(lambda entries: write(json.dumps(entries)))


def weights(edit, name=SECOND):
    return lambda folder: edit_weights(folder, edit, name)


def index(edit):
    return lambda folder: edit_index(folder, edit)


def cut(end, name=SECOND):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:end])


def overlapping(entries):
    end = entries[KEY]["data_offsets"][1]
    after = next(one for one in entries.values() if one.get("data_offsets", [0])[0] == end)
    after["data_offsets"] = [value - 8 for value in after["data_offsets"]]


def without_the_last(entries):
    del entries[max((key for key in entries if key != "__metadata__"), key=lambda key: entries[key]["data_offsets"])]


def huge(entries):
    entries[KEY]["shape"], entries[KEY]["data_offsets"] = [2**62, 2**62], [0, 2**63]


def claims_more_than_the_file(folder):
    (folder / FIRST).write_bytes(struct.pack("<Q", 2**40) + (folder / FIRST).read_bytes()[8:])


def in_two_shards(folder):
    value = load_file(folder / SECOND)[KEY]
    edit_weights(folder, lambda tensors: tensors | {KEY: value}, FIRST)


def changed_places(folder):
    """Every tensor is there, but not where the index says: two uploads are mixed."""
    (folder / FIRST).rename(folder / "first")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "first").rename(folder / SECOND)


def many_problems(folder):
    def edit(tensors):
        del tensors[KEY]
        tensors[f"{KEY}.extra"] = np.zeros(3, np.float32)
        tensors[KEY.replace("weight", "bias")] = np.zeros(3, np.float32)
        tensors[KEY.replace("fc1", "fc2")] = np.zeros((32, 64), np.int8)

    edit_weights(folder, edit, SECOND)
    edit_index(folder, lambda weight_map: weight_map.update({f"{KEY}.extra": weight_map.pop(KEY)}))


def of_dtype(dtype):
    def damage(folder):
        edit_weights(folder, lambda tensors: tensors | {KEY: tensors[KEY].astype(np.int8)}, SECOND)
        edit_header(folder / SECOND, lambda entries: entries[KEY].update(dtype=dtype))

    return damage


QUANTISED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}


def quantised_inside(folder):
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, text_config={**config["text_config"], **QUANTISED})


def stray(key):
    """A tensor under a name of the tower; blocks above the feature layer are known, a block too many is not."""

    def damage(folder):
        edit_weights(folder, lambda tensors: tensors | {key: tensors[KEY]}, SECOND)
        edit_index(folder, lambda weight_map: weight_map.update({key: SECOND}))

    return damage


def head_under_two_names(folder):
    edit_weights(folder, lambda all_: all_ | {"lm_head.weight": all_["language_model.lm_head.weight"]}, FIRST)
    edit_index(folder, lambda weight_map: weight_map.update({"lm_head.weight": FIRST}))


IN_SECOND, TRUNCATED = f"/{SECOND}: ", (f"/{SECOND}: truncated", "download it again")
BY_METHOD = ("config.json: ", "quant_method 'gptq'", "use the unquantised checkpoint")
DAMAGE = {
    "larger shape": (field("shape", lambda shape: [shape[0] + 1, shape[1]]), IN_SECOND, KEY, "cannot take"),
    "shape of text": (field("shape", lambda _: "wide"), IN_SECOND, "damaged"),
    "other dtype": (field("dtype", lambda _: "F16"), IN_SECOND, KEY, "cannot take"),
    "longer range": (field("data_offsets", lambda ends: [ends[0], ends[1] + 4]), IN_SECOND, KEY, "cannot take"),
    "backwards": (field("data_offsets", lambda ends: ends[::-1]), IN_SECOND, "damaged"),
    "far": (field("data_offsets", lambda e: [10**12, 10**12 + e[1] - e[0]]), IN_SECOND, "truncated"),
    "huge": (header(huge), IN_SECOND, KEY, "truncated"),
    "overlap": (header(overlapping), IN_SECOND, "overlaps"),
    "gap": (header(lambda entries: entries.pop(KEY) and None), IN_SECOND, "bytes before tensor", "belong to no tensor"),
    "rest": (header(without_the_last), IN_SECOND, "bytes after the last tensor belong to no tensor"),
    "null": (header(lambda entries: entries.update({KEY: None})), IN_SECOND, "damaged"),
    "twice": (text(lambda all_: all_[:-1] + f', "{KEY}": null}}'), IN_SECOND, KEY, "is repeated"),
    "nested": (text(lambda _: "[" * 100_000), IN_SECOND, "damaged safetensors header", "recursion"),
    "utf-16": (text(lambda all_: all_.encode("utf-16")), IN_SECOND, "damaged safetensors header", "utf-8"),
    "no json": (text(lambda _: b"{not json"), IN_SECOND, "damaged"),
    "list": (text(lambda _: "[1, 2]"), IN_SECOND, "damaged"),
    **{f"cut at {end}": (cut(end), *TRUNCATED) for end in (0, 7, 100, 3000, -1)},
    "long header": (claims_more_than_the_file, f"/{FIRST}: truncated or not safetensors"),
    "pointer": (lambda folder: (folder / FIRST).write_text(POINTER), f"/{FIRST}: a Git LFS pointer", "download it"),
    "no shard": (lambda folder: (folder / SECOND).unlink(), INDEX, f"missing ({SECOND}"),
    "in two shards": (in_two_shards, f"/{SECOND}: tensor {KEY}", f"is also in {FIRST}"),
    "other places": (changed_places, "the index lists", "does not contain it"),
    "no weight_map": (lambda folder: (folder / INDEX).write_text('{"weight_map": null}'), INDEX, "weight_map"),
    "empty weight_map": (index(lambda weight_map: weight_map.clear()), INDEX, "weight_map"),
    "outside": (index(lambda w: w.update({KEY: "../other/model.safetensors"})), INDEX, "is outside the folder"),
    "wider": (weights(lambda a: {k: np.concatenate([v, v]) for k, v in a.items()}), "has shape", "config.json says"),
    "many": (
        many_problems, f"missing key {KEY}", f"unknown key {KEY}.extra", "fc2.weight has dtype I8",
        "fc1.bias has shape [3], config.json says [64]",
    ),
    "I8": (of_dtype("I8"), f"{KEY} has dtype I8", "F32, F16, BF16", "unquantised"),
    **{dtype: (of_dtype(dtype), f"{KEY} has dtype {dtype}") for dtype in ("F8_E4M3", "F8_E5M2", "U8")},
    "unknown dtype": (field("dtype", lambda _: "F4"), f"{KEY} has dtype F4"),
    "quantised": (lambda folder: edit_config(folder, **QUANTISED), *BY_METHOD),
    "quantised decoder": (quantised_inside, *BY_METHOD),
    "stray": (stray(KEY.replace("fc1", "fc3")), f"unknown key {KEY.replace('fc1', 'fc3')}"),
    "a block too many": (stray(KEY.replace("s.1", "s.4")), f"unknown key {KEY.replace('s.1', 's.4')}"),
    "two names": (head_under_two_names, "lm_head.weight", "are the same weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(capsys, folder, plan, name):
    damage, *facts = DAMAGE[name]
    damage(folder)
    refused_by_all(capsys, folder, plan, str(folder), *facts)


def test_shard_of_the_same_shapes_of_another_model(folder, plan):
    """Headers cannot tell; the plan's fingerprint does."""
    draw = np.random.default_rng(0)
    edit_weights(folder, lambda all_: {k: v + draw.normal(size=v.shape).astype("f4") for k, v in all_.items()}, SECOND)
    refused("fingerprints differ", vp.prune_folder, folder, plan, folder.parent / "out")


def test_a_pointer_in_place_of_a_pickle(capsys, goldens, tmp_path):
    binary = copy_golden(goldens, "llava_orig_bin", tmp_path / "binary")
    (binary / "pytorch_model.bin").write_text(POINTER)
    assert main(["inspect", str(binary), f"--vision_dir={goldens / 'ckpt/clip_tower'}"]) == 2
    assert "pytorch_model.bin: a Git LFS pointer" in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite(tmp_path, dtype, value):
    source = make_folder(tmp_path / "source", LLAMA)
    edit_weights(source, lambda all_: {key: array.astype(dtype) for key, array in all_.items()})
    plan = keep_layers(vp.load(source), [1, 3])[1]
    key = "model.layers.3.self_attn.o_proj.weight"
    edit_weights(source, lambda all_: all_[key].__setitem__((7, 20), value))
    for call, *args in ((vp.load, source), (vp.prune_folder, source, plan, tmp_path / "out")):
        refused(f"tensor {key}.* has 1 NaN or infinite", call, *args)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
