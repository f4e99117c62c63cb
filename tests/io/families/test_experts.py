"""Layers of experts, beside what all families show: scores, plans, integers, and transposed matrices."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CLOSE, MIXTURES, Golden
from hf_cases import edit_weights, prune
from prune_cases import plain_gradients
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.core.models.params import count_params, flatten, unflatten, unstack_layers
from vlmprune_jax.core.part import Key
from vlmprune_jax.core.prune import KeptLayer
from vlmprune_jax.core.recovery.config import LossConfig, RecoverConfig
from vlmprune_jax.core.recovery.trainable import add_lora, merge_lora
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.read import open_model, read_config
from vlmprune_jax.io.exports.peft import write_adapter
from vlmprune_jax.io.exports.pruning import costs_of
from vlmprune_jax.io.families.decoders import decoder_of


@pytest.fixture(scope="module", params=MIXTURES)
def golden(goldens, request):
    return Golden(goldens / "families" / request.param)


def test_taylor_scores(goldens):
    """An expert's score sums |weight x gradient| over its matrices and its router row; without tokens it is near 0."""
    golden = Golden(goldens / "families/qwen3_vl_moe")
    model, batch = golden.model, golden.inputs("text") | {"labels": golden.arrays["text_labels"][None]}
    batch = {name: array for name, array in batch.items() if "type" not in name}
    batch |= {"attention_mask": np.ones_like(batch["input_ids"])}
    gradients = plain_gradients(model.params, model.cfg, batch, batch["labels"])
    units = vp.score(model, [batch], criterion="taylor").values
    fact = "gradients of experts cannot be weighted or split by token type"
    refused(fact, vp.score, model, [batch], criterion="taylor", image_weight=0.5)
    (weights, _), (grads, _) = (unstack_layers(tree, model.cfg) for tree in (model.params, gradients))
    for i, layer in enumerate(weights):
        names = ("router", "experts/gate_proj", "experts/up_proj", "experts/down_proj")
        router, gate, up, down = (
            np.abs(np.asarray(layer[path] * grads[i][path])) for path in (f"mlp/{name}/weight" for name in names)
        )
        neurons = gate.sum(axis=2) + up.sum(axis=2) + down.sum(axis=1)
        np.testing.assert_allclose(units[Key("text", i, "expert_mlp")].reshape(8, -1), neurons, rtol=1e-4, atol=1e-6)
        whole = router.sum(axis=1) + neurons.sum(axis=1)
        np.testing.assert_allclose(units[Key("text", i, "experts")], whole, rtol=1e-4, atol=1e-6)


def test_plans_of_experts(golden):
    """The same number in every layer, by count, ratio and budget; what a token uses is unchanged.

    Method "width" takes equally many neurons from every expert, those of the lowest scores.
    """
    model, cfg = golden.model, golden.model.cfg
    scores, before = vp.score(model, criterion="l2"), costs_of(cfg, dtype="float32", uneven="pad", length=9, images=0)
    plan = vp.make_plan(scores, model, method="experts", experts=5)
    smaller = vp.apply_plan(model, plan)
    assert {layer.channel.experts for layer in smaller.cfg.text.layers} == {5}
    assert count_params(smaller.cfg) == plan.parameters_after == sum(x.size for x in flatten(smaller.params).values())
    for layer in plan.layers:
        values = scores.along("experts")[layer.index]
        assert set(layer.kept["experts"]) == set(np.argsort(values)[-5:])
    after = costs_of(smaller.cfg, dtype="float32", uneven="pad", length=9, images=0)
    routers = sum(layer.sizes["experts"] - 5 for layer in cfg.text.layers)
    hidden, per_expert = cfg.text.hidden_size, 1 if cfg.family == "gemma4" else 0
    assert before["active_parameters"] - after["active_parameters"] == routers * (hidden + per_expert)
    assert before["forward_flops"] - after["forward_flops"] == 9 * 2 * routers * hidden
    assert vp.make_plan(scores, model, method="experts", ratio=plan.actual_ratio).layers == plan.layers
    budget = {"parameters": plan.parameters_after}
    assert vp.make_plan(scores, model, method="experts", budget=budget).layers == plan.layers
    plan = vp.make_plan(scores, model, method="width", ratio=0.15, heads="keep", neurons_multiple=4)
    assert count_params(plan.apply_to(cfg)) == plan.parameters_after
    for layer in plan.layers:
        part, kept = cfg.text.layers[layer.index].channel, np.asarray(layer.kept["expert_mlp"])
        values = scores.along("expert_mlp")[layer.index].reshape(part.experts, -1)
        rows = kept.reshape(part.experts, -1) - np.arange(part.experts)[:, None] * part.neurons
        assert 0 < rows.shape[1] < part.neurons
        for row, own in zip(rows, values, strict=True):
            assert set(row) == set(np.argsort(own, kind="stable")[-len(row) :])


