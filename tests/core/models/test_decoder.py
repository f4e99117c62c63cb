"""Every decoder against stock transformers on torch: logits, generation, round trips and pruned exports."""

import json

import numpy as np
import pytest
from decoder_cases import LONGROPE, MISTRAL, PHI, PHI3, QWEN2, QWEN3, V5_PHI, V5_PHI3
from hf_cases import LLAMA, assert_same_tensors, edit_weights, keep_layers, keep_width, make_folder
from refusal import refused
from torch_compat import VERSIONS

from vlmprune_jax.core.models.generate import generate
from vlmprune_jax.core.models.vlm import forward
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.exports.reload import check_export
from vlmprune_jax.io.exports.write import save

STOCK = "AutoModelForCausalLM"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
OF_LLAMA = {
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "yarn_options": {"rope_scaling": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "no_window": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
    # transformers 5 writes theta and scaling into one field
    "v5_llama3": {"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 700.0}},
}
# Phi-4-mini: 3/4 of the channels are rotated. 8 of 12 here, which 4 factors fit.
PARTIAL = {name: factors[:4] for name, factors in LONGROPE["rope_scaling"].items() if name != "type"}
OPTIONS = {
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen2_tied": {**QWEN2, "tie_word_embeddings": True, "use_sliding_window": False},
    "qwen2_layer_types": {**QWEN2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3": QWEN3,
    "qwen3_windows": {**QWEN3, "attention_bias": False, "use_sliding_window": True, "sliding_window": 5,
                      "max_window_layers": 3},
    "phi": PHI,
    "phi_head_dim": {**PHI, "head_dim": 8, "num_key_value_heads": None, "partial_rotary_factor": None},
    "phi3": {**PHI3, **LONGROPE},
    "phi3_plain": {key: value for key, value in PHI3.items() if key not in ("rope_scaling", "sliding_window")},
    "phi4": {**PHI3, "partial_rotary_factor": 0.7, "rope_scaling": {"type": "longrope", **PARTIAL}},
    "v5_phi": V5_PHI,
    "v5_phi3": V5_PHI3,
    "phi3_su": PHI3,
} | {name: {**LLAMA, **changes} for name, changes in OF_LLAMA.items()}  # fmt: skip
ONLY = {"phi3_su": ("4.57",)} | {name: ("5",) for name in OPTIONS if name.startswith("v5")}


@pytest.mark.parametrize("name", OPTIONS)
def test_logits(tmp_path, torch_outputs, name):
    """Of a folder that was read and written again, bitwise the same."""
    config = {key: value for key, value in OPTIONS[name].items() if value is not None or key == "sliding_window"}
    source, folder = make_folder(tmp_path / name, config), tmp_path / "out"
    model = load(source)
    save(model, folder, source_dir=source, dtype="source")
    assert_same_tensors(source, folder)
    assert load(folder).cfg == model.cfg
    assert json.loads((folder / "config.json").read_text())["a_field_of_the_future"] == {"kept": True}
    ids = np.random.default_rng(0).integers(6, 97, (2, 45))
    mask = np.ones_like(ids)
    mask[1, 30:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    logits, _ = forward(model, **inputs)
    for version in ONLY.get(name, VERSIONS):
        found = torch_outputs(folder, inputs, class_name=STOCK, version=version)["logits"]
        np.testing.assert_allclose(logits[mask == 1], found[mask == 1], atol=1e-4, rtol=0, err_msg=version)


@pytest.mark.parametrize("length", [32, 33])
def test_longrope_changes_its_factors_at_the_original_length(tmp_path, torch_outputs, length):
    folder = make_folder(tmp_path / "phi3", OPTIONS["phi3"])
    inputs = {"input_ids": np.random.default_rng(1).integers(6, 97, (1, length))}
    found = torch_outputs(folder, inputs, class_name=STOCK, version="5")
    np.testing.assert_allclose(forward(load(folder), **inputs)[0], found["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "length"), [("qwen2", 14), ("qwen3", 14), ("phi", 14), ("phi3", 14), ("phi3", 26), ("phi3", 32)]
)
def test_greedy_generation(tmp_path, torch_outputs, name, length):
    """Phi-3's cache is built anew where the text outgrows 32 positions: after 7 tokens of one prompt, 1 of the next.

    That step of transformers 4.57 is wrong: it computes the whole text again, but with the last token's position only.
    """
    folder = make_folder(tmp_path / name, OPTIONS[name])
    ids = np.random.default_rng(2).integers(6, 97, (1, length))
    tokens = generate(load(folder), ids, max_new_tokens=12, eos_token_ids=())
    for version in VERSIONS if length == 14 else ("5",):
        found = torch_outputs(folder, {"input_ids": ids}, class_name=STOCK, version=version, max_new_tokens=12)
        np.testing.assert_array_equal(tokens, found["tokens"])


@pytest.mark.slow
def test_rows_that_end_before_longrope_changes_stay_ended(tmp_path):
    model = load(make_folder(tmp_path / "phi3", OPTIONS["phi3"]))
    ids = np.random.default_rng(3).integers(6, 97, (2, 28))
    whole = generate(model, ids, max_new_tokens=12, eos_token_ids=())
    eos = int(whole[0, 2])
    tokens = generate(model, ids, max_new_tokens=12, eos_token_ids=(eos,))
    for row, full in zip(tokens, whole, strict=True):
        ends = np.flatnonzero(full == eos)
        stop = int(ends[0]) + 1 if len(ends) else 12
        np.testing.assert_array_equal(row[:stop], full[:stop])
        assert set(row[stop:]) <= {model.cfg.pad_token_id}
    alone = generate(model, ids[:1], max_new_tokens=12, eos_token_ids=(eos,))
    np.testing.assert_array_equal(alone[0], tokens[0])


# One head for each key and value, and 5 of them stay, which divide no hidden size here.
HEADS = {"hidden_size": 84, "num_attention_heads": 7, "num_key_value_heads": 7}
ODD = {"phi3": HEADS, "phi3_plain": HEADS}
PRUNED = {
    "depth": lambda model: keep_layers(model, [0, 3]),
    "width": lambda model: keep_width(model, [1], range(5, 45)),
    "odd": lambda model: keep_width(model, [0, 1, 3, 4, 5], range(5, 45)),
    "uneven": lambda model: keep_width(model, [0], range(7, 47), only=[1, 2]),
}
# Every decoder by its own class, pruned in every way, is in the support matrix (tests/io/exports); not these.
EXPORTS = [("qwen3", "odd"), ("phi", "odd"), ("phi3_plain", "uneven")]
MORE = [("phi3", "odd"), ("mistral", "odd"), ("phi3_plain", "width"), ("qwen2_layer_types", "depth")]
EXPORTS += [pytest.param(*one, marks=pytest.mark.slow) for one in (*MORE, ("qwen2_layer_types", "uneven"))]


@pytest.mark.parametrize(("name", "pruning"), EXPORTS)
def test_pruned_folder_in_stock_transformers(tmp_path, torch_outputs, name, pruning):
    changes = ODD.get(name, {"num_key_value_heads": 6}) if pruning == "odd" else {}
    source = make_folder(tmp_path / "source", {**OPTIONS[name], **changes})
    if name.startswith("phi3"):  # at full size one rounding of its embeddings (6e-8) moves a logit by 4e-5
        edit_weights(source, lambda tensors: {k: v if "norm" in k else v * np.float32(0.5) for k, v in tensors.items()})
    model, plan = PRUNED[pruning](load(source))
    uneven = "pad" if pruning == "uneven" else "refuse"
    save(model, tmp_path / "out", source_dir=source, plan=plan, uneven=uneven, dtype="float32")
    inputs = {"input_ids": np.random.default_rng(4).integers(6, 97, (2, 40))}
    logits = forward(model, **inputs)[0]
    for version in VERSIONS:
        found = torch_outputs(tmp_path / "out", inputs, class_name=STOCK, version=version)["logits"]
        np.testing.assert_allclose(logits, found, atol=1e-4, rtol=0, err_msg=version)
    again, layers = load(tmp_path / "out").cfg.text.layers, model.cfg.text.layers
    assert [layer.mixer.window for layer in again] == [layer.mixer.window for layer in layers]
    assert pruning == "uneven" or again == layers


def test_qwen_layers_keep_their_own_windows(tmp_path):
    source = make_folder(tmp_path / "source", QWEN2)
    save(keep_layers(load(source), [1, 2, 3])[0], tmp_path / "out", source_dir=source)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["max_window_layers"] == 1
    assert written["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]


def test_phi3_with_fewer_heads_is_written_as_mistral(tmp_path):
    source = make_folder(tmp_path / "source", OPTIONS["phi3"])
    model, _ = PRUNED["width"](load(source))
    save(model, tmp_path / "out", source_dir=source, dtype="bfloat16")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("mistral", ["MistralForCausalLM"])
    report = check_export(model, tmp_path / "out")
    assert report["backend"] == "torch"
    assert report["max_abs_logit_difference"] <= 1e-4


def test_phi4_with_fewer_heads_is_refused(tmp_path):
    source = make_folder(tmp_path / "source", OPTIONS["phi4"])
    model, _ = PRUNED["width"](load(source))
    refused("supports 2 heads of 12 .* keep all heads", save, model, tmp_path / "out", source_dir=source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        ({**PHI, "qk_layernorm": True}, "qk_layernorm"),
        ({**PHI, "tie_word_embeddings": True}, "cannot share the embedding"),
        ({**PHI, "partial_rotary_factor": 0.3}, "rotary_dim 3 must be even"),
        ({**PHI3, "rope_scaling": {"type": "su", "short_factor": [1.0] * 6}}, "longrope rope: long_factor missing"),
        ({**PHI3, "num_attention_heads": 8}, r"have 6 numbers, expected 3"),
        ({**QWEN2, "layer_types": ["full_attention"]}, "layer_types lists 1 layers"),
        ({**QWEN2, "layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ({**QWEN2, "model_type": "gemma"}, "known: .*qwen3, phi, phi3"),
        ({**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({**LLAMA, "hidden_act": "mish"}, "'mish' is not one of"),
        ({**LLAMA, "head_dim": 7}, "must be even"),
        ({**LLAMA, "num_key_value_heads": 4}, "6 query heads are not divisible by 4 key/value heads"),
        ({**LLAMA, "per_layer_shapes": [[6, 3, 56]]}, "lists 1 layers"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, config, fact):
    folder = make_folder(tmp_path / "model", PHI if config["model_type"] == "phi" else QWEN2)
    (folder / "config.json").write_text(json.dumps(config))
    refused(fact, load, folder)
