"""What loads where, plans and cuts that are held to it, configs that are refused, and the mapping `vp.families`."""

import dataclasses
import importlib
import json
import shutil

import numpy as np
import pytest
from decoder_cases import PHI, QWEN2, QWEN3
from hf_cases import LFM2_VL, LLAMA, keep_layers, keep_width, make_folder, make_vlm_folder
from prune_cases import layer_scores
from refusal import refused
from safetensors.numpy import load_file, save_file
from vlm_cases import gemma3_config, internvl_chat_config

import vlmprune_jax as vp
from vlmprune_jax.core.limits import ENGINES, why_not
from vlmprune_jax.core.prune.fingerprints import fingerprint
from vlmprune_jax.io.checkpoints.read import blocks_of, open_model, read_config
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
HEADS = {"qwen2": ("transformers", "vllm_tpu", "openvino", "gguf"), "phi": ("transformers", "openvino")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("loads")
    return {name: vp.load(make_folder(root / name, config)) for name, config in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_what_the_descriptions_say(models, name):
    found = {target: stacks["text"] for target, stacks in what_loads(models[name].cfg).items()}
    assert {target for target, kinds in found.items() if kinds["heads"] is None} == set(HEADS.get(name, ENGINES))
    for target, kinds in found.items():
        assert kinds["fewer layers"] is None
        assert kinds["neurons"] is None
        wide = target == "gguf" and name in ("llama", "qwen2")
        assert (kinds["unequal widths"] is None) == wide, target


def halved(layer):
    """The layer with half as many heads."""
    return layer.resized({"q_heads": layer.mixer.q_heads // 2, "kv_heads": layer.mixer.kv_heads // 2})


def test_plans_are_held_to_targets(models):
    model = models["qwen2"]
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


def test_copies_that_classes_hold(goldens):
    """Gemma 4's last layer stays, and shared layers stay twice as wide.

    Qwen-VL: fewer heads where the class has a field for their size, and no block of a tower that feeds the decoder.
    """
    for family, heads, blocks in (("qwen3_vl", True, False), ("qwen2_5_vl", False, True)):
        found = what_loads(read_config(goldens / "families" / family / "ckpt")[1])["transformers"]
        assert (found["text"]["heads"] is None) == heads
        assert (found["vision"]["fewer layers"] is None) == blocks
    found = what_loads(read_config(goldens / "families/gemma4/ckpt")[1])
    for target in ("transformers", "vllm"):
        assert [found[target]["text"][kind] for kind in ("fewer layers", "neurons")] == [None, None]
    assert "last two layers with their own" in found["gguf"]["text"]["neurons"]
    assert "one width for all layers" in found["gguf"]["text"]["unequal widths"]  # llama.cpp has it, but no plan


def test_heads_of_gemma_3_that_do_not_divide_the_width(tmp_path):
    config = gemma3_config()
    config["text_config"] |= {"hidden_size": 50, "num_attention_heads": 10, "num_key_value_heads": 5}
    model = vp.load(make_vlm_folder(tmp_path / "model", config))
    refused(r"refuses 8 heads.*keep 2/1", keep_width, model, range(4), range(56))
    assert keep_width(model, range(1), range(56))[0].cfg.text.layers[0].mixer.q_heads == 2


@pytest.fixture(scope="module")
def gemma(goldens):
    return vp.load(goldens / "families/gemma4/ckpt")


def test_depth_plans_are_legal(gemma):
    """Producers (2, 4) stay by default; the last layer, and one that makes keys for each type, stay always."""
    for gone, reason in ((2, "no layer with full attention has keys"), (8, "last layer of Gemma 4 must have full")):
        refused(reason, keep_layers, gemma, [i for i in range(9) if i != gone])
    scores = vp.Scores(criterion="by hand", fingerprint=fingerprint(gemma), values=layer_scores(np.arange(9.0)[::-1]))
    assert vp.make_plan(scores, gemma, method="depth", layers_removed=3).removed_layers == (5, 6, 7)
    moved = vp.make_plan(scores, gemma, method="depth", layers_removed=6, producers="redirect")
    assert moved.removed_layers == (1, 3, 4, 5, 6, 7)
    refused("between 0 and 6", vp.make_plan, scores, gemma, method="depth", layers_removed=7)


def test_a_cut_writes_one_config_for_every_version(gemma, tmp_path):
    shorter, _ = keep_layers(gemma, [0, 1, 2, 3, 5, 7, 8])
    # layers that share keys and values are twice as wide, which zeros need not make equal
    vp.save(shorter, tmp_path / "out", dtype="float32", uneven="pad", max_image_tokens=140)
    config = json.loads((tmp_path / "out/config.json").read_text())
    text = config["text_config"]
    assert config["vision_config"]["default_output_length"] == 140  # vLLM counts the tokens of an image by it
    assert "per_layer_config" not in text
    assert (text["num_kv_shared_layers"], text["global_head_dim"], len(text["layer_types"])) == (3, 20, 7)
    assert vp.load(tmp_path / "out").cfg == shorter.cfg


def test_double_wide_layers_stay_twice_as_wide(gemma):
    scores = vp.score(gemma, criterion="l2")
    pruned = vp.apply_plan(gemma, vp.make_plan(scores, gemma, method="width", ratio=0.07))
    widths = {shape.mixer.source is not None: shape.channel.mlp for shape in pruned.cfg.text.layers}
    assert widths[True] == 2 * widths[False] < 112
    assert pruned.cfg.text.uniform


def test_large_tables_are_cut_in_parts(gemma, goldens, tmp_path, monkeypatch):
    """The per-layer table by layers and by tokens, in files: the same bytes as in memory."""
    pruned, plan = keep_layers(gemma, [0, 1, 2, 3, 4, 5, 7, 8])
    kept, folder = tuple(range(0, 422, 2)), goldens / "families/gemma4/ckpt"
    monkeypatch.setattr("vlmprune_jax.io.checkpoints.read.BLOCK", 4000)
    vp.save(pruned, tmp_path / "memory", dtype="float32", plan=plan)
    vp.prune_folder(folder, plan, tmp_path / "files")
    memory, files = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "files"))
    assert memory == files
    lazy = open_model(folder).params["text"]["extra_inputs"]["table"]["weight"]
    rows = lazy.take(np.asarray(kept), axis=0).take(np.asarray([1, 4]), axis=1)
    whole = np.asarray(gemma.params["text"]["extra_inputs"]["table"]["weight"])
    blocks = np.concatenate([block.copy() for block in blocks_of([rows], as_stored=True)])
    np.testing.assert_array_equal(blocks, whole[list(kept)][:, [1, 4]])


# --- configs and files of families that are refused in one line -------------------------------------------------------

# family, section of config.json, fields that change in it, fact
CONFIGS = [
    ("qwen3_5", "text_config", {"layer_types": ["full_attention"] * 4}, "_layers is 5 but layer_types lists 4 layers"),
    ("qwen3_5", "text_config", {"layer_types": ["mamba"] * 5}, r"layer_types \['mamba'\] are not supported"),
    ("qwen3_5", "text_config", {"layer_types": ["linear_attention"] * 5}, "layer_types has no full_attention"),
    ("qwen3_5", "text_config", {"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported \(delta nets: silu\)"),
    ("qwen3_5", "text_config", {"linear_num_value_heads": 7}, "7 delta-net heads are not divisible by 3 delta-net g"),
    ("lfm2_vl", "text_config", {"full_attn_idxs": []}, "layer_types has no full_attention"),
    ("lfm2_vl", "text_config", {"conv_bias": True}, "conv_bias true is not supported"),
    ("lfm2_vl", "text_config", {"norm_eps": float("inf")}, "text_config.norm_eps is inf, expected a number"),
    ("lfm2_vl", "text_config", {"block_multiple_of": 0}, "block_multiple_of is 0, expected a whole number above 0"),
    ("lfm2_vl", None, {"projector_hidden_size": -1}, "projector_hidden_size is -1, expected a whole number above"),
    ("smolvlm", None, {"scale_factor": 3}, "are not divisible by the downsampling factor 3"),
    ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [0, 4]}, r"\[0, 4\] must be ascending .* 0 to 3"),
    ("qwen3_vl", "text_config", {"num_hidden_layers": 1}, "has 1 layers, but the vision tower has features"),
    ("qwen3_vl", "vision_config", {"num_position_embeddings": 24}, "24 is not the square"),
    ("qwen3_vl", "vision_config", {"out_hidden_size": 40}, r"40 must be the decoder's hidden_size \(44\)"),
    ("qwen3_vl", "vision_config", {"num_heads": 16}, "head_dim 2 must be a multiple of 4"),
    ("qwen3_vl", "text_config", {"rope_parameters": {"mrope_section": [5, 3, 3]}}, "must .* sum to 10"),
    ("qwen2_5_vl", "vision_config", {"window_size": 9}, "window_size 9 must be at least"),
    ("qwen2_5_vl", "vision_config", {"fullatt_block_indexes": [1, 7]}, r"\[1, 7\] must be layer numbers .* 0 to 3"),
    ("qwen2_5_vl", "text_config", {"rope_parameters": {"type": "yarn", "mrope_section": [1, 2, 3]}}, "yarn rope"),
    ("gemma4", "text_config", {"per_layer_config": {"1": {"head_dim": 20}}}, "out of date.*layer 1"),
    ("gemma4", "text_config", {"per_layer_config": {"9": {}}}, "out of date.*layers that do not exist"),
    ("gemma4_moe", "text_config", {"use_double_wide_mlp": True}, "use_double_wide_mlp is not supported with experts"),
    ("qwen3_vl_moe", "text_config", {"num_experts": 6}, r"layers\.0\.\S+ has shape \[8, .*\], config\.json says \[6, "),
    ("qwen3_vl_moe", "text_config", {"num_experts": 1}, "has 1 experts, but every token uses 2: keep at least 2"),
    ("qwen3_vl_moe", "text_config", {"num_local_experts": 6}, "num_experts is 8 but num_local_experts is 6"),
    ("qwen3_vl_moe", "text_config", {"num_experts": 10**9}, "num_experts is 1000000000, expected .* 1 to 4096"),
    ("qwen3_vl_moe", "text_config", {"moe_intermediate_size": 14}, r"has shape \[8, 28, 24\]"),
    ("gemma4_moe", "text_config", {"num_experts": None}, "num_experts is missing: set num_experts"),
    ("internvl_moe", "text_config", {"num_experts": 8}, r"missing key \S+layers\.0\.mlp\.experts\.7\.gate_proj"),
    ("internvl_moe", "text_config", {"num_experts": 6}, r"unknown key \S+experts\.6"),
    ("internvl_moe", "text_config", {"num_experts": 4096, "num_hidden_layers": 1000, "layer_types": None},
     "1000 layers have 4,096 experts each, more than any model .131,072 in all.: correct"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "section", "changes", "fact"), CONFIGS)
def test_configs(goldens, tmp_path, family, section, changes, fact):
    if family == "lfm2_vl":
        folder = make_folder(tmp_path / "model", LFM2_VL)
    else:
        folder = shutil.copytree(goldens / "families" / family / "ckpt", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    inner = config if section is None else config[section]
    inner |= {k: {**inner[k], **v} if k == "per_layer_config" else v for k, v in changes.items()}
    (folder / "config.json").write_text(json.dumps(config))
    refused(fact, vp.load, folder)


def test_tensors_of_experts(goldens, tmp_path):
    folder = shutil.copytree(goldens / "families/qwen3_vl_moe/ckpt", tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    for end, edit, fact in (
        ("down_proj", lambda x: x[:7], r"layers\.2\.\S+down_proj has shape \[7, 12, 28\]"),
        ("up_proj", lambda x: np.where(x == x[5, 3, 2], np.nan, x), r"layers\.2\.\S+gate_up_proj\[5\] has 1 NaN"),
    ):
        (key,) = (key for key in whole if "layers.2." in key and "experts" in key and key.endswith(end))
        save_file({**whole, key: edit(whole[key]).astype(whole[key].dtype)}, folder / "model.safetensors")
        refused(fact, vp.load, folder)


PATCHES = "returns patches of {} values, {} per side of a token"


@pytest.mark.parametrize(
    ("family", "video", "fact"),
    [
        ("qwen3_vl", {"patch_size": 8}, PATCHES.format(384, 2) + ", but .* takes patches of 96"),
        ("qwen3_vl", {"merge_size": 4}, PATCHES.format(96, 4) + ", but the vision tower"),
        ("qwen3_vl", {"do_sample_frames": False}, "processor_config.json: do_sample_frames false .* is not supported"),
        ("gemma4", {"pooling_kernel_size": 2}, PATCHES.format(12, 2)),
        ("gemma4", {"max_soft_tokens": 71}, "max_soft_tokens 71 is not one of 70, 140, 280, 560, 1120: restore"),
        ("smolvlm", {"max_image_size": {"longest_edge": 48}}, "returns 48 x 48 pixels, but .* takes 24 x 24"),
        ("qwen2_5_vl", {"min_pixels": 2**27, "max_pixels": 2**27}, "a quarter of data.max_video_pixels=500,000,000"),
    ],
)
def test_video_processors(goldens, tmp_path, family, video, fact):
    """Settings of the file that stock reads are read, and refused with the tower's size or before a frame is made."""
    golden = goldens / "video" / family
    folder = shutil.copytree(golden / "ckpt", tmp_path / "model")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["video_processor"] |= video
    (folder / "processor_config.json").write_text(json.dumps(settings))
    case = json.loads((golden / "golden.json").read_text())["cases"]["single"]
    refused(fact, vp.batches, folder, [case["record"]], images=goldens / "video/clips", **case["setting"])


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


def test_a_family_is_added_and_another_gone(models):
    """A later family takes the folder."""
    mine = dataclasses.replace(FAMILIES["llama"], name="mine", matches=lambda config: config["hidden_size"] == 48)
    FAMILIES["mine"] = mine
    assert detect(LLAMA, "config.json").name == "mine"
    assert detect({**LLAMA, "hidden_size": 24}, "config.json").name == "llama"
    del FAMILIES["llama"], FAMILIES["mine"]
    refused(r"unknown family 'llama' in transformers layout .* import the file", family_of, models["llama"].cfg)
    refused(r"known: llava, .*mistral", detect, LLAMA, "config.json")


@pytest.mark.parametrize(
    ("to", "fact"),
    [
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
