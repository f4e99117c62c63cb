"""`vp.families`: what is there, what a user's family changes, and what is told where one is missing."""

import dataclasses
import importlib

import pytest
from hf_cases import LLAMA, make_folder
from refusal import refused
from vlm_cases import internvl_chat_config, make_vlm_folder

import vlmprune_jax as vp
from vlmprune_jax.io.checkpoints.layout import make_slots
from vlmprune_jax.io.families import detect, family_of, target_of, template_of
from vlmprune_jax.io.families.table import FAMILIES, Conversion


@pytest.fixture(autouse=True)
def _as_before():
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def test_the_mapping_is_public():
    """Although the package's folder of that name is imported as well."""
    importlib.import_module("vlmprune_jax.io.families.llava")
    assert vp.families is FAMILIES
    assert all(key in (family.name, f"{family.name}-original") for key, family in FAMILIES.items())
    assert len({(family.name, family.layout) for family in FAMILIES.values()}) == len(FAMILIES)
    for family in FAMILIES.values():
        assert (family.layout == "transformers") == (family.stock is not None), family.name
        assert target_of(family) is None or target_of(family).layout == "transformers"


def test_mergers_follow_the_config():
    section = {"hidden_size": 32, "num_hidden_layers": 33, "num_attention_heads": 2, "num_key_value_heads": 2}
    tower = {"depth": 33, "deepstack_visual_indexes": [*range(33)], "out_hidden_size": 32}
    family = FAMILIES["qwen3_vl"]
    slots = make_slots(family.from_hf({"text_config": section, "vision_config": tower}, None), family)
    assert {slot.key.split(".")[3] for slot in slots if "deepstack" in slot.key} == {*map(str, range(33))}


def test_a_later_family_takes_the_folder(tmp_path):
    FAMILIES["mine"] = dataclasses.replace(
        FAMILIES["llama"], name="mine", matches=lambda config: config["hidden_size"] == LLAMA["hidden_size"]
    )
    assert detect(LLAMA, "config.json").name == "mine"
    assert detect({**LLAMA, "hidden_size": 24}, "config.json").name == "llama"


def test_a_decoder_that_is_gone(tmp_path):
    model = vp.load(make_folder(tmp_path / "llama", LLAMA))
    del FAMILIES["llama"]
    refused(r"unknown family 'llama' in transformers layout .* import the file", family_of, model.cfg)
    refused(r"known: llava, .*mistral", vp.load, tmp_path / "llama")


@pytest.mark.parametrize(
    ("to", "fact"),
    [
        ("nothing", "internvl: conversion.to='nothing' names a layout .*use one of llava, internvl"),
        ("llama", "internvl: conversion.to='llama' names a layout .*use one of llava, internvl"),
        ("llava", r'internvl class does not support pixel shuffle: use layout "source"'),  # what `Stock.lacks` says
    ],
)
def test_a_conversion_to_what_does_not_take_the_model(tmp_path, to, fact):
    model = vp.load(make_vlm_folder(tmp_path / "chat", internvl_chat_config("qwen2") | {"force_image_size": 24}))
    conversion = Conversion(to=to, new_token="<image>", marks_images=to == "llava")
    FAMILIES["internvl-original"] = dataclasses.replace(FAMILIES["internvl-original"], conversion=conversion)
    options = {"source_dir": tmp_path / "chat", "layout": "transformers"}
    refused(fact, vp.save, model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_whose_a_converted_model_is():
    """The end of its texts tells; a template that config.json names comes first."""
    names = {end: template_of(FAMILIES["llava"], {}, end).name for end in ("</s>", "<|endoftext|>", "<other>", None)}
    assert names == {"</s>": "llava_v1", "<|endoftext|>": "bunny", "<other>": "llava_v1", None: "llava_v1"}
    assert template_of(FAMILIES["internvl"], {"template": "Hermes-2"}, "<|end|>").name == "Hermes-2"
    assert template_of(FAMILIES["qwen2"], {"template": "Hermes-2"}, "</s>").name == "llava_v1"
