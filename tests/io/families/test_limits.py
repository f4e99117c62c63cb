"""What loads where: the descriptions' word, plans that are held to it, and the mapping `vp.families`."""

import dataclasses
import importlib

import pytest
from decoder_cases import PHI, QWEN2, QWEN3
from hf_cases import LLAMA, keep_width, make_folder
from refusal import refused
from transformers import AutoModelForCausalLM
from vlm_cases import internvl_chat_config, make_vlm_folder

import vlmprune_jax as vp
from vlmprune_jax.core.limits import ENGINES, why_not
from vlmprune_jax.io.checkpoints.layout import make_slots
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.families import detect, family_of, target_of, template_of
from vlmprune_jax.io.families.limits import what_loads
from vlmprune_jax.io.families.table import FAMILIES, Conversion

# Heads that make up the hidden size, as engines that derive the size of one need it to begin with.
WHOLE = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 48}
MODELS = {
    "llama": {**LLAMA, "hidden_act": "silu", "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {**{k: v for k, v in QWEN2.items() if k != "head_dim"}, **WHOLE, "hidden_act": "silu"},
    "qwen3": {**QWEN3, "attention_bias": False, "hidden_act": "silu"},
    "phi": {**{k: v for k, v in PHI.items() if k != "head_dim"}, **WHOLE, "hidden_act": "gelu_new"},
}
HEADS = {
    "llama": tuple(ENGINES), "qwen2": ("transformers", "vllm_tpu", "openvino", "gguf"), "qwen3": tuple(ENGINES),
    "phi": ("transformers", "openvino"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    found = {name: make_folder(tmp_path_factory.mktemp("loads") / name, config) for name, config in MODELS.items()}
    return {name: (folder, vp.load(folder)) for name, folder in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_what_the_descriptions_say(models, name):
    _, model = models[name]
    found = {target: stacks["text"] for target, stacks in what_loads(model.cfg).items()}
    assert {target for target, kinds in found.items() if kinds["heads"] is None} == set(HEADS[name])
    for target, kinds in found.items():
        assert kinds["fewer layers"] is None
        assert kinds["neurons"] is None
        wide = target == "gguf" and name in ("llama", "qwen2")
        assert (kinds["unequal widths"] is None) == wide, target


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_fewer_heads(models, tmp_path, name):
    """In the stock class, without code of the folder's."""
    folder, model = models[name]
    pruned, _ = keep_width(model, range(1, model.cfg.text.layers[0].mixer.kv_heads), range(20))
    vp.save(pruned, tmp_path / "out", source_dir=folder, dtype="float32")
    assert not list((tmp_path / "out").glob("*.py"))
    stock, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["mismatched_keys"]
    assert not told["missing_keys"]
    assert sum(one.numel() for one in stock.parameters()) == vp.count_params(pruned.cfg)


def halved(layer):
    """The layer with half as many heads."""
    return layer.resized({"q_heads": layer.mixer.q_heads // 2, "kv_heads": layer.mixer.kv_heads // 2})


def test_plans_are_held_to_targets(models):
    _, model = models["qwen2"]
    scores = vp.score(model, [], criterion="l2")
    # attention that weighs nothing is what "auto" removes first
    values = {key: part * (key.axis == "mlp") for key, part in scores.values.items()}
    scores, (shape, *others) = dataclasses.replace(scores, values=values), model.cfg.text.layers
    fewer = model.cfg.with_layers([halved(shape)] * (1 + len(others)))
    ratio = 1.01 - vp.count_params(fewer) / vp.count_params(model.cfg)  # a group of every layer, and a few neurons

    def plan(**options):
        made = vp.make_plan(scores, model.cfg, method="width", **{"ratio": ratio, **options})
        return made.stacks["text"]

    full = shape.mixer.q_heads
    assert plan(heads="auto").sizes[0]["q_heads"] < full
    assert plan(heads="auto", loads_in=("transformers", "gguf")).sizes[0]["q_heads"] < full
    assert plan(heads="auto", loads_in=("vllm",)).sizes[0]["q_heads"] == full
    keep = r"loads_in='vllm'.*hidden_size / heads: use heads=\"keep\""
    refused(keep, plan, ratio=None, sparsity=0.5, heads="proportional", loads_in=("vllm",))
    pad = r"one width for all layers: .*uneven=\"pad\""
    refused(pad, plan, heads="keep", mlp_layers=(0, 2), loads_in=("transformers",))
    refused("'tgi' is not one of transformers, vllm, vllm_tpu, mlx, openvino, gguf", plan, loads_in=("tgi",))


@pytest.mark.parametrize(("family", "heads", "blocks"), [("qwen3_vl", True, False), ("qwen2_5_vl", False, True)])
def test_what_loads_of_models_whose_images_are_of_any_size(goldens, family, heads, blocks):
    """Fewer heads where the class takes their size from a field, and no block of a tower that feeds the decoder."""
    found = what_loads(read_config(goldens / "families" / family / "ckpt")[1])["transformers"]
    assert (found["text"]["heads"] is None) == heads
    assert (found["vision"]["fewer layers"] is None) == blocks


def test_what_serving_engines_compute_otherwise(goldens):
    """mlx-vlm takes Gemma 3's windows from the layer's number, and the size of LLaVA's heads from their number."""
    cfg = read_config(goldens / "families/gemma3/ckpt")[1]
    full, sliding = (
        dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, window=window))
        for layer, window in ((cfg.text.layers[0], None), (cfg.text.layers[0], 7))
    )
    layers = [full if i % 6 == 5 else sliding for i in range(12)]
    assert why_not(cfg.with_layers(layers), "mlx") is None
    assert why_not(cfg.with_layers(layers[:11]), "mlx") is None
    assert "every sixth layer of Gemma 3 full attention" in why_not(cfg.with_layers(layers[1:]), "mlx")
    assert why_not(cfg.with_layers(layers[1:]), "vllm") is None
    llava = read_config(goldens / "ckpt/llava_hf")[1]
    fewer = llava.with_layers([halved(layer) for layer in llava.text.layers])
    assert "head size of llama as hidden_size / heads" in why_not(fewer, "mlx")
    bunny = read_config(goldens / "ckpt/bunny", goldens / "ckpt/siglip_tower")[1]
    assert why_not(bunny, "mlx").startswith("mlx-vlm's LLaVA has no phi decoder")


def test_copies_of_gemma_4_are_those_that_its_class_holds(goldens):
    """The last layer stays, and shared layers stay twice as wide."""
    cfg = read_config(goldens / "families/gemma4/ckpt")[1]
    found = what_loads(cfg)
    for target in ("transformers", "vllm"):
        assert [found[target]["text"][kind] for kind in ("fewer layers", "neurons")] == [None, None]
    assert "last two layers with their own" in found["gguf"]["text"]["neurons"]
    assert "one width for all layers" in found["gguf"]["text"]["unequal widths"]  # llama.cpp has it, but no plan


# --- `vp.families`: what a user's family changes, and what is told where one is missing ------------------------------


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
