"""Layers of unequal width at their true size in PyTorch (transformers 5 and 4.57), and heads padded with zeros."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from decoder_cases import DECODERS, PHI, PHI3
from hf_cases import LLAMA, LLAVA, keep_layers, keep_width, make_folder, random_ids
from rounding import assert_same_function, double_logits
from torch_compat import VERSIONS
from vlm_cases import internvl_config, make_vlm_folder

import vlmprune_jax as vp
from vlmprune_jax.io.exports.reload import check_export

CAUSAL, IMAGES = "AutoModelForCausalLM", "AutoModelForImageTextToText"
# Five heads of six do not divide hidden_size, and biases leave no way into Mistral's class.
BIASED = {**LLAMA, "num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True}
CONFIGS = {
    "llama": (LLAMA, CAUSAL),
    "llama-biased": (BIASED, CAUSAL),
    "phi": (PHI, CAUSAL),
    "phi3": (PHI3, CAUSAL),  # without its whole heads its config class refuses the nominal ones
    "llava": (LLAVA, IMAGES),
    "internvl-qwen3": (internvl_config("qwen3"), IMAGES),
}
QUICK = {"llama", "phi3"}
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS]


def narrow(model):
    """No layer is whole, no two neighbours are alike, and groups of several query heads become smaller in layer 1."""
    first = model.cfg.text.layers[0]
    heads, per_group = first.mixer.kv_heads, first.mixer.q_heads // first.mixer.kv_heads
    for i in range(len(model.cfg.text.layers)):
        kv_heads, neurons = range(max(1, heads - 1 - i % 2)), range(i, i + 38 + 6 * (i % 2))
        of_each_group = max(1, per_group - 1) if i == 1 else None
        model, _ = keep_width(model, kv_heads, neurons, only=[i], of_each_group=of_each_group)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Writes one model once; gives it, its folder, inputs, logits and greedy tokens."""
    done = {}

    def export(name):
        if name not in done:
            folder, config = tmp_path_factory.mktemp(name), CONFIGS[name][0]
            source = (make_vlm_folder if "vision_config" in config else make_folder)(folder / "source", config)
            model = narrow(vp.load(source))
            vp.save(model, folder / "out", source_dir=source, uneven="per_layer", dtype="float32")
            inputs = random_ids(model)
            tokens = vp.generate(model, max_new_tokens=6, eos_token_ids=(), **inputs)
            done[name] = model, folder / "out", inputs, np.asarray(vp.forward(model, **inputs)[0]), tokens
        return done[name]

    return export


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_torch_computes_the_same(exported, torch_outputs, tmp_path, name, version):
    """Logits, greedy tokens with a cache, and the folder that save_pretrained writes."""
    model, out, inputs, expected, tokens = exported(name)
    options = {"class_name": CONFIGS[name][1], "version": version, "trust_remote_code": True}
    found = torch_outputs(out, inputs, max_new_tokens=6, save_to=tmp_path / "saved", **options)
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(found["tokens"], tokens)
    again = torch_outputs(tmp_path / "saved", inputs, **options)
    np.testing.assert_array_equal(again["logits"], found["logits"])
    written, saved = (json.loads((folder / "config.json").read_text()) for folder in (out, tmp_path / "saved"))
    for field in ("architectures", "auto_map", "model_type"):
        assert saved[field] == written[field]
    reloaded = vp.load(tmp_path / "saved")
    assert reloaded.cfg.text.layers == model.cfg.text.layers
    np.testing.assert_allclose(vp.forward(reloaded, **inputs)[0], expected, atol=1e-6, rtol=0)
    if version == "5":
        assert check_export(model, out)["backend"] == "torch"


@pytest.mark.parametrize("uneven", ["per_layer", "pad"])
def test_an_even_folder_made_of_one_has_no_loader(exported, tmp_path, uneven):
    """Pruned on, or padded, it is a stock folder again."""
    _, out, *_ = exported("llama")
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
    source = (make_vlm_folder if "vision_config" in config else make_folder)(tmp_path / "source", config)
    model, _ = keep_width(vp.load(source, dtype="bfloat16"), [0, 2], range(3, 43), only=[1, 2])
    vp.save(model, tmp_path / "out", source_dir=source, uneven="pad", head_dim=48, dtype="bfloat16")
    padded = vp.load(tmp_path / "out")
    assert padded.cfg.text.attention.head_dim == 48
    wide, narrow = (dataclasses.replace(m, params=jax.tree.map(np.float32, m.params)) for m in (padded, model))
    inputs = random_ids(model)
    assert_same_function(double_logits(wide, **inputs), double_logits(narrow, **inputs))
    assert "6 query heads, 56 neurons, heads of 48 channels" in (tmp_path / "out/README.md").read_text()
    assert check_export(narrow, tmp_path / "out")["backend"] == "torch"
    with pytest.raises(vp.UserError, match=r"head_dim=24: expected 4 or 16 times the model's 12 channels"):
        vp.save(model, tmp_path / "no", source_dir=source, head_dim=24)


def test_heads_that_are_not_padded(tmp_path):
    model = vp.load(make_folder(tmp_path / "source", DECODERS["qwen3"]))
    with pytest.raises(vp.UserError, match="heads of qwen3 with this rotary embedding, norm or scale"):
        vp.save(model, tmp_path / "out", head_dim=64)