def test_plans_of_experts_with_everything_else(goldens, torch_outputs, tmp_path):
    """One plan removes a layer, experts by number, then groups of heads and neurons inside experts, and tokens."""
    folder = goldens / "families/qwen3_vl_moe/ckpt"
    (tmp_path / "words.txt").write_text("a red box")
    model = vp.load(folder)
    scores = vp.score(model, criterion="random")
    tokens = {"size": 288, "multiple": 32, "sources": (str(tmp_path / "words.txt"),), "source_dir": str(folder)}
    options = {"method": "hybrid", "experts": 6, "layers_removed": 1, "neurons_multiple": 4}
    fewer = vp.make_plan((scores, scores), model, **options)  # without heads and neurons
    assert {tuple(sizes.values()) for sizes in fewer.stacks["text"].sizes} == {(2, 4, 6, 72)}
    plan = vp.make_plan((scores, scores), model, ratio=0.4, heads="proportional", vocabulary=tokens, **options)
    assert abs(plan.actual_ratio - 0.4) < 0.03
    for layer, same in zip(plan.layers, fewer.layers, strict=True):
        assert layer.kept["experts"] == same.kept["experts"]
        assert set(same.kept["experts"]) == set(np.argsort(scores.along("experts")[layer.index])[-6:])
        assert len(layer.kept["kv_heads"]) < 2
        values = scores.along("expert_mlp")[layer.index].reshape(8, 12)
        rows = np.reshape(layer.kept["expert_mlp"], (6, -1)) - 12 * np.array(layer.kept["experts"])[:, None]
        assert [set(row) for row in rows] == [
            set(np.argsort(values[e])[-rows.shape[1] :]) for e in layer.kept["experts"]
        ]
    limit = {"parameters": plan.parameters_after}
    same = vp.make_plan((scores, scores), model, budget=limit, heads="proportional", vocabulary=tokens, **options)
    assert same.options["budget_reached"] == {"parameters": count_params(plan.apply_to(model.cfg))}
    smaller = vp.apply_plan(model, plan)
    vp.save(smaller, tmp_path / "out", source_dir=folder, dtype="float32")
    ids = {"input_ids": np.arange(20)[None]}
    stock = torch_outputs(tmp_path / "out", ids, class_name="AutoModelForImageTextToText", version="5")["logits"]
    np.testing.assert_allclose(vp.forward(smaller, **ids)[0], stock, **CLOSE)
    fact = r"ratio 0\.9 cannot be reached .* after removing experts: the most is 0\.4"
    refused(fact, vp.make_plan, scores, model, method="width", experts=6, ratio=0.9)
    fact = r'selection="global" needs .* a model without experts'
    refused(fact, vp.make_plan, scores, model, method="width", selection="global", ratio=0.2)


@pytest.mark.parametrize("golden", ["qwen3_vl_moe", "gemma4_moe"], indirect=True)
def test_impossible_plans_of_experts(golden, tmp_path):
    model = golden.model
    scores = vp.score(model, criterion="random")
    for experts in (1, 9):
        fact = rf"experts={experts} must be from . to ., the number of experts in"
        refused(fact, vp.make_plan, scores, model, method="experts", experts=experts)
    neurons = dataclasses.replace(scores, values={k: v for k, v in scores.values.items() if k.axis != "experts"})
    fact = "has no scores of experts, which method 'experts' removes"
    refused(fact, vp.make_plan, neurons, model, method="experts", experts=5)

    for first, others, fact in (
        (1, 1, "has 1 experts, but every token uses .: keep at least"),
        (6, 5, "one width for all layers|equal numbers of experts and heads per layer"),
    ):
        layers = []
        for i, layer in enumerate(model.cfg.text.layers):
            n = others if i else first
            units = {"experts": tuple(range(n)), "expert_mlp": tuple(range(n * layer.channel.neurons))}
            layers.append(KeptLayer(i, {**KeptLayer.whole(i, layer).kept, **units}))
        refused(fact, prune, model, layers)
    fact = "a single input of down_proj, but a layer has experts"
    refused(fact, vp.score, model, [golden.batch("right")], criterion="activation")
    first, *others = model.cfg.text.layers
    uneven = dataclasses.replace(model, cfg=model.cfg.with_layers([first.smaller("experts"), *others]))
    refused("transformers could not load the export: its class", vp.save, uneven, tmp_path, source_dir=golden.ckpt)


