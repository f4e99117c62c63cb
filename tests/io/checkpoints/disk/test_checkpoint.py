"""Damaged, foreign and hostile folders: one line that names the file or key, exit code 2, and nothing left behind."""

import cProfile
import itertools
import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from damage_cases import FIRST, INDEX, KEY, SECOND, edit_header, edit_index, refused_by_all
from hf_cases import LLAMA, copy_golden, edit_config, edit_weights, keep_layers, keep_width, make_folder
from refusal import refused
from safetensors.numpy import load_file, save_file

import vlmprune_jax as vp
from vlmprune_jax.io.checkpoints.read import read_config
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


def config(**changes):
    """Other fields in config.json; those named SECTION__FIELD are in a section."""

    def damage(folder):
        content = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            section, _, field = name.rpartition("__")
            (content[section] if section else content)[field] = value
        (folder / "config.json").write_text(json.dumps(content))

    return damage


def renamed(key):
    def damage(folder):
        edit_header(folder / SECOND, lambda entries: entries.update({key: entries.pop(KEY)}))
        edit_index(folder, lambda weight_map: weight_map.update({key: weight_map.pop(KEY)}))

    return damage


def replaced(name, make):
    """Something else in place of a file."""

    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def without_weights(folder):
    for name in (FIRST, SECOND, INDEX):
        (folder / name).unlink()


