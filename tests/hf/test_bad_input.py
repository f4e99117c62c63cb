"""Damaged, foreign and hostile folders: one line that names the file or key, exit code 2, and nothing left behind.

Every case is a function that damages a good sharded folder; loading, inspecting and file surgery must all refuse it.
"""

import itertools
import json
import os
import shutil
import struct
import time

import ml_dtypes
import numpy as np
import pytest
from hf_cases import LLAMA, copy_golden, edit_config, edit_weights, keep_layers, make_folder
from safetensors.numpy import load_file, save_file

import vlmprune_jax as vp
from vlmprune_jax.cli.main import main
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.hf.read import read_config

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
KEY = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"  # in the second shard


@pytest.fixture
def folder(goldens, tmp_path):
    return copy_golden(goldens, "llava_hf", tmp_path / "folder")


@pytest.fixture(scope="module")
def plan(goldens):
    return keep_layers(vp.load(goldens / "ckpt/llava_hf"), [0, 4, 5])[1]


def refused_by_all(capsys, folder, plan, *parts):
    """The message of `load`, `prune_folder` and `vlmprune inspect`, which must be one line with all `parts`."""
    out = folder.parent / "out"
    messages = []
    for call in (lambda: vp.load(folder), lambda: vp.prune_folder(folder, plan, out)):
        with pytest.raises(UserError) as error:
            call()
        messages.append(str(error.value))
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    assert main(["inspect", str(folder)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("vlmprune: error: ")
    messages.append(said.err.removeprefix("vlmprune: error: ").removesuffix("\n"))
    assert len(set(messages)) == 1, messages
    assert "\n" not in messages[0]
    for part in parts:
        assert part in messages[0], messages[0]


# Headers --------------------------------------------------------------------------------------------------------------


def edit_header(path, edit):
    """Change the JSON header of a safetensors file and leave the data as it is."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    text = edit(header) or json.dumps(header)
    text = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


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
    refused_by_all(capsys, folder, plan, str(folder), INDEX, f"missing: {SECOND}")


def test_same_key_in_two_shards(capsys, folder, plan):
    value = load_file(folder / SECOND)[KEY]
    edit_weights(folder, lambda tensors: tensors | {KEY: value}, FIRST)
    refused_by_all(capsys, folder, plan, f"{folder / SECOND}: tensor {KEY}", f"is also in {FIRST}")


def test_shards_that_changed_places(capsys, folder, plan):
    """Every tensor is there, but not where the index says: two uploads are mixed."""
    (folder / FIRST).rename(folder / "first")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "first").rename(folder / SECOND)
    refused_by_all(capsys, folder, plan, str(folder), "the index lists", "does not hold it")


def test_shard_of_another_model(capsys, folder, plan):
    """Of the same family and with the same names, but wider."""
    edit_weights(folder, lambda all_: {k: np.concatenate([v, v]) for k, v in all_.items()}, SECOND)
    refused_by_all(capsys, folder, plan, str(folder), "has shape", "config.json says")


def test_shard_of_the_same_shapes_of_another_model(folder, plan):
    """Headers cannot tell; the plan's fingerprint does."""
    draw = np.random.default_rng(0)
    edit_weights(folder, lambda all_: {k: v + draw.normal(size=v.shape).astype("f4") for k, v in all_.items()}, SECOND)
    with pytest.raises(UserError, match="same shapes, other weights"):
        vp.prune_folder(folder, plan, folder.parent / "out")


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
    refused_by_all(capsys, folder, plan, f"{folder / 'config.json'}: ", "quant_method 'gptq'", "were made from")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite(tmp_path, dtype, value):
    source = make_folder(tmp_path / "source", LLAMA)
    edit_weights(source, lambda all_: {key: array.astype(dtype) for key, array in all_.items()})
    plan = keep_layers(vp.load(source), [1, 3])[1]
    key = "model.layers.3.self_attn.o_proj.weight"
    edit_weights(source, lambda all_: all_[key].__setitem__((7, 20), value))
    for call in (lambda: vp.load(source), lambda: vp.prune_folder(source, plan, tmp_path / "out")):
        with pytest.raises(UserError, match=f"tensor {key}.* holds 1 NaN or infinite"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Configs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "[1]", "{" * 3, '{"a": ' * 100_000, "\ufeff{}", "\0"])
@pytest.mark.parametrize("name", ["config.json", INDEX, "generation_config.json"])
def test_files_that_are_no_json_object(capsys, folder, plan, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    refused_by_all(capsys, folder, plan, f"{folder / name}: ", "restore it")


def test_unknown_family_lists_what_is_known(capsys, folder, plan):
    edit_config(folder, model_type="blip-2", architectures=["Blip2ForConditionalGeneration"])
    known = ("llava", "llama", "mistral", "qwen2", "qwen3", "phi", "phi3")
    refused_by_all(capsys, folder, plan, f"{folder / 'config.json'}: model_type 'blip-2'", "Blip2", "known:", *known)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_config.hidden_size": "48"}, "text_config.hidden_size is '48', expected a whole number above 0"),
        ({"text_config.num_hidden_layers": 10**9}, "text_config.num_hidden_layers is 1000000000, expected a whole"),
        ({"text_config.vocab_size": -1}, "text_config.vocab_size is -1, expected a whole number above 0"),
        ({"text_config.rms_norm_eps": float("nan")}, "text_config.rms_norm_eps is nan, expected a number"),
        ({"text_config.rope_scaling": {"type": "linear"}}, 'linear rope: "factor" is missing'),
        ({"text_config.per_layer_shapes": 5}, "text_config.per_layer_shapes is 5, expected a list of [query heads"),
        ({"text_config.num_hidden_layers": 10_000}, "text_config.num_hidden_layers is 10000, expected a whole number"),
        (
            {"vision_config.image_size": 2**31 - 1},
            "vision_config.image_size is 2147483647, expected a whole number from 1",
        ),
        ({"text_config.rope_theta": 5e-324}, "text_config.rope_theta is 5e-324, expected a number above 0"),
        (
            {"text_config.rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}},
            "yarn rope with theta 10000, ",
        ),
        ({"text_config.hidden_act": "evil"}, "activation 'evil' is not supported"),
        ({"architectures": ["LlavaForConditionalGeneration`\n"]}, "architectures is ['LlavaFor"),
        ({"auto_map": {"a b": "c"}}, "auto_map is {'a b': 'c'}, expected an object of names"),
        ({"deep": json.loads("[" * 200 + "]" * 200)}, "is not valid JSON (too deeply nested)"),
        ({"name": "\ud800"}, "is not valid JSON ('utf-8' codec"),
        ({"vision_config": ["clip"]}, "vision_config is ['clip'], expected an object"),
        ({"vision_config.num_attention_heads": 5}, "vision tower: hidden_size 32 is not a multiple of its 5"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_that_cannot_be(capsys, folder, plan, changes, said):
    config = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        *sections, name = path.split(".")
        at = config[sections[0]] if sections else config
        at[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    refused_by_all(capsys, folder, plan, f"{folder / 'config.json'}: {said}")


def test_ratios_of_the_pixel_shuffle(goldens, tmp_path):
    folder = copy_golden(goldens, "internvl", tmp_path / "folder")
    for ratio, said in ((5e-324, "expected a number above 0"), (0.3, "1 / a whole number"), (2.0, "1 / a whole")):
        edit_config(folder, downsample_ratio=ratio)
        with pytest.raises(UserError, match=f"config.json: downsample_ratio.*{said}"):
            read_config(folder)


@pytest.mark.parametrize("widths", [1000, 1])
def test_a_thousand_layers_in_seconds(capsys, folder, plan, widths):
    """The weights of six are there; layers of many widths are as many runs, which take longer than one."""
    config = json.loads((folder / "config.json").read_text())
    layers = 1000 if widths == 1 else 100
    shapes = [[4, 4, 80 + number % widths] for number in range(layers)]
    edit_config(folder, text_config={**config["text_config"], "num_hidden_layers": layers, "per_layer_shapes": shapes})
    before = time.monotonic()
    refused_by_all(capsys, folder, plan, "has shape [48, 48], config.json says", "more: use a complete")
    assert time.monotonic() - before < 20


@pytest.mark.parametrize("number", ["x", "1e3", "-1", "9" * 5000, "1 ", "²"])
def test_keys_whose_layer_number_is_none(capsys, folder, plan, number):
    key = f"vision_tower.vision_model.encoder.layers.{number}.mlp.fc1.weight"
    edit_header(folder / SECOND, lambda header: header.update({key: header.pop(KEY)}))
    edit_index(folder, lambda weight_map: weight_map.update({key: weight_map.pop(KEY)}))
    refused_by_all(
        capsys, folder, plan, "unknown key vision_tower.vision_model.encoder.layers.", f"missing key {KEY[:12]}"
    )


def test_control_characters_in_names(capsys, folder, plan):
    key = "\x1b[2J\x1b]0;title\x07\u202eabc\nnext"
    edit_header(folder / SECOND, lambda header: header.update({key: header.pop(KEY)}))
    edit_index(folder, lambda weight_map: weight_map.update({key: weight_map.pop(KEY)}))
    refused_by_all(capsys, folder, plan, r"unknown key \x1b[2J\x1b]0;title\x07\u202eabc next")


def edit_index(folder, edit):
    """Change the weight_map of a folder's index."""
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


# Links and special files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX, FIRST])
def test_what_is_no_file(capsys, folder, plan, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused_by_all(capsys, folder, plan, f"{folder / name}: is a FIFO, expected a file")
    (folder / name).unlink()
    (folder / name).symlink_to("/gone/\x1b[31m")
    refused_by_all(capsys, folder, plan, rf"{folder / name}: is a link to /gone/\x1b[31m, which does not exist")
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    refused_by_all(capsys, folder, plan, f"{folder / name}: is a link to itself")


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "x" * 300, "a\0b", "\udcff", "no/such", "x/" * 3000])
def test_names_of_folders(capsys, name):
    assert main(["inspect", name]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err


def test_a_folder_whose_name_is_not_in_utf_8(capsys, folder):
    odd = folder.rename(folder.parent / os.fsdecode(b"\xff\x1b[31m"))
    assert main(["inspect", str(odd)]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out
    assert said.err == ""


ODD = (
    "abc",
    "",
    "7",
    -1,
    0,
    7,
    10**30,
    1e300,
    5e-324,
    float("inf"),
    2**31 - 1,
    -0.5,
    float("nan"),
    True,
    None,
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
    {"type": 1},
)


@pytest.mark.parametrize("name", ["llava_hf", "llava_orig", "bunny", "internvl", "llama_gqa"])
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
            config = json.loads(json.dumps(good))
            (config[section[0]] if section else config)[field] = value
            path.write_text(json.dumps(config))
            try:
                read_config(tmp_path, tower)
            except UserError as error:
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


def test_config_of_another_size(capsys, folder, plan):
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, text_config={**config["text_config"], "num_hidden_layers": 5})
    refused_by_all(capsys, folder, plan, "unknown key language_model.model.layers.5.")


def test_the_hub_out_of_reach(capsys):
    assert main(["inspect", "some-org/some-model"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vlmprune: error: some-org/some-model: no such folder, and not available from the hub (")
    assert said.count("\n") == 1


def test_no_weights_at_all(capsys, tmp_path):
    source = make_folder(tmp_path / "source", LLAMA)
    plan = keep_layers(vp.load(source), [1])[1]
    (source / "model.safetensors").unlink()
    refused_by_all(capsys, source, plan, f"{source}: no weights", "model.safetensors")
    save_file({}, source / "model.safetensors")
    refused_by_all(capsys, source, plan, f"{source}: ", "missing key model.embed_tokens.weight")