@pytest.mark.parametrize("quantize", ["w8a16", "w8a8"])
def test_quantised_experts_are_a_matrix_each(golden, tmp_path, quantize):
    """Integers are near the weights, routers stay floats, and the folder saves back in the hub's layout."""
    vp.save(golden.model, tmp_path / "out", source_dir=golden.ckpt, quantize=quantize, dtype="float32")
    held, whole = Checkpoint(tmp_path / "out"), flatten(golden.model.params)
    rounded = flatten(vp.load(tmp_path / "out").params)
    for path, weight in whole.items():
        error = np.abs(np.asarray(rounded[path]) - np.asarray(weight)).max()
        if re.search(r"text/layers/.*(_proj|qkv|in_proj_.|out_proj)/weight", path):
            assert 0 < error < 0.01 * np.abs(weight).max(), path
        elif "/router/" in path or "dense_gate" in path:
            assert error == 0, path
    experts = [key for key in held.entries if re.search(r"\.experts\.\d+\.(gate|up|down)_proj\.weight$", key)]
    text = golden.model.cfg.text
    assert len(experts) == 3 * sum(layer.channel.experts for layer in text.layers)
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    assert not any(re.fullmatch(pattern[3:], key) for pattern in ignored for key in experts)
    card = (tmp_path / "out/README.md").read_text()
    reads = quantize == "w8a16" and text.decoder in ("qwen3_moe", "qwen3_5_moe_text")  # the others load at random
    assert "Every expert has matrices of its own" in card
    assert ("from_pretrained" in card) == reads
    vp.save(vp.load(tmp_path / "out"), tmp_path / "back", source_dir=tmp_path / "out", dtype="float32")
    assert set(Checkpoint(tmp_path / "back").entries) == set(Checkpoint(golden.ckpt).entries)
    for path, weight in flatten(vp.load(tmp_path / "back").params).items():
        np.testing.assert_array_equal(weight, rounded[path], err_msg=path)
    config = RecoverConfig(trainable="all", quantize="w4a16", losses=LossConfig(ce=1.0))
    fact = r"recover\.quantize='w4a16': layers of experts are not rounded in training"
    refused(fact, vp.recover, golden.model, [], config, num_steps=1)


@pytest.mark.parametrize("neurons", [12, 14, 28])
def test_folders_that_transformers_5_saves(goldens, tmp_path, neurons):
    """Its experts are transposed; with 14 or 28 neurons one matrix is square. Exports have the hub's layout."""
    transformers, hub, saved = pytest.importorskip("transformers"), tmp_path / "hub", tmp_path / "saved"
    shutil.copytree(goldens / "families/qwen3_vl_moe/ckpt", hub)
    config = json.loads((hub / "config.json").read_text())
    config["text_config"]["moe_intermediate_size"] = neurons
    (hub / "config.json").write_text(json.dumps(config))
    text = read_config(hub)[1].text
    problem = decoder_of(text.decoder).problem(text)
    assert problem is None if neurons == 12 else "it tells transposed experts by their shape" in problem
    model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.from_pretrained(hub))
    model.save_pretrained(saved)
    held = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    fused = {key: value.swapaxes(1, 2) for key, value in held.items() if ".experts." in key}
    assert Checkpoint(saved).entries[next(iter(fused))].shape == held[next(iter(fused))].shape
    edit_weights(hub, lambda before: {key: fused.get(key, held[key]) for key in before})
    expected = flatten(vp.load(hub).params)
    for path, array in flatten(vp.load(saved).params).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)
    for name, source in (("loaded", vp.load(saved)), ("lazy", open_model(saved))):
        vp.save(source, tmp_path / name, source_dir=saved, dtype="source")
        for key, value in fused.items():
            np.testing.assert_array_equal(Checkpoint(tmp_path / name)[key], value, err_msg=key)


def test_adapters_on_experts_are_merged_and_not_saved_apart(goldens, tmp_path):
    model, draw = vp.load(goldens / "families/qwen3_5_moe/ckpt"), np.random.default_rng(0)
    added = add_lora(model, LoraConfig(rank=2, targets=("gate_proj", "down_proj")), jax.random.key(0))
    flat = flatten(added.params)
    adapters = [path for path in flat if path.endswith("experts/down_proj/lora_b")]
    assert {flat[path].shape for path in adapters} == {(1, 8, 28, 2), (2, 8, 28, 2)}  # by run of equal layers
    random = {p: jnp.asarray(draw.standard_normal(x.shape) / 10, x.dtype) for p, x in flat.items() if "lora_b" in p}
    adapted = added.replace(params=unflatten(flat | random))
    merged, ids = merge_lora(adapted), {"input_ids": np.arange(4, 24)[None]}
    assert merged.cfg == model.cfg
    whole, before, after = (np.asarray(vp.forward(each, **ids)[0]) for each in (model, adapted, merged))
    np.testing.assert_array_equal(vp.forward(added, **ids)[0], whole)
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert np.abs(after - whole).max() > 1e-2
    fact = r"adapters on experts \(down_proj, gate_proj\): export the merged model"
    refused(fact, write_adapter, adapted, tmp_path / "out", base_dir=tmp_path, trained=[])
