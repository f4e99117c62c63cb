"""Exported folders loaded again, in stock transformers on torch (5 and 4.57): the support matrix, and check_export.

The matrix is (family, source layout) x target layout x (depth, width, uneven kept | padded). A folder that transformers
can load, by a stock class or by the shipped file, is loaded in torch with both versions: the same logits within 1e-4.
A hub layout written back (target "source") needs the hub's own code, which is not ours to run: it is reloaded in JAX.
"""

import dataclasses
import io
import json
import logging
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import transformers
from decoder_cases import MISTRAL, PHI, PHI3, QWEN2, QWEN3
from hf_cases import (
    LFM2_VL,
    LLAMA,
    LLAVA,
    edit_weights,
    keep_layers,
    keep_width,
    make_folder,
    make_vlm_folder,
    random_ids,
    unequal,
)  # fmt: skip
from refusal import refused
from rounding import assert_same_function, double_logits
from torch_compat import VERSIONS
from vlm_cases import (
    TEXTS,
    TOWERS,
    gemma3_config,
    internvl_chat_config,
    internvl_config,
    llava_config,
    qwen_vl_config,
    smolvlm_config,
)

import vlmprune_jax as vp
from vlmprune_jax.io.exports import reload
from vlmprune_jax.io.exports.reload import check_export
from vlmprune_jax.io.families import detect

CAUSAL, IMAGES = "AutoModelForCausalLM", "AutoModelForImageTextToText"
GOLDEN = {"llava_orig": "clip_tower", "bunny": "siglip_tower", "internvl": None}
NATIVE = {
    **{"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "phi": PHI, "phi3": PHI3},
    **{f"llava-{tower}-{text}": llava_config(text, tower) for tower in TOWERS for text in TEXTS},
    **{f"internvl-{text}": internvl_config(text) for text in ("llama", "qwen2", "qwen3", "phi3")},
    "smolvlm-llama": smolvlm_config("llama"),
    "gemma3": gemma3_config(),
    **{name: qwen_vl_config(name) for name in ("qwen3_vl", "qwen2_5_vl")},
}
# The chat layout with pixel shuffle v2, the only one that transformers has, and a decoder that is not Phi-3.
CHAT = {f"internvl_chat-{t}": internvl_chat_config(t) | {"ps_version": "v2"} for t in ("llama", "qwen2")}
for _config in CHAT.values():
    _config["force_image_size"] = _config["vision_config"]["image_size"]


def fewer_heads(model):
    """All layers lose the same heads and neurons; neurons alone where the class has no other size of a head."""
    heads = model.cfg.text.layers[0].mixer.kv_heads
    return keep_width(model, range(0 if model.cfg.text.whole_heads else 1, heads), range(3, 51))[0]


MODES = {
    "depth": (lambda model: keep_layers(model, [0, 2])[0], "refuse"),
    "width": (fewer_heads, "refuse"),
    "per_layer": (unequal, "per_layer"),
    "pad": (unequal, "pad"),
}
CELLS = [
    *((name, "transformers", mode) for name in (*NATIVE, *GOLDEN, *CHAT) for mode in MODES),
    *((name, "source", mode) for name in (*GOLDEN, *CHAT) for mode in MODES),
]
QUICK = {("bunny", "transformers", "width"), *(("phi3", "transformers", mode) for mode in MODES)}


@pytest.fixture(scope="module")
def sources(goldens, tmp_path_factory):
    """Callable name -> (folder, model), made once."""
    made = {}

    def source(name):
        if name not in made:
            if name in GOLDEN:
                folder, tower = goldens / "ckpt" / name, GOLDEN[name] and goldens / "ckpt" / GOLDEN[name]
            else:
                config, tower = {**NATIVE, **CHAT}[name], None
                make = make_vlm_folder if "vision_config" in config else make_folder
                folder = make(tmp_path_factory.mktemp("source") / name, config)
            made[name] = folder, tower, vp.load(folder, vision_dir=tower)
        return made[name]

    return source


@pytest.mark.parametrize(
    ("name", "target", "mode"),
    [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow, id="-".join(c)) for c in CELLS],
)
def test_cell(sources, torch_outputs, tmp_path, name, target, mode):
    """Of a folder that was converted, greedy tokens too."""
    (source, tower, model), out, (prune, policy) = sources(name), tmp_path / "out", MODES[mode]
    pruned = prune(model)
    vp.save(pruned, out, source_dir=source, layout=target, uneven=policy, dtype="float32")
    inputs = random_ids(pruned)
    if target == "source":
        again = vp.load(out, vision_dir=tower)
        assert_same_function(double_logits(again, **inputs), double_logits(pruned, **inputs))
        return
    ships, config = (out / "modeling_per_layer.py").is_file(), json.loads((out / "config.json").read_text())
    assert ships == (mode == "per_layer")
    expected, count = np.asarray(vp.forward(pruned, **inputs)[0]), 6 if name not in NATIVE else None
    tokens = vp.generate(pruned, max_new_tokens=count, eos_token_ids=(), **inputs) if count else None
    image = config.get("image_token_id", config.get("image_token_index"))
    if image is not None:
        ids = inputs["input_ids"]
        inputs = inputs | {"input_ids": np.where(ids == pruned.cfg.image_token_id, image, ids)}
    if pruned.cfg.text.sees_images:
        inputs = inputs | {"token_type_ids": (inputs["input_ids"] == image).astype(int)}
    by_row = detect(config, "matrix").stock.by_row
    if by_row:
        inputs = inputs | {"pixel_values": inputs["pixel_values"][:, None]}
    for version in VERSIONS:
        if by_row and version == "4.57":  # takes the wrong positions for an image in float32: texts alone
            inputs = {"input_ids": inputs["input_ids"][:, -17:]}
            expected = np.asarray(vp.forward(pruned, **inputs)[0])
        options = {"class_name": CAUSAL if image is None else IMAGES, "trust_remote_code": ships}
        found = torch_outputs(out, inputs, version=version, max_new_tokens=count, **options)
        logits = found["logits"][..., : expected.shape[-1]]
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0, err_msg=version)
        # new words never win: their rows are the mean of all
        np.testing.assert_array_equal(found["logits"].argmax(-1), logits.argmax(-1))
        if count:
            np.testing.assert_array_equal(found["tokens"], tokens)


