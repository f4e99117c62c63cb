"""The encoder that how-to/extend.md links: scored, pruned, reconstructed, trained on, saved and loaded."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from experiment_cases import documented_family, returning
from hf_cases import edit_config
from refusal import refused
from repository import ROOT

import vlmprune_jax as vp
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.params import flatten, param_axes, unflatten

FILE = ROOT / "docs/how-to/audio_encoder.py"
AUDIO = 69
CONFIG = {
    "architectures": ["Hearing"], "model_type": "hearing",
    "audio": {
        "width": 24, "depth": 4, "heads": 4, "head_dim": 6, "neurons": 40, "mels": 5, "frames": 3, "token_id": AUDIO,
    },
    "text": {
        "model_type": "llama", "vocab_size": 70, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 40, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
}  # fmt: skip
DRAW = np.random.default_rng(1)
IDS = DRAW.integers(3, 69, (4, 20)).astype(np.int32)
IDS[:, 2:5] = IDS[1:, 9:12] = AUDIO  # one item in the first row, two in the others
FEATURES = DRAW.normal(size=(4, 2, 3, 5)).astype(np.float32)
FEATURES[0, 1] = 0
BATCH = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "labels": IDS, "input_features": FEATURES}
INPUTS = {"input_features": FEATURES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of the family in that file."""
    with documented_family(FILE, tmp_path_factory.mktemp("encoder") / "source", CONFIG, vp.encoders) as folder:
        yield folder


def masked(model, plan):
    """The whole model whose removed heads and neurons of the encoder write zero into its residual stream."""
    flat, axes = flatten(model.params), param_axes(model.cfg)
    for axis, name in (("q_heads", "self_attn/out_proj"), ("mlp", "mlp/fc2")):
        path = f"audio/layers/0/{name}/weight"
        weight, size = np.array(flat[path]), model.cfg.stack("audio").layers[0].sizes[axis]
        for layer in plan.stacks["audio"].layers:
            gone = sorted(set(range(size)) - set(layer.kept[axis]))
            weight[layer.index][(slice(None), gone)] = 0
        assert axes[path][:3] == ("layer", "encoder", axis)
        flat[path] = weight
    return model.replace(params=unflatten(flat))


@pytest.mark.parametrize("criterion", ["activation", "taylor"])
def test_heads_and_neurons_are_cut_as_if_they_wrote_zero(folder, criterion):
    model = vp.load(folder)
    scores = vp.score(model, [BATCH], criterion=criterion, stack="audio")
    assert (scores.components, scores.along("mlp")[3].shape) == (("audio",), (40,))
    plan = vp.make_plan(scores, model, method="width", ratio=0.2)
    assert plan.parameters_after == vp.count_params(plan.apply_to(model.cfg))
    assert vp.PrunePlan.from_json(plan.to_json()) == plan
    assert plan.stacks["text"].is_whole
    expected, _ = vp.forward(masked(model, plan), IDS, **INPUTS)
    logits, _ = vp.forward(vp.apply_plan(model, plan), IDS, **INPUTS)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * float(abs(expected).max()))


def test_scores_ignore_empty_places(folder):
    """Zeros behind the last item of a row are no items."""
    model = vp.load(folder)
    padded = {**BATCH, "input_features": np.concatenate([FEATURES, np.zeros_like(FEATURES)], axis=1)}
    for name, stack in (("block_influence", "audio"), ("taylor", "audio"), ("taylor", "text")):
        once, again = (vp.score(model, [batch], criterion=name, stack=stack) for batch in (BATCH, padded))
        for key, values in once.values.items():
            np.testing.assert_allclose(again.values[key], values, rtol=1e-5 if key.axis == "layers" else 1e-4)


