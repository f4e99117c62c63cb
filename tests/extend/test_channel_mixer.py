"""The channel mixer that how-to/extend.md links: scored, pruned by group, reconstructed, saved and loaded."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from experiment_cases import documented_family, returning
from refusal import refused
from repository import ROOT

import vlmprune_jax as vp
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.params import flatten, param_axes, unflatten
from vlmprune_jax.core.part import AXES, WRITERS
from vlmprune_jax.io.families.decoders import decoder_family

FILE = ROOT / "docs/how-to/grouped_mlp.py"
CONFIG = {
    "architectures": ["GroupedForCausalLM"], "model_type": "grouped", "vocab_size": 70, "hidden_size": 24,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 40,
    "num_groups": 8, "group_size": 5, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
IDS = np.random.default_rng(1).integers(3, 70, (4, 20)).astype(np.int32)
BATCHES = [{"input_ids": IDS, "attention_mask": np.ones_like(IDS), "labels": IDS}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of the family in that file."""
    with documented_family(
        FILE, tmp_path_factory.mktemp("mixer") / "source", CONFIG, vp.parts, AXES, WRITERS
    ) as folder:
        yield folder


def masked(model, plan):
    """The whole model whose removed groups write zero into the residual stream."""
    flat, axes = flatten(model.params), param_axes(model.cfg)
    path = "text/layers/0/mlp/down_proj/weight"
    weight = np.array(flat[path])
    for layer in plan.layers:
        gone = sorted(set(range(8)) - set(layer.kept["groups"]))
        weight[layer.index][(slice(None), gone)] = 0
    assert axes[path] == ("layer", "embed", "groups", "group")
    return model.replace(params=unflatten({**flat, path: weight}))


@pytest.mark.parametrize("criterion", ["activation", "taylor", "l2", "random"])
def test_groups_are_scored_and_cut_as_if_they_wrote_zero(folder, criterion):
    model = vp.load(folder)
    scores = vp.score(model, BATCHES, criterion=criterion)
    assert [scores.along("groups")[i].shape for i in range(4)] == [(8,)] * 4
    plan = vp.make_plan(scores, model, method="width", ratio=0.2, heads="keep")
    assert plan.parameters_after == vp.count_params(plan.apply_to(model.cfg))
    for layer in plan.layers:
        values = scores.along("groups")[layer.index]
        assert set(layer.kept["groups"]) == set(np.argsort(values)[-len(layer.kept["groups"]) :].tolist())
    assert vp.PrunePlan.from_json(plan.to_json()) == plan
    expected, _ = vp.forward(masked(model, plan), IDS)
    logits, _ = vp.forward(vp.apply_plan(model, plan), IDS)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * float(abs(expected).max()))


def test_cut_models_are_mended_saved_and_generate(folder, tmp_path):
    model = vp.load(folder)
    plan = vp.make_plan(vp.score(model, BATCHES, criterion="activation"), model, method="width", ratio=0.2)
    pruned = vp.apply_plan(model, plan)
    mended, solutions = vp.reconstruct(pruned, plan, model, BATCHES * 4)
    assert {solution["module"] for solution in solutions} >= {"down_proj"}
    assert all(solution["error_after"] <= solution["error_before"] for solution in solutions)
    vp.save(mended, tmp_path / "out", source_dir=folder, plan=plan, dtype="float32")
    again = vp.load(tmp_path / "out")
    assert again.cfg == mended.cfg
    for path, leaf in flatten(mended.params).items():
        np.testing.assert_array_equal(flatten(again.params)[path], leaf, err_msg=path)
    tokens = vp.generate(again, IDS[:2, :5], max_new_tokens=3, eos_token_ids=())
    greedy = np.asarray(IDS[:2, :5])
    for _ in range(3):
        logits, _ = vp.forward(again, greedy)
        greedy = np.concatenate([greedy, np.argmax(logits[:, -1:], axis=-1)], axis=1)
    np.testing.assert_array_equal(tokens, greedy[:, 5:])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"grouped_mlp.py: GroupedMlp.__call__ returned None, expected the pair \(output of shape \[3, 20, 24\]"),
        ("text", "grouped_mlp.py: GroupedMlp.__call__ returned 'text', expected the pair"),
        ((None, None), r"grouped_mlp.py: GroupedMlp.__call__ returned \(None, None\), expected the pair"),
    ],
)
def test_a_module_that_returns_no_pair_is_named(folder, monkeypatch, value, message):
    model, module = vp.load(folder), [*vp.parts.values()][-1]
    monkeypatch.setattr(module, "__call__", returning(module, "__call__", value))
    refused(message, vp.forward, model, IDS[:3])  # of a shape that no other test compiles


@pytest.mark.parametrize("value", [None, "text", [None]])
def test_a_decoder_that_returns_no_config_is_named(folder, monkeypatch, value):
    decoder = vp.families["grouped"].decoder
    from_hf = returning(SimpleNamespace(from_hf=decoder.from_hf), "from_hf", value)
    monkeypatch.setitem(vp.families, "grouped", decoder_family(dataclasses.replace(decoder, from_hf=from_hf)))
    refused(r"grouped_mlp.py: from_hf returned .*, expected a core.config.TextConfig: cor", vp.load, folder)


def test_parts_are_modules_of_configs():
    part, module = vp.ChannelMixer, next(iter(vp.parts.values()))
    for key, value in (("mine", module), (dict, module), (part, None), (part, "text"), (part, dict)):
        with pytest.raises(UserError, match=r"vp.parts: the (key must be a subclass of vp.Part|value .* flax)"):
            vp.parts[key] = value
