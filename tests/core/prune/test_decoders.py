"""Phi-2 and Phi-3 against the reference: forward passes, width scores, the kept heads and neurons, pruned logits."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import PHI, PHI3, fed_with, golden_decoder
from hf_cases import edit_weights, keep_width, make_folder
from stack_cases import with_facts
from width_cases import QUICK, SLOW, check_pruned, options_of, replayed

from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.flops import layer_costs
from vlmprune_jax.core.models.generate import generate
from vlmprune_jax.core.models.params import flatten, init_params, param_axes, unstack_layers
from vlmprune_jax.core.models.vlm import forward
from vlmprune_jax.core.prune import fingerprint, score
from vlmprune_jax.core.recovery.trainable import add_lora, merge_lora
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.families import PHI as PHI_FAMILY

FORWARD = {"phi2": "bunny", "phi3": "internvl"}
# The quick cases of width_cases.py, half of them on either decoder.
QUICK_OF = {"phi2": QUICK[::2], "phi3": QUICK[1::2]}
CASES = [
    pytest.param(name, case, marks=() if case in QUICK_OF[name] else pytest.mark.slow)
    for name in FORWARD
    for case in (*QUICK, *SLOW)
]


@pytest.fixture(scope="module")
def decoders(goldens, tmp_path_factory):
    """Golden decoders alone, their width goldens, and what calibrates them: {calib: (model, batch)}."""
    result = {}
    for name, golden in FORWARD.items():
        model = load(golden_decoder(goldens, name, tmp_path_factory.mktemp("golden") / name))
        cases = json.loads((goldens / "width" / f"{name}.json").read_text())
        with np.load(goldens / "width" / f"{name}.npz") as file:
            arrays = dict(file)
        with np.load(goldens / "forward" / f"{golden}.npz") as file:
            spliced, forwarded = fed_with(model, file["inputs_embeds"]), dict(file)
        prefix = "merged_" if name == "phi2" else ""
        vlm = {part: forwarded[prefix + part] for part in ("labels", "attention_mask")}
        ids = arrays["calib_input_ids"]
        text = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
        calibration = {"text": (model, text), "vlm": (spliced[0], {"input_ids": spliced[1], **vlm})}
        result[name] = model, cases, arrays, calibration, forwarded
    return result


@pytest.mark.parametrize("name", FORWARD)
def test_forward_equals_the_reference(decoders, name):
    _, _, _, calibration, golden = decoders[name]
    model, inputs = calibration["vlm"]
    real = inputs["attention_mask"] == 1
    logits, aux = forward(model, inputs["input_ids"], attention_mask=inputs["attention_mask"], capture=("hidden",))
    np.testing.assert_allclose(logits[real], golden["logits"][real], atol=1e-4, rtol=0)
    for mine, theirs in zip(aux["hidden"], golden["hidden_states"], strict=True):
        np.testing.assert_allclose(mine[real], theirs[real], atol=1e-4, rtol=0)


def test_long_text_equals_the_reference(decoders, goldens):
    """85 positions of a model whose LongRoPE changes at 64."""
    model = decoders["phi3"][0]
    with np.load(goldens / "forward" / "internvl_long.npz") as golden:
        fed, ids = fed_with(model, golden["inputs_embeds"])
        logits, aux = forward(fed, ids, capture=("hidden",))
        np.testing.assert_allclose(logits[:, -16:], golden["logits_last16"], atol=1e-4, rtol=0)
        np.testing.assert_allclose(aux["hidden"][-1], golden["last_hidden_state"], atol=1e-4, rtol=0)


def test_null_rope_scaling_equals_the_reference(decoders, goldens):
    model, inputs = decoders["phi3"][3]["vlm"]
    rope = dataclasses.replace(model.cfg.text.rope, kind="default", attention_factor=1.0)
    plain = model.replace(cfg=dataclasses.replace(model.cfg, text=with_facts(model.cfg.text, rope=rope)))
    real = inputs["attention_mask"] == 1
    _, aux = forward(plain, inputs["input_ids"], attention_mask=inputs["attention_mask"], capture=("hidden",))
    with np.load(goldens / "forward" / "internvl_rope_null.npz") as golden:
        np.testing.assert_allclose(aux["hidden"][-1][real], golden["last_hidden_state"][real], atol=1e-4, rtol=0)


def test_text_generation_equals_the_reference(decoders):
    model, _, _, _, golden = decoders["phi2"]
    tokens = generate(model, golden["gen_text_prompt"][None], max_new_tokens=8, eos_token_ids=())
    np.testing.assert_array_equal(tokens[0], golden["gen_text_tokens"])


@pytest.fixture(scope="module")
def first_scores(decoders):
    @functools.cache
    def scores(name, calib, criterion, options):
        model, batch = decoders[name][3][calib]
        return score(model, [batch], criterion=criterion, **dict(options))

    return scores


@pytest.mark.parametrize(("name", "case"), CASES)
def test_width_equals_the_reference(decoders, first_scores, name, case):
    original, cases, arrays, calibration, _ = decoders[name]
    want = cases[case]
    first = first_scores(name, want["calib"], want["pruner"], tuple(sorted(options_of(want).items())))
    plan = replayed(want, case, arrays, *calibration[want["calib"]], first)
    check_pruned(case, arrays, original, dataclasses.replace(plan, fingerprint=fingerprint(original)))


def test_biases_are_pruned_with_their_rows(tmp_path):
    model = load(make_folder(tmp_path / "phi", PHI))
    pruned, plan = keep_width(model, [0, 2], range(3, 50))
    before, after = (unstack_layers(one.params, one.cfg)[0] for one in (model, pruned))
    heads, neurons = (np.array(plan.layers[0].kept[axis]) for axis in ("q_heads", "mlp"))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new["self_attn/q_proj/bias"], old["self_attn/q_proj/bias"][heads])
        np.testing.assert_array_equal(new["self_attn/v_proj/bias"], old["self_attn/v_proj/bias"][np.array([0, 2])])
        np.testing.assert_array_equal(new["mlp/fc1/bias"], old["mlp/fc1/bias"][neurons])
        for whole in ("self_attn/dense/bias", "mlp/fc2/bias"):
            np.testing.assert_array_equal(new[whole], old[whole])


def test_costs_are_those_of_phi_2():
    """One head 819,440 and one neuron 5,121 parameters, one block 78,671,360 (algorithms.md, 1.6)."""
    sizes = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "vocab_size": 51200}
    cfg = PHI_FAMILY.from_hf({"model_type": "phi", **sizes, "num_attention_heads": 32}, None)
    costs = layer_costs(cfg)
    assert costs.price(cfg.text.layers[0], "kv_heads") == 819_440
    assert costs.price(cfg.text.layers[0], "mlp") == 5_121
    assert costs.of(cfg.text.layers[0]) == 78_671_360


@pytest.mark.parametrize("config", [PHI, PHI3], ids=["phi", "phi3"])
def test_adapters_are_on_every_projection(tmp_path, config):
    model = load(make_folder(tmp_path / "model", config))
    adapted = add_lora(model, LoraConfig(2, 4.0, 0.0, ()), jax.random.key(0))
    names = {path.split("/")[-2] for path in flatten(adapted.params) if path.endswith("lora_a")}
    others = {"dense", "fc1", "fc2"} if config is PHI else {"o_proj", "gate_proj", "up_proj", "down_proj"}
    assert names == {"q_proj", "k_proj", "v_proj"} | others
    ids = np.random.default_rng(0).integers(6, 97, (2, 9))
    np.testing.assert_array_equal(forward(merge_lora(adapted), ids)[0], forward(model, ids)[0])


@pytest.mark.slow
def test_a_mesh_computes_the_same(tmp_path):
    """8 devices: fused files are read slice by slice; forward, scores and generation do not change.

    With weights half as large as usual: at full size one rounding of Phi-3's embeddings (6e-8) moves a logit by 4e-5.
    """
    config = {**PHI3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    folder = make_folder(tmp_path / "model", config)
    edit_weights(folder, lambda tensors: {k: v if "norm" in k else v * np.float32(0.5) for k, v in tensors.items()})
    one, many = load(folder), load(folder, mesh=make_mesh(2, 2, 2))
    axes = param_axes(one.cfg)
    assert set(axes) == set(flatten(many.params))
    ids = np.random.default_rng(0).integers(6, 90, (4, 40))
    inputs = {"input_ids": ids, "attention_mask": (np.arange(40) < 36 + np.arange(4)[:, None]).astype(int)}
    np.testing.assert_allclose(forward(many, **inputs)[0], forward(one, **inputs)[0], atol=1e-5, rtol=1e-5)
    batch = {**inputs, "labels": np.where(inputs["attention_mask"] == 1, ids, -100)}
    expected, found = (score(model, [batch], criterion="taylor") for model in (one, many))
    for a, b in zip(found.values.values(), expected.values.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)
    tokens = [generate(model, ids[:, :30], max_new_tokens=5, eos_token_ids=()) for model in (one, many)]
    np.testing.assert_array_equal(*tokens)


def test_initial_parameters_follow_their_names():
    flat = flatten(init_params(PHI_FAMILY.from_hf(PHI, None), jax.random.key(0), jnp.float32))
    assert (np.asarray(flat["text/final_layernorm/weight"]) == 1).all()
    assert not np.asarray(flat["text/lm_head/bias"]).any()
    # 6 heads of 12 into 48, one of 8 branches
    spread = float(np.std(flat["text/layers/0/self_attn/dense/weight"]))
    np.testing.assert_allclose(spread, 1 / np.sqrt(6 * 12 * 8), rtol=0.05)
