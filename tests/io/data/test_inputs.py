"""What a model's folder gives: chat template and prompts, images and their slots, and tokenizers, also damaged ones."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from refusal import refused
from repository import ROOT

from vlmprune_jax.core.prune.config import ScoreConfig
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.data import chat_template, inputs
from vlmprune_jax.io.data.chat_template import chat_prompt, follow
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import Shape
from vlmprune_jax.io.data.inputs import load_inputs
from vlmprune_jax.io.data.preparation import within_row
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.tiling import Tiling
from vlmprune_jax.io.data.tokenizer_files import added_tokens
from vlmprune_jax.io.families import FAMILIES, detect, templates

TEACHER = ROOT / "vlmprune_jax/demo/teacher"
# That of llava-hf/llava-1.5-7b-hf, whose `generation` tags only transformers knows.
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def inputs_of(folder, **settings):
    return load_inputs(ModelSpec(str(folder)), DataSpec(**settings), read_config(folder)[1])


@pytest.fixture
def teacher(tmp_path):
    """A copy of the demo's teacher, a LLaVA whose chat template has no system text."""
    return shutil.copytree(TEACHER, tmp_path / "teacher")


def test_the_demo_model_gets_the_prompt_it_was_trained_with():
    found = inputs_of(TEACHER)
    assert (found.template.name, found.template.system) == ("llava_v1", "")
    assert found.image_loader.preparation.settings["aspect_ratio"] == "square"
    assert found.notes == ()
    told = inputs_of(TEACHER, template="llava_v1", aspect_ratio="pad").notes
    assert len(told) == 2
    assert told[0].startswith('prompts are "A chat between a curious user')
    assert "of the folder's chat template 'USER: <image>\\nHow many? ASSISTANT:'; a recipe or config sets" in told[0]
    assert told[1] == 'data.aspect_ratio="pad", but the model folder says "square"'
    assert inputs_of(TEACHER, template="llava_v1", system="", aspect_ratio="square").notes == ()
    for name, template in (("llava", "llava_v1"), ("llava-original", "llava_v1"), ("bunny", "bunny")):  # of the paper
        data = FAMILIES[name].recipe["data"]
        assert (data["template"], data["aspect_ratio"]) == (template, "pad")


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "smolvlm", "internvl3", "gemma3", "gemma4"])
def test_families_follow_their_own_chat_templates(goldens, name):
    folder = goldens / f"families/{name}/ckpt"
    found = inputs_of(folder)
    assert dataclasses.replace(found.template, start=templates()[name].start) == templates()[name]
    assert chat_prompt(folder, found.tokenizer, has_image=True) is not None
    assert found.notes == ()