def test_every_family_is_in_the_matrix(goldens):
    configs = [*NATIVE.values(), *CHAT.values()]
    configs += [json.loads((goldens / "ckpt" / name / "config.json").read_text()) for name in GOLDEN]
    # classes that hold no unequal layers: tests/families
    for name in ("gemma4", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe", "internvl_moe"):
        configs.append(json.loads((goldens / "families" / name / "ckpt/config.json").read_text()))
    configs.append(configs[-1]["text_config"])  # Qwen3-MoE alone
    configs += [LFM2_VL, LFM2_VL["text_config"]]
    assert {detect(config, "matrix") for config in configs} == set(vp.families.values())


def saved(folder, config, dtype="float32", kept=(0, 3)):
    """A model with these layers, and its folder."""
    source = make_folder(folder / "source", config)
    model, _ = keep_layers(vp.load(source), kept)
    vp.save(model, folder / "out", source_dir=source, dtype=dtype)
    return model, folder / "out"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("config", "auto", "dtype"),
    [
        ({**LLAMA, "num_key_value_heads": 6}, CAUSAL, "float32"),
        ({**LLAVA, "text_config": {**LLAVA["text_config"], "num_key_value_heads": 6}}, IMAGES, "bfloat16"),
    ],
    ids=["llama", "llava"],
)
def test_heads_that_do_not_divide(torch_outputs, tmp_path, monkeypatch, config, auto, dtype, version):
    """In several shards; Mistral's class takes 5 of 6 heads. Others: above and below."""
    monkeypatch.setattr("vlmprune_jax.io.exports.folder.MAX_SHARD_BYTES", 30_000)
    source, out = make_folder(tmp_path / "source", config), tmp_path / "out"
    model, plan = keep_width(vp.load(source), [0, 1, 3, 4, 5], range(0, 56, 2))
    vp.save(model, out, source_dir=source, plan=plan, dtype=dtype)
    assert len(list(out.glob("*.safetensors"))) > 2
    config = json.loads((out / "config.json").read_text())
    assert config.get("text_config", config)["model_type"] == "mistral"
    inputs = random_ids(model)
    model = vp.load(out) if dtype == "bfloat16" else model  # whose rounding torch sees as well
    found = torch_outputs(out, inputs, class_name=auto, version=version)
    np.testing.assert_allclose(vp.forward(model, **inputs)[0], found["logits"], atol=1e-4, rtol=0)


# Unequal layers at their true size, and heads padded with zeros -------------------------------------------------------