def test_depth_cuts_are_mended_saved_and_generate(folder, tmp_path):
    model = vp.load(folder)
    scores = vp.score(model, [BATCH], criterion="block_influence", stack="audio")
    plan = vp.make_plan(scores, model, method="depth", layers_removed=1)
    pruned = vp.apply_plan(model, plan)
    mended, solutions = vp.reconstruct(pruned, plan, model, [BATCH])
    assert {(solution["stack"], solution["module"]) for solution in solutions} == {("audio", "down_proj")}
    assert all(solution["error_after"] <= solution["error_before"] for solution in solutions)
    assert {solution["tokens"] for solution in solutions} == {7 * 3}  # positions of all items, each once
    vp.save(mended, tmp_path / "out", source_dir=folder, plan=plan, dtype="float32")
    again = vp.load(tmp_path / "out")
    assert again.cfg == mended.cfg
    for path, leaf in flatten(mended.params).items():
        np.testing.assert_array_equal(flatten(again.params)[path], leaf, err_msg=path)
    inputs = {"input_features": FEATURES[:2]}
    tokens = vp.generate(again, IDS[:2], max_new_tokens=3, eos_token_ids=(), **inputs)
    greedy = IDS[:2]
    for _ in range(3):
        logits, _ = vp.forward(again, greedy, **inputs)
        greedy = np.concatenate([greedy, np.argmax(logits[:, -1:], axis=-1)], axis=1)
    np.testing.assert_array_equal(tokens, greedy[:, 20:])


@pytest.mark.parametrize("depth", [0, 1001, 10**9, "4"])
def test_layers_are_bounded_before_they_are_made(folder, tmp_path, depth):
    folder = shutil.copytree(folder, tmp_path / "copy")
    edit_config(folder, audio={**CONFIG["audio"], "depth": depth})
    refused(r"config.json: field audio.depth is .*, expected a whole number from 1 to 1000", vp.load, folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("embed", None, r"AudioEncoder.embed returned None, expected an array of shape \[\d+, 3, 24\]"),
        ("embed", "text", "AudioEncoder.embed returned 'text', expected an array"),
        ("project", None, r"AudioEncoder.project returned None, expected an array \[\d+, 3, channels of the decoder\]"),
    ],
)
def test_encoders_that_return_no_arrays_are_named(folder, monkeypatch, name, value, message):
    model, encoder = vp.load(folder), next(iter(vp.encoders.values()))
    monkeypatch.setattr(encoder, name, returning(encoder, name, value))
    refused(message, vp.forward, model, IDS[:3], input_features=FEATURES[:3])  # a shape that no other test compiles


@pytest.mark.parametrize("value", [None, "text", [None]])
def test_a_family_that_returns_no_table_is_named(folder, monkeypatch, value):
    family = vp.families["hearing"]
    monkeypatch.setitem(vp.families, "hearing", replace(family, weights=returning(family, "weights", value)))
    refused(r"audio_encoder.py: weights returned .*, expected a list of families.table.W", vp.load, folder)


@pytest.mark.parametrize(
    ("key", "value"), [(dict, vp.encoders), ("Audio", dict), (vp.Encoder, None), (vp.Encoder, dict)]
)
def test_encoders_are_modules_of_configs(key, value):
    with pytest.raises(UserError, match=r"vp.encoders: the (key|value) must be a subclass of vp.Encoder"):
        vp.encoders[key] = value


def test_tokens_see_their_own_items(folder):
    """A change of an item changes the logits from its first token on, in its row."""
    model, changed = vp.load(folder), FEATURES.copy()
    changed[2, 1] += 1
    logits, other = (np.asarray(vp.forward(model, IDS, input_features=array)[0]) for array in (FEATURES, changed))
    differs = np.abs(logits - other).max(axis=-1) > 0
    assert np.argwhere(differs).tolist() == [[2, place] for place in range(9, 20)]


def test_items_that_do_not_match_the_tokens_are_refused(folder):
    model = vp.load(folder)
    refused(r"input_features has shape \[4, 0\], .* up to 6 audio tokens, 3 per item", vp.forward, model, IDS)
    refused(r"input_features has shape \[4, 1, 3, 5\]", vp.forward, model, IDS, input_features=FEATURES[:, :1])
