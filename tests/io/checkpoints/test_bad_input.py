"""Damaged, foreign and hostile folders: one line that names the file or key, exit code 2, and nothing left behind.

Every case is a function that damages a good sharded folder; loading, inspecting and file surgery must all refuse it.
"""

import cProfile
import itertools
import json
import os

import pytest
from damage_cases import FIRST, INDEX, KEY, SECOND, edit_header, edit_index, refused_by_all
from hf_cases import LLAMA, copy_golden, edit_config, keep_layers, make_folder
from safetensors.numpy import save_file

import vlmprune_jax as vp
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.run.cli.main import main


@pytest.fixture
def folder(goldens, tmp_path):
    return copy_golden(goldens, "llava_hf", tmp_path / "folder")


@pytest.fixture(scope="module")
def plan(goldens):
    return keep_layers(vp.load(goldens / "ckpt/llava_hf"), [0, 4, 5])[1]


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
        ({"text_config.hidden_size": "48"}, "field text_config.hidden_size is '48', expected a whole number above 0"),
        ({"text_config.num_hidden_layers": 10**9}, "field text_config.num_hidden_layers is 1000000000, expected a"),
        ({"text_config.vocab_size": -1}, "field text_config.vocab_size is -1, expected a whole number above 0"),
        ({"text_config.rms_norm_eps": float("nan")}, "field text_config.rms_norm_eps is nan, expected a number"),
        ({"text_config.rope_scaling": {"type": "linear"}}, "linear rope: factor missing"),
        ({"text_config.per_layer_shapes": 5}, "field text_config.per_layer_shapes is 5, expected a list of [query"),
        ({"text_config.num_hidden_layers": 10_000}, "field text_config.num_hidden_layers is 10000, expected a whole"),
        (
            {"vision_config.image_size": 2**31 - 1},
            "field vision_config.image_size is 2147483647, expected a whole number from 1",
        ),
        ({"text_config.rope_theta": 5e-324}, "field text_config.rope_theta is 5e-324, expected a number above 0"),
        (
            {"text_config.rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}},
            "yarn rope with theta 10000, ",
        ),
        ({"text_config.hidden_act": "evil"}, "activation 'evil' is not one of"),
        ({"architectures": ["LlavaForConditionalGeneration`\n"]}, "field architectures is ['LlavaFor"),
        ({"auto_map": {"a b": "c"}}, "field auto_map is {'a b': 'c'}, expected an object of names"),
        ({"deep": json.loads("[" * 200 + "]" * 200)}, "is not valid JSON (too deeply nested)"),
        ({"name": "\ud800"}, "is not valid JSON ('utf-8' codec"),
        ({"vision_config": ["clip"]}, "field vision_config is ['clip'], expected an object"),
        ({"vision_config.num_attention_heads": 5}, "vision tower: hidden_size 32 is not a multiple of its 5"),
        ({"tie_word_embeddings": "false"}, "field tie_word_embeddings is 'false', expected true or false"),
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
    for ratio, said in (
        (5e-324, "expected a number above 0"),
        (0.3, "1 divided by an integer"),
        (2.0, "1 divided by an"),
    ):
        edit_config(folder, downsample_ratio=ratio)
        with pytest.raises(vp.UserError, match=f"config.json: .*downsample_ratio.*{said}"):
            read_config(folder)


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


def test_config_of_another_size(capsys, folder, plan):
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, text_config={**config["text_config"], "num_hidden_layers": 5})
    refused_by_all(capsys, folder, plan, "unknown key language_model.model.layers.5.", "more): use")


def test_the_hub_out_of_reach(capsys):
    assert main(["inspect", "some-org/some-model"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vlmprune: error: some-org/some-model: no such folder, and not available from the hub (")
    assert said.count("\n") == 1


def test_no_weights_at_all(capsys, tmp_path):
    source = make_folder(tmp_path / "source", LLAMA)
    plan = keep_layers(vp.load(source), [1])[1]
    (source / "model.safetensors").unlink()
    refused_by_all(capsys, source, plan, f"{source}: contains no weights", "model.safetensors")
    save_file({}, source / "model.safetensors")
    refused_by_all(capsys, source, plan, f"{source}: ", "missing key model.embed_tokens.weight")
