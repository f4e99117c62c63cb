"""The channel mixer and the encoder that how-to/extend.md links: scored, pruned, reconstructed, saved and loaded."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from experiment_cases import documented_family, returning
from hf_cases import edit_config
from refusal import refused
from repository import ROOT

import vlmprune_jax as vp
from vlmprune_jax.core.models.params import flatten, param_axes, unflatten
from vlmprune_jax.core.part import AXES, WRITERS
from vlmprune_jax.io.families.decoders import decoder_family

TEXT = {
    "vocab_size": 70, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "intermediate_size": 40, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
GROUPED = {
    **TEXT, "architectures": ["GroupedForCausalLM"], "model_type": "grouped", "num_hidden_layers": 4, "num_groups": 8,
    "group_size": 5,
}  # fmt: skip
AUDIO = 69
SIZES = {
    "width": 24, "depth": 4, "heads": 4, "head_dim": 6, "neurons": 40, "mels": 5, "frames": 3, "token_id": AUDIO,
}  # fmt: skip
HEARING = {
    "architectures": ["Hearing"], "model_type": "hearing", "audio": SIZES, "text": {**TEXT, "model_type": "llama"},
}  # fmt: skip
DRAW = np.random.default_rng(1)
IDS = DRAW.integers(3, 69, (4, 20)).astype(np.int32)
HEARD = IDS.copy()
HEARD[:, 2:5] = HEARD[1:, 9:12] = AUDIO  # one item in the first row, two in the others
FEATURES = DRAW.normal(size=(4, 2, 3, 5)).astype(np.float32)
FEATURES[0, 1] = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """A file, what it registers in, and the weights with which each axis of its units writes."""

    file: str
    config: dict
    registries: tuple
    stack: str
    residual: str
    writers: dict
    ids: np.ndarray
    inputs: dict = dataclasses.field(default_factory=dict)

    @property
    def batch(self):
        return {"input_ids": self.ids, "attention_mask": np.ones_like(self.ids), "labels": self.ids, **self.inputs}


MIXER = Case(
    "grouped_mlp.py", GROUPED, (vp.parts, AXES, WRITERS), "text", "embed", {"groups": "mlp/down_proj"}, IDS
)  # fmt: skip
ENCODER = Case(
    "audio_encoder.py", HEARING, (vp.encoders,), "audio", "encoder",
    {"q_heads": "self_attn/out_proj", "mlp": "mlp/fc2"}, HEARD, {"input_features": FEATURES},
)  # fmt: skip


def folder_of(case):
    @pytest.fixture(scope="module")
    def fixture(tmp_path_factory):
        folder = tmp_path_factory.mktemp(case.stack) / "source"
        with documented_family(ROOT / "docs/how-to" / case.file, folder, case.config, *case.registries) as made:
            yield made

    return fixture


grouped, hearing = folder_of(MIXER), folder_of(ENCODER)


@pytest.fixture
def folder(request, case):
    return request.getfixturevalue(case.config["model_type"])


def masked(model, plan, case):
    """The whole model whose removed units write zero into the residual stream."""
    flat, axes = flatten(model.params), param_axes(model.cfg)
    for axis, name in case.writers.items():
        path = f"{case.stack}/layers/0/{name}/weight"
        weight, size = np.array(flat[path]), model.cfg.stack(case.stack).layers[0].sizes[axis]
        for layer in plan.stacks[case.stack].layers:
            gone = sorted(set(range(size)) - set(layer.kept[axis]))
            weight[layer.index][(slice(None), gone)] = 0
        assert axes[path][:3] == ("layer", case.residual, axis)
        flat[path] = weight
    return model.replace(params=unflatten(flat))


@pytest.mark.parametrize(
    ("case", "criterion", "options"),
    [
        *((MIXER, name, {"heads": "keep"}) for name in ("activation", "taylor", "l2")),
        *((ENCODER, name, {}) for name in ("activation", "taylor")),
    ],
)
def test_units_are_scored_and_cut_as_if_they_wrote_zero(folder, case, criterion, options):
    model, (*_, axis) = vp.load(folder), case.writers
    scores = vp.score(model, [case.batch], criterion=criterion, stack=case.stack)
    assert scores.components == (case.stack,)
    assert [scores.along(axis)[i].shape for i in range(4)] == [(model.cfg.stack(case.stack).layers[0].sizes[axis],)] * 4
    plan = vp.make_plan(scores, model, method="width", ratio=0.2, **options)
    assert plan.parameters_after == vp.count_params(plan.apply_to(model.cfg))
    for layer in plan.stacks[case.stack].layers:
        values = scores.along(axis)[layer.index]
        assert set(layer.kept[axis]) == set(np.argsort(values)[-len(layer.kept[axis]) :].tolist())
    assert vp.PrunePlan.from_json(plan.to_json()) == plan
    assert all(plan.stacks[name].is_whole for name in plan.stacks if name != case.stack)
    expected, _ = vp.forward(masked(model, plan, case), case.ids, **case.inputs)
    logits, _ = vp.forward(vp.apply_plan(model, plan), case.ids, **case.inputs)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * float(abs(expected).max()))


@pytest.mark.parametrize(
    ("case", "criterion", "method"),
    [
        (MIXER, "activation", {"method": "width", "ratio": 0.2}),
        (ENCODER, "block_influence", {"method": "depth", "layers_removed": 1}),
    ],
)
def test_cut_models_are_mended_saved_and_generate(folder, case, criterion, method, tmp_path):
    model = vp.load(folder)
    plan = vp.make_plan(vp.score(model, [case.batch], criterion=criterion, stack=case.stack), model, **method)
    batches = [case.batch] * (4 if case is MIXER else 1)
    mended, solutions = vp.reconstruct(vp.apply_plan(model, plan), plan, model, batches)
    assert all(solution["error_after"] <= solution["error_before"] for solution in solutions)
    modules = {(solution["stack"], solution["module"]) for solution in solutions}
    if case is MIXER:
        assert ("text", "down_proj") in modules
    else:
        assert modules == {("audio", "down_proj")}
        assert {solution["tokens"] for solution in solutions} == {7 * 3}  # positions of all items, each once
    vp.save(mended, tmp_path / "out", source_dir=folder, plan=plan, dtype="float32")
    again = vp.load(tmp_path / "out")
    assert again.cfg == mended.cfg
    for path, leaf in flatten(mended.params).items():
        np.testing.assert_array_equal(flatten(again.params)[path], leaf, err_msg=path)
    inputs = {name: values[:2] for name, values in case.inputs.items()}
    tokens = vp.generate(again, case.ids[:2], max_new_tokens=3, eos_token_ids=(), **inputs)
    logits, _ = vp.forward(again, np.concatenate([case.ids[:2], tokens], axis=1), **inputs)
    np.testing.assert_array_equal(tokens, np.argmax(logits[:, 19:-1], axis=-1))


def test_scores_ignore_empty_places(hearing):
    """Zeros behind the last item of a row are no items."""
    model = vp.load(hearing)
    padded = {**ENCODER.batch, "input_features": np.concatenate([FEATURES, np.zeros_like(FEATURES)], axis=1)}
    for name in ("block_influence", "taylor"):
        once, again = (vp.score(model, [batch], criterion=name, stack="audio") for batch in (ENCODER.batch, padded))
        for key, values in once.values.items():
            np.testing.assert_allclose(again.values[key], values, rtol=1e-5 if key.axis == "layers" else 1e-4)


def test_tokens_see_their_own_items(hearing):
    """A change of an item changes the logits from its first token on in its row; other counts are refused."""
    model, changed = vp.load(hearing), FEATURES.copy()
    changed[2, 1] += 1
    logits, other = (np.asarray(vp.forward(model, HEARD, input_features=array)[0]) for array in (FEATURES, changed))
    differs = np.abs(logits - other).max(axis=-1) > 0
    assert np.argwhere(differs).tolist() == [[2, place] for place in range(9, 20)]
    refused(r"input_features has shape \[4, 0\], .* up to 6 audio tokens, 3 per item", vp.forward, model, HEARD)
    refused(r"input_features has shape \[4, 1, 3, 5\]", vp.forward, model, HEARD, input_features=FEATURES[:, :1])


@pytest.mark.parametrize(
    ("case", "name", "value", "message"),
    [
        (
            MIXER,
            "__call__",
            None,
            r"GroupedMlp.__call__ returned None, expected the pair \(output of shape \[3, 20, 24",
        ),
        (MIXER, "__call__", (None, None), r"GroupedMlp.__call__ returned \(None, None\), expected the pair"),
        (ENCODER, "embed", None, r"AudioEncoder.embed returned None, expected an array of shape \[\d+, 3, 24\]"),
        (ENCODER, "embed", "text", "AudioEncoder.embed returned 'text', expected an array"),
        (ENCODER, "project", None, r"AudioEncoder.project returned None, .* \[\d+, 3, channels of the decoder\]"),
    ],
)
def test_modules_that_return_something_else_are_named(folder, case, monkeypatch, name, value, message):
    model, module = vp.load(folder), [*case.registries[0].values()][-1]
    monkeypatch.setattr(module, name, returning(module, name, value))
    inputs = {name: values[:3] for name, values in case.inputs.items()}  # of a shape that no other test compiles
    refused(f"{case.file}: {message}", vp.forward, model, case.ids[:3], **inputs)


@pytest.mark.parametrize("value", [None, "text", [None]])
def test_families_that_return_something_else_are_named(grouped, hearing, monkeypatch, value):
    decoder, family = vp.families["grouped"].decoder, vp.families["hearing"]
    from_hf = returning(SimpleNamespace(from_hf=decoder.from_hf), "from_hf", value)
    monkeypatch.setitem(vp.families, "grouped", decoder_family(dataclasses.replace(decoder, from_hf=from_hf)))
    refused(r"grouped_mlp.py: from_hf returned .*, expected a core.config.TextConfig: cor", vp.load, grouped)
    weights = returning(family, "weights", value)
    monkeypatch.setitem(vp.families, "hearing", dataclasses.replace(family, weights=weights))
    refused(r"audio_encoder.py: weights returned .*, expected a list of families.table.W", vp.load, hearing)


def test_layers_are_bounded_before_they_are_made(hearing, tmp_path):
    copy = shutil.copytree(hearing, tmp_path / "copy")
    for depth in (0, 1001, 10**9, "4"):
        edit_config(copy, audio={**SIZES, "depth": depth})
        refused(r"config.json: field audio.depth is .*, expected a whole number from 1 to 1000", vp.load, copy)


@pytest.mark.usefixtures("grouped")
def test_parts_and_encoders_are_modules_of_configs():
    part, module = vp.ChannelMixer, next(iter(vp.parts.values()))
    for key, value in (("mine", module), (dict, module), (part, None), (part, "text"), (part, dict)):
        fact = r"vp.parts: the (key must be a subclass of vp.Part|value .* flax)"
        refused(fact, vp.parts.__setitem__, key, value)
    for key, value in ((dict, vp.encoders), ("Audio", dict), (vp.Encoder, None), (vp.Encoder, dict)):
        refused("vp.encoders: the (key|value) must be a subclass of vp.Encoder", vp.encoders.__setitem__, key, value)