@pytest.mark.parametrize(
    ("text", "system"), [(LLAVA_HF, ""), (f"Answer in one word. {LLAVA_HF}", "Answer in one word."), (None, "A chat")]
)
def test_where_a_folder_holds_its_chat_template(teacher, text, system):
    (teacher / "chat_template.jinja").unlink()
    if text is not None:
        (teacher / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    found = inputs_of(teacher)
    assert found.template.name == "llava_v1"
    assert found.template.system.startswith(system)
    assert bool(found.template.system) == bool(system)
    assert found.notes == ()


def test_other_chat_templates_of_a_folder(teacher, monkeypatch):
    """A prompt that no template makes is told; code that does not end is ignored; a begin token is its own."""
    monkeypatch.setattr(chat_template, "_SECONDS", 1)
    tokenizer, path = load_tokenizer(teacher), teacher / "chat_template.jinja"
    path.write_text("<q>{{ messages[0].content[1].text }}</q>")
    found = inputs_of(teacher)
    assert found.template == templates()["llava_v1"]
    (note,) = found.notes
    assert note.endswith("but those of the folder's chat template '<q>How many?</q>'")
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for text in (endless, "{{ raise_exception('no') }}"):
        path.write_text(text)
        assert chat_prompt(teacher, tokenizer, has_image=True) is None
    path.write_text("{{ bos_token }}USER: {{ messages[0].content }} ASSISTANT:")
    assert chat_prompt(teacher, tokenizer, has_image=False) == "USER: How many? ASSISTANT:"
    assert follow("USER: How many? ASSISTANT:", [templates()["llava_v1"]], has_image=False).system == ""


def test_the_code_of_a_hub_layout_has_priority(goldens, tmp_path):
    """A tokenizer of a language model has that model's chat template."""
    folder = shutil.copytree(goldens / "ckpt/internvl", tmp_path / "internvl")
    shutil.copytree(goldens / "tokenizers/internvl", folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text("other")
    found = inputs_of(folder)
    assert (found.template.name, found.notes) == ("phi3-chat", ())


# --- from data settings to batches ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cfg(goldens):
    """Some model with images; only its family, image size and positions matter here."""
    config = json.loads((goldens / "ckpt/llava_hf/config.json").read_text())
    return detect(config, "config.json").from_hf(config, None)


def folder_of(tmp_path, goldens, checkpoint, tokenizer):
    shutil.copytree(goldens / "tokenizers" / tokenizer, tmp_path / checkpoint)
    for file in (goldens / "ckpt" / checkpoint).glob("*config.json"):
        shutil.copy(file, tmp_path / checkpoint)
    return str(tmp_path / checkpoint)


def data(goldens, **changes):
    file = str(goldens / "data/samples.json")
    return DataSpec(train=file, eval=file, images=str(goldens / "data/images"), **changes)


@pytest.fixture
def internvl(goldens, tmp_path, cfg):
    folder = folder_of(tmp_path, goldens, "internvl", "internvl")
    assert cfg.vision is not None
    vision = dataclasses.replace(cfg.vision, image_size=56, patch_size=28)  # 4 positions a tile
    return ModelSpec(hf_dir=folder), dataclasses.replace(cfg, family="internvl", image_token_id=393, vision=vision)


def test_internvl_folder(goldens, internvl):
    model, cfg = internvl
    loaded = load_inputs(model, data(goldens), cfg)
    assert loaded.template.name == "phi3-chat"
    assert isinstance(loaded.image_loader.preparation, Tiling)
    assert loaded.encoder(cfg, 10).tile_buckets == (1, 2, 4, 7, 13)
    other = load_inputs(dataclasses.replace(model, vision_dir=str(goldens / "ckpt/clip_tower")), data(goldens), cfg)
    assert other.image_loader.preparation == loaded.image_loader.preparation
    two = load_inputs(model, data(goldens, max_images=2, max_tiles=6), cfg)
    assert two.encoder(cfg, 10).tile_buckets == (1, 2, 4, 7, 8)  # two images of three tiles and a thumbnail each
    plain = load_inputs(model, data(goldens, max_tiles=1), cfg)
    assert plain.encoder(cfg, 10).tile_buckets == (1,)
    chosen = load_inputs(model, data(goldens, tile_buckets=(3, 5), template="bunny", system="Hi."), cfg)
    assert chosen.encoder(cfg, 10).tile_buckets == (3, 5)
    assert (chosen.template.name, chosen.template.system) == ("bunny", "Hi.")
    for wrong in ((5, 3), (0, 2), (2, 2)):
        told = r"data\.tile_buckets.* must be (positive numbers|at least 1)"
        refused(told, data, goldens, tile_buckets=wrong)
    told = r"data\.template 'phi3_chat' is not one of auto, .*; did you mean 'phi3-chat'"
    refused(told, load_inputs, model, data(goldens, template="phi3_chat"), cfg)


def test_internvl_batches_for_scores(goldens, internvl):
    model, cfg = internvl
    score = ScoreConfig(samples=5, batch_size=2, longest_text=240)
    batches = inputs.calibration_batches(model, data(goldens, max_tiles=6), score, cfg, seed=0)
    assert len(batches) == 3
    assert len({batch.arrays["input_ids"].shape for batch in batches}) == 1
    stored = json.loads((goldens / "data/internvl_tokenized.json").read_text())["internvl"]["samples"]
    names = [record["id"] for record in json.loads((goldens / "data/samples.json").read_text())]
    rows = [(name, batch.arrays, row) for batch in batches for row, name in enumerate(batch.record_ids) if name]
    assert len(rows) == 5
    for name, arrays, row in rows:
        ids = arrays["input_ids"][row][arrays["attention_mask"][row] == 1]
        assert ids.tolist() == stored[names.index(name)]["input_ids"]


def test_images_of_any_size(goldens):
    """Buckets that hold every image, as the folder or the user caps them; nothing like it for other models."""
    model = ModelSpec(hf_dir=str(goldens / "families/qwen3_vl/ckpt"))
    _, qwen = read_config(Path(model.hf_dir), None)
    encoder = load_inputs(model, data(goldens), qwen).encoder(qwen, 10)
    assert encoder.image_loader.preparation.max_pixels == 1300
    assert (encoder.tile_buckets, encoder.image_buckets) == (None, (64,))  # 1300 / 8**2 are 21, thin images make more
    capped = load_inputs(model, data(goldens, max_image_tokens=6, image_buckets=(4, 6)), qwen)
    assert capped.image_loader.preparation.max_pixels == 6 * 8**2
    assert capped.encoder(qwen, 10).shape_of([]) == Shape(10, 1, 4)
    buckets = (64, 128, 256)
    assert [within_row(buckets, length) for length in (10, 64, 65, 999)] == [(64,), (64,), (64, 128), buckets]


def test_budgets_of_tokens(goldens):
    """Every budget of Gemma 4 shapes training and evaluation rows alike."""
    model = ModelSpec(hf_dir=str(goldens / "families/gemma4/ckpt"))
    _, gemma = read_config(Path(model.hf_dir), None)
    for budget in (70, 280, 1120):
        loaded = load_inputs(model, data(goldens, max_image_tokens=budget), gemma)
        for encoder in (loaded.encoder(gemma, 10), loaded.training_encoder(gemma)):
            assert encoder.image_buckets == (budget,)
        (shape,) = loaded.image_loader.shapes([goldens / "data/images/img1.png"], "r")
        assert budget / 2 < shape.tokens <= budget


def test_bunny_folders(goldens, tmp_path, cfg):
    assert cfg.vision is not None
    vision = dataclasses.replace(cfg.vision, image_size=45)
    bunny = dataclasses.replace(cfg, family="bunny", layout="original", image_token_id=-200, vision=vision)
    folder = folder_of(tmp_path, goldens, "bunny", "bunny")
    llava = dataclasses.replace(bunny, family="llava", layout="transformers")
    for vision_dir in (None, str(goldens / "ckpt/siglip_tower")):
        loaded = load_inputs(ModelSpec(hf_dir=folder, vision_dir=vision_dir), data(goldens), bunny)
        assert loaded.template.name == "bunny"
        assert loaded.encoder(bunny, 10).tile_buckets is None
        assert loaded.image_loader.shape == (3, 45, 45)
    assert load_inputs(ModelSpec(hf_dir=folder, vision_dir=vision_dir), data(goldens), llava).template.name == "bunny"


def test_a_model_without_tiles(goldens, tmp_path, cfg):
    folder = folder_of(tmp_path, goldens, "llava_hf", "llava")
    model = ModelSpec(hf_dir=folder, vision_dir=str(goldens / "ckpt/clip_tower"))

    def shape(**changes):
        return load_inputs(model, data(goldens, **changes), cfg).encoder(cfg, 10).shape_of([])

    refused(r"does not cut images into tiles by their aspect ratio: unset data\.thumbnail", shape, thumbnail=True)
    refused(r"data\.max_image_tokens=9: every image of this model has \d+ tokens", shape, max_image_tokens=9)
    told = r"data\.image_buckets=\(9,\) is set, but this model's images have one size"
    refused(told, shape, image_buckets=(9,))
    assert shape(max_images=3) == Shape(10, 3)
    assert shape(max_images=3, tile_buckets=(1, 3)) == Shape(10, 1)  # other models' images are one tile each
    shutil.copy(goldens / "ckpt/siglip_tower/preprocessor_config.json", folder)
    told = "returns 45 x 45 pixels, but the vision tower takes 28 x 28"
    refused(told, load_inputs, ModelSpec(hf_dir=folder), data(goldens), cfg)


# --- damaged and hostile tokenizers -----------------------------------------------------------------------------------


@pytest.fixture
def files(goldens, tmp_path):
    return shutil.copytree(goldens / "tokenizers/bunny", tmp_path / "folder")


def edit(files, name="tokenizer.json", **changes):
    content = json.loads((files / name).read_text()) | changes
    (files / name).write_text(json.dumps(content))


def unreadable(capfd, files, said):
    message = refused(re.escape(said), load_tokenizer, files)
    assert message.startswith(str(files))
    assert len(message) < 600
    assert capfd.readouterr() == ("", "")


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(content, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    "rules",
    [
        {"pre_tokenizer": split(r"(a+)+$")},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(r"(\d+)+z")]}},
        {"normalizer": replace("", Regex=r"(\w+\s?)*$")},
        {"decoder": replace("", Regex=r"(.*)*x$")},
        {"normalizer": {"type": "Sequence", "normalizers": [replace("a" * 1000, String="a")] * 4}},
    ],
)
def test_rules_that_run_away(capfd, files, rules):
    edit(files, **rules)
    unreadable(capfd, files, "tokenizer.json: its rules for splitting and replacing text need more than")