# Five heads of six do not divide hidden_size, and biases leave no way into Mistral's class.
BIASED = {**LLAMA, "num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True}
UNEQUAL = {
    "llama": (LLAMA, CAUSAL),
    "phi3": (PHI3, CAUSAL),  # without its whole heads its config class refuses the nominal ones
    "llama-biased": (BIASED, CAUSAL),
    "llava": (LLAVA, IMAGES),
}
NAMES = [pytest.param(name, marks=() if name in ("llama", "phi3") else pytest.mark.slow) for name in UNEQUAL]


@pytest.mark.parametrize("name", NAMES)
def test_torch_computes_the_same(torch_outputs, tmp_path, name):
    """Logits, greedy tokens with a cache, and the folder that save_pretrained writes."""
    source, out = make_folder(tmp_path / "source", UNEQUAL[name][0]), tmp_path / "out"
    model = unequal(vp.load(source))
    vp.save(model, out, source_dir=source, uneven="per_layer", dtype="float32")
    inputs, folder = random_ids(model), tmp_path / "saved"
    expected = np.asarray(vp.forward(model, **inputs)[0])
    tokens = vp.generate(model, max_new_tokens=6, eos_token_ids=(), **inputs)
    for version in VERSIONS:
        options = {"class_name": UNEQUAL[name][1], "version": version, "trust_remote_code": True}
        found = torch_outputs(out, inputs, max_new_tokens=6, save_to=folder, **options)
        np.testing.assert_allclose(found["logits"], expected, atol=1e-4, rtol=0)
        np.testing.assert_array_equal(found["tokens"], tokens)
        again = torch_outputs(folder, inputs, **options)
        np.testing.assert_array_equal(again["logits"], found["logits"])
        written, again = (json.loads((one / "config.json").read_text()) for one in (out, folder))
        for field in ("architectures", "auto_map", "model_type"):
            assert again[field] == written[field]
        reloaded = vp.load(folder)
        assert reloaded.cfg.text.layers == model.cfg.text.layers
        np.testing.assert_allclose(vp.forward(reloaded, **inputs)[0], expected, atol=1e-6, rtol=0)
        shutil.rmtree(folder)
    assert check_export(model, out)["backend"] == "torch"


@pytest.mark.parametrize("uneven", ["per_layer", "pad"])
def test_an_even_folder_made_of_one_has_no_loader(tmp_path, uneven):
    """Pruned on, or padded, it is a stock folder again."""
    source, out = make_folder(tmp_path / "source", LLAMA), tmp_path / "out"
    vp.save(unequal(vp.load(source)), out, source_dir=source, uneven="per_layer", dtype="float32")
    model = vp.load(out)
    if uneven == "per_layer":
        model, _ = keep_layers(model, [0, 2])  # these two are alike in heads and neurons
    vp.save(model, tmp_path / "even", source_dir=out, uneven=uneven, dtype="float32")
    config = json.loads((tmp_path / "even/config.json").read_text())
    assert not {"auto_map", "per_layer_shapes"} & set(config)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not (tmp_path / "even/modeling_per_layer.py").exists()
    assert check_export(model, tmp_path / "even")["backend"] == "torch"


@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_padded_channels_of_heads_are_the_same_function(tmp_path, kind):
    """Unequal layers as well, with biases, in a language model and in a LLaVA; bfloat16 rounds nothing."""
    scaled = {"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"original_max_position_embeddings": 32}
    changes = {"attention_bias": True, "rope_scaling": scaled if kind == "llama3" else None, "torch_dtype": "bfloat16"}
    config = {**LLAVA, "text_config": LLAVA["text_config"] | changes} if kind == "default" else {**LLAMA, **changes}
    source = make_folder(tmp_path / "source", config)
    model, _ = keep_width(vp.load(source, dtype="bfloat16"), [0, 2], range(3, 43), only=[1, 2])
    vp.save(model, tmp_path / "out", source_dir=source, uneven="pad", head_dim=48, dtype="bfloat16")
    padded = vp.load(tmp_path / "out")
    assert padded.cfg.text.attention.head_dim == 48
    wide, narrow = (dataclasses.replace(m, params=jax.tree.map(np.float32, m.params)) for m in (padded, model))
    inputs = random_ids(model)
    assert_same_function(double_logits(wide, **inputs), double_logits(narrow, **inputs))
    assert "6 query heads, 56 neurons, heads of 48 channels" in (tmp_path / "out/README.md").read_text()
    assert check_export(narrow, tmp_path / "out")["backend"] == "torch"
    fact = "head_dim=24: expected 4 or 16 times the model's 12 channels"
    refused(fact, vp.save, model, tmp_path / "no", source_dir=source, head_dim=24)
    model = vp.load(make_folder(tmp_path / "qwen3", QWEN3))
    refused("heads of qwen3 with this rotary embedding, norm or scale", vp.save, model, tmp_path / "no", head_dim=64)


# check_export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("torch_is_there", [True, False])
def test_check_export(tmp_path, monkeypatch, dtype, torch_is_there):
    """It passes, and notices a wrong weight."""
    if not torch_is_there:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model, out = saved(tmp_path, LLAVA, dtype)
    report = check_export(model, out)
    assert report["backend"] == ("torch" if torch_is_there else "jax")
    assert report["tolerance"] == 1e-4
    assert report["max_abs_logit_difference"] <= 1e-4
    key = "multi_modal_projector.linear_2.bias"
    edit_weights(out, lambda tensors: tensors[key].__setitem__(3, tensors[key][3] + 0.01))
    refused("logits differ from the model's by", check_export, model, out)


@pytest.mark.parametrize("torch_is_there", [True, False])
def test_check_export_knows_what_rounding_alone_does(tmp_path, monkeypatch, torch_is_there):
    """Where the tolerance is too narrow for a model, its own response to changed last bits decides."""
    model, out = saved(tmp_path, LLAMA, kept=range(4))
    monkeypatch.setattr(reload, "torch_loads", lambda *_: torch_is_there)
    model = vp.Model(jax.tree.map(lambda leaf: leaf * (1 + 2**-23), model.params), model.cfg)
    usual = reload.TOLERANCE
    for name in ("TOLERANCE", "RELATIVE_TOLERANCE"):
        monkeypatch.setattr(reload, name, 1e-12)
    assert 0 < check_export(model, out)["max_abs_logit_difference"] < usual  # processors differ: 1e-6 to 1.3e-5
    monkeypatch.setattr(reload, "_ROUNDINGS", 0)
    refused("logits differ from the model's by", check_export, model, out)


def test_check_export_notices_what_transformers_would_initialise(tmp_path):
    model, out = saved(tmp_path, LLAVA, kept=range(4))
    name = "vision_tower.vision_model.post_layernorm.bias"
    edit_weights(out, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    refused(r"missing_keys: .*post_layernorm\.bias", check_export, model, out)


def test_check_export_is_silent_about_slow_kernels(goldens):
    """Qwen3.5 has layers with kernels in other packages; the check needs none of them."""
    folder, lines, logger = goldens / "families/qwen3_5/ckpt", io.StringIO(), transformers.utils.logging.get_logger()
    handler = logging.StreamHandler(lines)
    transformers.utils.logging.warning_once.cache_clear()  # each is shown once per process
    logger.addHandler(handler)
    try:
        assert check_export(vp.load(folder), folder)["backend"] == "torch"
    finally:
        logger.removeHandler(handler)
    assert not lines.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "tower", "wrong"),
    [
        ("llava_orig", "clip_tower", "model.norm.weight"),
        ("bunny", "siglip_tower", "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight"),
    ],
)
def test_check_export_of_the_hub_layouts(goldens, tmp_path, name, tower, wrong, dtype):
    """The tower's own folder is float32, as on the hub, whatever dtype the model is loaded and written in."""
    tower, source = goldens / "ckpt" / tower, goldens / "ckpt" / name
    model, _ = keep_layers(vp.load(source, vision_dir=tower, dtype=dtype), [0, 1, 4])
    vp.save(model, tmp_path / "out", source_dir=source, dtype=dtype)
    report = check_export(model, tmp_path / "out", vision_dir=tower)
    assert report["backend"] == "jax"
    assert report["max_abs_logit_difference"] <= 1e-6
    edit_weights(tmp_path / "out", lambda tensors: tensors.update({wrong: tensors[wrong] * 2}))
    refused("logits differ from the model's by", check_export, model, tmp_path / "out", vision_dir=tower)


def test_torch_is_only_imported_to_check(tmp_path):
    """Reading, writing and computing leave torch alone, so that it can be missing."""
    _, out = saved(tmp_path, LLAVA)
    code = (
        "import sys; import vlmprune_jax.io.exports.reload; from vlmprune_jax import load, save\n"
        f"save(load({str(out)!r}), {str(out) + '2'!r}, source_dir={str(out)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