def with_nothing_in_them(folder):
    without_weights(folder)
    save_file({}, folder / "model.safetensors")


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
QUANTISED = {"quant_method": "gptq", "bits": 4}
BY_METHOD = ("config.json: ", "quant_method 'gptq'", "use the unquantised checkpoint")
JSON_FILES = ("config.json", "generation_config.json", INDEX)
ESCAPES = "\x1b[2J\x1b]0;title\x07\u202eabc\nnext"
LAYERS = KEY.partition("1.mlp")[0]
BETAS = {"type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}
DAMAGE = {
    "larger shape": (field("shape", lambda shape: [shape[0] + 1, shape[1]]), IN_SECOND, KEY, "cannot take"),
    "overlap": (header(overlapping), IN_SECOND, "overlaps"),
    "gap": (header(lambda entries: entries.pop(KEY) and None), IN_SECOND, "bytes before tensor", "belong to no tensor"),
    "rest": (header(without_the_last), IN_SECOND, "bytes after the last tensor belong to no tensor"),
    "twice": (text(lambda all_: all_[:-1] + f', "{KEY}": null}}'), IN_SECOND, KEY, "is repeated"),
    "nested": (text(lambda _: "[" * 100_000), IN_SECOND, "damaged safetensors header", "recursion"),
    "utf-16": (text(lambda all_: all_.encode("utf-16")), IN_SECOND, "damaged safetensors header", "utf-8"),
    "list": (text(lambda _: "[1, 2]"), IN_SECOND, "damaged"),
    **{f"cut at {end}": (cut(end), *TRUNCATED) for end in (7, 3000, -1)},
    "long header": (claims_more_than_the_file, f"/{FIRST}: truncated or not safetensors"),
    "pointer": (lambda folder: (folder / FIRST).write_text(POINTER), f"/{FIRST}: a Git LFS pointer", "download it"),
    "no shard": (lambda folder: (folder / SECOND).unlink(), INDEX, f"missing ({SECOND}"),
    "no weights": (without_weights, "contains no weights", "model.safetensors"),
    "nothing in them": (with_nothing_in_them, "missing key "),
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
    "F8": (of_dtype("F8_E4M3"), f"{KEY} has dtype F8_E4M3"),
    "unknown dtype": (field("dtype", lambda _: "F4"), f"{KEY} has dtype F4"),
    "quantised": (config(quantization_config=QUANTISED), *BY_METHOD),
    "quantised decoder": (config(text_config__quantization_config=QUANTISED), *BY_METHOD),
    "stray": (stray(KEY.replace("fc1", "fc3")), f"unknown key {KEY.replace('fc1', 'fc3')}"),
    "a block too many": (stray(KEY.replace("s.1", "s.4")), f"unknown key {KEY.replace('s.1', 's.4')}"),
    "two names": (head_under_two_names, "lm_head.weight", "are the same weight"),
    **{
        f"layer {number[:5]}": (renamed(f"{LAYERS}{number}.mlp.fc1.weight"), f"unknown key {LAYERS}", "missing key ")
        for number in ("1e3", "-1", "9" * 5000, "1 ", "²")
    },
    "control characters": (renamed(ESCAPES), r"unknown key \x1b[2J\x1b]0;title\x07\u202eabc next"),
    # config.json and other JSON files
    **{
        f"{name} {said[:2]}": (replaced(name, lambda path, said=said: path.write_text(said)), f"/{name}: ", "restore")
        for name in JSON_FILES for said in ("", "[1]", '{"a": ' * 100_000, "\ufeff{}", "\0")
    },
    **{f"fifo {name}": (replaced(name, os.mkfifo), f"/{name}: is a FIFO") for name in (*JSON_FILES, FIRST)},
    "link": (
        replaced("config.json", lambda path: path.symlink_to("/gone/\x1b[31m")),
        r"/config.json: is a link to /gone/\x1b[31m, which does not exist",
    ),
    "link to itself": (replaced(INDEX, lambda path: path.symlink_to(INDEX)), f"/{INDEX}: is a link to itself"),
    "family": (
        config(model_type="blip-2", architectures=["Blip2ForConditionalGeneration"]),
        "/config.json: model_type 'blip-2'", "Blip2", "known:", "llava", "llama", "qwen3", "phi3",
    ),
    "fewer layers": (config(text_config__num_hidden_layers=5), "unknown key language_model.model.layers.5.", "): use"),
    "no number": (config(text_config__hidden_size="48"), "field text_config.hidden_size is '48', expected a whole n"),
    "layers": (config(text_config__num_hidden_layers=10_000), "num_hidden_layers is 10000, expected a whole number"),
    "linear": (config(text_config__rope_scaling={"type": "linear"}), "/config.json: linear rope: factor missing"),
    "yarn": (config(text_config__rope_scaling=BETAS), "/config.json: yarn rope with theta 10000, "),
    "theta": (config(text_config__rope_theta=5e-324), "text_config.rope_theta is 5e-324, expected a number above 0"),
    "shapes": (config(text_config__per_layer_shapes=5), "text_config.per_layer_shapes is 5, expected a list of [query"),
    "image": (config(vision_config__image_size=2**31 - 1), "vision_config.image_size is 2147483647, expected a whole"),
    "activation": (config(text_config__hidden_act="evil"), "/config.json: activation 'evil' is not one of"),
    "class": (config(architectures=["Llava`\n"]), "/config.json: field architectures is ['Llava"),
    "code": (config(auto_map={"a b": "c"}), "/config.json: field auto_map is {'a b': 'c'}, expected an object of n"),
    "deep": (config(deep=json.loads("[" * 200 + "]" * 200)), "/config.json: is not valid JSON (too deeply nested)"),
    "surrogate": (config(name="\ud800"), "/config.json: is not valid JSON ('utf-8' codec"),
    "section": (config(vision_config=["clip"]), "/config.json: field vision_config is ['clip'], expected an object"),
    "heads": (config(vision_config__num_attention_heads=5), "vision tower: hidden_size 32 is not a multiple of its 5"),
    "tied": (config(tie_word_embeddings="false"), "field tie_word_embeddings is 'false', expected true or false"),
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


@pytest.mark.parametrize(
    ("dtype", "value"), [(np.float32, -np.nan), (np.float16, np.inf), (ml_dtypes.bfloat16, np.nan)]
)
def test_weights_that_are_not_finite(tmp_path, dtype, value):
    """Where a layer is copied in blocks, and where some of its neurons are picked."""
    source = make_folder(tmp_path / "source", LLAMA)
    edit_weights(source, lambda all_: {key: array.astype(dtype) for key, array in all_.items()})
    model, key = vp.load(source), "model.layers.3.mlp.down_proj.weight"
    plans = [keep_layers(model, [1, 3])[1], keep_width(model, [1], range(3, 56, 2))[1]]
    edit_weights(source, lambda all_: all_[key].__setitem__((7, 21), value))
    for call, *args in ((vp.load, source), *((vp.prune_folder, source, plan, tmp_path / "out") for plan in plans)):
        refused(f"model.safetensors: tensor {key}.* has 1 NaN or infinite", call, *args)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("widths", [1000, 1])
def test_a_thousand_layers_are_ten_times_the_work_of_a_hundred(capsys, folder, plan, widths):
    """The weights of six are there; layers of many widths are as many runs, which take longer than one."""
    text = json.loads((folder / "config.json").read_text())["text_config"]

    def calls(layers):
        shapes = [[4, 4, 80 + number % widths] for number in range(layers)]
        edit_config(folder, text_config={**text, "num_hidden_layers": layers, "per_layer_shapes": shapes})
        profile, said = cProfile.Profile(), ("has shape [48, 48], config.json says", "more): use a complete")
        profile.runcall(refused_by_all, capsys, folder, plan, *said)
        return sum(entry.callcount for entry in profile.getstats())

    most = 1000 if widths == 1 else 100
    assert calls(most // 10) > calls(most) / 11


def test_names_of_folders(capsys, folder):
    odd = folder.rename(folder.parent / os.fsdecode(b"\xff\x1b[31m"))
    assert main(["inspect", str(odd)]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out
    assert said.err == ""
    for name in ("x" * 300, "a/" + "x" * 300, "a\0b", "\udcff", "no/such", "x/" * 3000):
        assert main(["inspect", name]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert said.err.startswith("vlmprune: error: ")


ODD = (
    "abc", "", "7", -1, 0, 7, 10**30, 1e300, 5e-324, float("inf"), 2**31 - 1, -0.5, float("nan"), True, None, [], [1],
    ["a"], {}, {"a": 1}, {"type": 1},
)  # fmt: skip


@pytest.mark.parametrize("name", ["llava_hf", "llava_orig", "bunny", "internvl"])
def test_whatever_a_field_holds(goldens, tmp_path, name):
    """A config with one wrong field is read as it is or refused in one line that names the file, never a crash."""
    tower = {"llava_orig": "clip_tower", "bunny": "siglip_tower"}.get(name)
    tower = tower and goldens / "ckpt" / tower
    good, path = json.loads((goldens / "ckpt" / name / "config.json").read_text()), tmp_path / "config.json"
    sections = [(), *((key,) for key, value in good.items() if isinstance(value, dict))]
    added = {"head_dim", "rope_parameters", "rope_scaling", "layer_types", "per_layer_shapes", "eos_token_id"}
    for section in sections:
        fields = set(good[section[0]] if section else good) | added
        for field, value in itertools.product(sorted(fields), ODD):
            changed = json.loads(json.dumps(good))
            (changed[section[0]] if section else changed)[field] = value
            path.write_text(json.dumps(changed))
            try:
                read_config(tmp_path, tower)
            except vp.UserError as error:
                said = str(error)
                assert said.startswith(f"{path}: "), said
                assert "\n" not in said, said
                assert len(said) < 400, said


def test_code_of_a_repository_is_never_run(capsys, folder, plan):
    edit_config(folder, model_type="evil", auto_map={"AutoConfig": "configuration_evil.EvilConfig"})
    trap = folder.parent / "ran"
    (folder / "configuration_evil.py").write_text(f"open({str(trap)!r}, 'w')\nraise SystemExit\n")
    refused_by_all(capsys, folder, plan, "model_type 'evil'", "own code (auto_map), which is never run", "known:")
    assert not trap.exists()