def test_rules_of_known_models(files):
    """Those of GPT-2 and of Llama 3."""
    for pattern in (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
    ):
        edit(files, pre_tokenizer=split(pattern))
        assert len(load_tokenizer(files)("a word")["input_ids"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 2**31}, "unk_token": "a"}}, "$.model.vocab"),
        ({"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}, "$.model.vocab"),
        ({"model": {"type": "WordLevel", "vocab": {"a": True}, "unk_token": "a"}}, "$.model.vocab"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "$.model.vocab"),
        ({"model": {"type": "BPE"}}, "`vocab`"),
        ({"model": None}, "$.model"),
        ({"added_tokens": [{"id": 2**31, "content": "a"}]}, "$.added_tokens[0].id"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}, "its tokenizer: cannot be read"),
        ({"normalizer": replace("b", String="")}, "its tokenizer: cannot be read"),  # a panic
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "its tokenizer: cannot be read"),
        ({"pre_tokenizer": split("(")}, "unmatched parenthesis"),
    ],
)
def test_contents_that_cannot_be(capfd, files, changes, said):
    edit(files, **changes)
    unreadable(capfd, files, said)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_no_json(capfd, files, name):
    for text in ("", "[]", "{", '{"a": ' * 2000, "\0", '{"a": "\\ud800"}', "\xff"):
        (files / name).write_bytes(text.encode("latin-1"))
        unreadable(capfd, files, name)


def test_no_files(capfd, files, tmp_path):
    """For a FIFO, the library would wait for a writer."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json")
    for name in names:
        copy = shutil.copytree(files, tmp_path / name)
        (copy / name).unlink(missing_ok=True)
        os.mkfifo(copy / name)
        unreadable(capfd, copy, f"{name}: is a FIFO")
        (copy / name).unlink()
        (copy / name).symlink_to("gone")
        unreadable(capfd, copy, f"{name}: is a link to gone, which does not exist")
    (tmp_path / "empty").mkdir()
    unreadable(capfd, tmp_path / "empty", "its tokenizer: cannot be read")


def test_too_large(capfd, files):
    with (files / "tokenizer.json").open("ab") as file:
        file.truncate(200_000_000)
    unreadable(capfd, files, "tokenizer.json: has 200,000,000 bytes")


def test_sentencepiece_files(capfd, goldens, tmp_path):
    files = shutil.copytree(goldens / "tokenizers/llava", tmp_path / "folder")
    (files / "tokenizer.json").unlink()
    for content in (b"garbage" * 1000, b"\n\x05\n\x01a\x15"):
        (files / "tokenizer.model").write_bytes(content)
        unreadable(capfd, files, "its tokenizer: cannot be read")
    (files / "tokenizer.model").write_bytes(b"")
    load_tokenizer(files)
    assert capfd.readouterr() == ("", "")


def test_a_text_longer_than_the_file_says(files, capfd, caplog):
    for length in (4, "many"):
        edit(files, "tokenizer_config.json", model_max_length=length)
        assert len(load_tokenizer(files)("a word " * 10)["input_ids"]) > 4
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_ids_of_added_tokens(files):
    for path in files.iterdir():
        path.unlink()
    assert added_tokens(files) == {}
    (files / "added_tokens.json").write_text('{"a": 1, "b": 2}')
    (files / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"3": {"content": "b"}}}')
    assert added_tokens(files) == {"a": 1, "b": 3}
    (files / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 4, "content": "b"}]}')
    assert added_tokens(files) == {"a": 1, "b": 4}
    (files / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": {"content": "b"}}}')
    refused(r"tokenizer_config\.json: .*added_tokens_decoder", added_tokens, files)
