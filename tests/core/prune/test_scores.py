"""Scores files, fingerprints, what scoring refuses, and criteria of a user that fail or return something else."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from prune_cases import EQUAL, UNEQUAL, batch, config, layer_scores, llava_7b, model, on_mesh
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.core.models.params import flatten, unflatten
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.part import Key
from vlmprune_jax.core.prune import Scores, fingerprint, score
from vlmprune_jax.core.prune.criteria import CRITERIA
from vlmprune_jax.core.prune.criteria.criterion import Criterion
from vlmprune_jax.core.prune.fingerprints import content_digest, shape_digest
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.io.checkpoints.read import open_model


def test_scores_survive_the_file_bit_for_bit(tmp_path):
    scores = score(model(config(UNEQUAL)), criterion="random", seed=3, gqa="q_heads")
    scores.save(tmp_path / "deep" / "scores.npz")
    again = Scores.load(tmp_path / "deep" / "scores.npz")
    expected = "random", scores.fingerprint, {"seed": 3, "gqa": "q_heads"}
    assert (again.criterion, again.fingerprint, again.options) == expected
    assert again.layers.dtype == np.float64
    assert [*again.values] == [*scores.values]
    for key, values in scores.values.items():
        np.testing.assert_array_equal(again.values[key], values)
    assert [h.size for h in again.along("q_heads")] == [4, 4, 8, 4]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["scores.npz"]
    assert Scores("block_influence", "a-b", {}, values=layer_scores(np.arange(3.0))).axes == ()


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    old = Scores("l1", "a-b", {}, values=layer_scores(np.arange(3.0)))
    old.save(tmp_path / "s.npz")
    monkeypatch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Scores("l2", "c-d", {}, values=layer_scores(np.arange(4.0))).save(tmp_path / "s.npz")
    assert Scores.load(tmp_path / "s.npz").criterion == "l1"
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def test_files_that_are_no_scores(tmp_path):
    Scores("l1", "a-b", {}, values=layer_scores(np.arange(3.0))).save(tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:100])
    (tmp_path / "text.npz").write_text("not numbers")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    for fact in (
        "nowhere.npz: no such scores file",
        r"text.npz: cannot be read \(File is not a zip file\): score again",
        "cut.npz: cannot be read .*: score again",
        r"other.npz: cannot be read \('meta' is missing\): score again",
    ):
        refused(fact, Scores.load, tmp_path / fact.partition(":")[0])


META = {"format": 3, "criterion": "l1", "fingerprint": "a-b", "options": {"gqa": "groups"}}
ARRAYS = {"text/0/kv_heads": np.ones(2), "text/0/mlp": np.ones(3)}


@pytest.mark.parametrize(
    ("meta", "arrays", "message"),
    [
        ({"format": 9}, {}, "has format 9, but this version of vlmprune reads 3: upgrade"),
        ({"format": 2}, {}, "has format 2, but this version of vlmprune reads 3: run `vlmprune score` again"),
        ({}, {"a b/0/mlp": np.ones(3)}, "'a b/0/mlp' is no axis of a model: expected for example text/layers"),
        ({}, {"text/0/mlp@other": np.ones(3)}, "'text/0/mlp@other' has scores of an unknown token type"),
        ({}, {"text/0/mlp@image": np.ones(3)}, "scores by token type and total scores have different shapes"),
        ({"criterion": 1}, {}, r"Expected `str`, got `int` - at `\$.criterion`"),
        ({"options": {"gqa": "all"}}, {}, "Invalid enum value 'all'"),
        ({"options": {"layers_removed": 1.5}}, {}, "Expected `int .* null`, got `float`"),
        ({"format": True}, {}, "Expected `int`, got `bool`"),
        ({}, {"text/0/mlp": np.ones((3, 1))}, r"text/0/mlp is float64\[3, 1\], expected a one-dimensional array"),
        ({}, {"text/0/mlp": np.ones(3, complex)}, r"text/0/mlp is complex128\[3\], expected a one-dim"),
        ({}, {"text/0/mlp": np.array(["a"])}, r"text/0/mlp is <U1\[1\], expected a one-dim"),
        ({}, {"text/0/mlp": np.ones(0)}, r"text/0/mlp is float64\[0\], expected a one-dim"),
        ({}, {"text/0/mlp": np.array([np.nan])}, r"hostile.npz: l1 scores text/0/mlp contain NaN: check"),
        ({}, {"extra": np.ones(1)}, "'extra' is no axis of a model"),
    ],
)
def test_hostile_scores_are_refused(tmp_path, meta, arrays, message):
    np.savez(tmp_path / "hostile.npz", meta=np.array(json.dumps(META | meta)), **(ARRAYS | arrays))
    error = refused(message, Scores.load, tmp_path / "hostile.npz")
    assert error.startswith(f"{tmp_path}/hostile.npz: ")


def test_fingerprint_ignores_dtype_host_and_sharding():
    one = model(config(vision=True))
    expected = fingerprint(one)
    halves = one.replace(params=jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), one.params))
    assert fingerprint(halves) == expected
    assert fingerprint(one.replace(params=jax.tree.map(jnp.asarray, one.params))) == expected
    assert fingerprint(on_mesh(one, 2, 2, 2)) == expected
    assert len(expected) == 12 + 1 + 16


def test_fingerprint_sees_every_tensor_layer_and_shape():
    one = model(config(vision=True))
    flat, neuron = flatten(one.params), "text/layers/0/mlp/up_proj/weight"
    paths = ("text/layers/0/self_attn/k_proj/weight", "vision/class_embedding/weight", "text/norm/weight")
    changes = [{path: flat[path] * 1.1} for path in paths]
    changes.append({neuron: np.concatenate([flat[neuron][:3], 1.1 * flat[neuron][3:4], flat[neuron][4:]])})
    found = {fingerprint(Model(unflatten({**flat, **change}), one.cfg)) for change in changes}
    assert len({fingerprint(one), *found}) == 5
    assert {name[:12] for name in found} == {fingerprint(one)[:12]}
    assert fingerprint(model(config(UNEQUAL)))[:12] != fingerprint(model(config()))[:12]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"criterion": "block_influense"}, r"'block_influense' is not one of .*did you mean 'block_influence'"),
        ({"criterion": "l1", "reductoin": "sum"}, r"'l1' has no option 'reductoin' .*did you mean 'reduction'"),
        ({"criterion": "l2", "reduction": "median"}, r"reduction 'median' is not one of sum, mean, max, prod, first"),
        ({"criterion": "l2", "gqa": "heads"}, r"gqa 'heads' is not one of groups, q_heads; did you mean 'q_heads'\?"),
        ({"criterion": "random", "gqa": "head"}, "gqa 'head' is not one of groups, q_heads"),
        ({"criterion": "taylor", "variant": "param"}, "taylor variant 'param' is not one of vectorize, param_first"),
        ({"criterion": "taylor", "variant": "param_mix", "rows_per_step": 2}, "rows_per_step=2 must be 1 for taylor"),
        ({"criterion": "angular"}, "criterion 'angular' needs layers_removed="),
        ({"criterion": "angular", "layers_removed": 5}, "layers_removed=5 must be between 1 and 4 for 5 layers"),
        ({"criterion": "block_influence", "batches": None}, "criterion 'block_influence' needs calibration batches"),
        ({"criterion": "block_influence", "batches": []}, "there are no calibration batches: pass at least one"),
        ({"criterion": "taylor", "batches": iter([])}, "there are no calibration batches: pass at least one"),
    ],
)
def test_score_refuses(request_, message):
    refused(message, score, model(config(EQUAL)), **{"batches": [batch(config(EQUAL))], **request_})


def test_calibration_batches_refuse():
    one, good = model(config(EQUAL)), batch(config(EQUAL))
    for change, fact in (
        ({"attention_mask": None}, r"a batch lacks attention_mask \(found input_ids,"),
        ({"labels": None}, "a batch lacks labels"),
        ({"labels": np.zeros((4, 3))}, r"labels has shape \(4, 3\), but input_ids has shape \(4"),
        ({"labels": np.full((4, 9), 62)}, r"labels\[0, 0\] = 62 is neither -100 \(ignored\) nor"),
        ({"input_ids": np.full((4, 9), 70)}, r"input_ids\[0, 0\] = 70 is outside the vocabulary"),
        ({"pixel_values": np.zeros((4, 3, 6, 6))}, "pixel_values is not for a model without"),
        ({"pixel_values": np.zeros((4, 1, 3, 6, 6))}, "pixel_values is not for a model without"),
    ):
        bad = {name: array for name, array in {**good, **change}.items() if array is not None}
        refused(f"calibration batch 1: {fact}", score, one, [good, bad], criterion="taylor")
    blank = {**good, "labels": np.full((4, 9), -100)}
    refused("have no labels", score, one, [blank], criterion="taylor")
    empty = {**good, "attention_mask": np.zeros((4, 9), int)}
    refused("contain only padding: every attention_mask is 0", score, one, [empty], criterion="block_influence")
    adapted = model(dataclasses.replace(one.cfg, lora=LoraConfig(2, 4.0, 0.0, ("q_proj",))))
    for criterion in ("l1", "block_influence"):
        refused(f"'{criterion}' needs a model without LoRA", score, adapted, [good], criterion=criterion)


def wrong(*arguments, **options):
    raise KeyError("my mistake")


def test_criteria_of_ones_own_that_fail_or_return_something_else(monkeypatch):
    n_layers, key, zeros = len(EQUAL), Key("text", None, "layers"), layer_scores(np.zeros(len(EQUAL)))
    failed, end = r"'mine' failed at .*test_scores.py:\d+ with KeyError", {"finish": lambda sums, model: zeros}
    returned = (
        None, {"importance": np.zeros(n_layers)}, [1.0] * n_layers, {key: "high"}, {key: np.array(["a"] * n_layers)},
        {key: [None] * n_layers}, {**zeros, Key("text", 0, "mlp"): np.zeros(12)},
        *(layer_scores(np.array(values)) for values in ([0.0, 0.0], [np.nan] * n_layers)),
    )  # fmt: skip
    for needs, function, more, fact in (
        *(("weights", lambda model, parts=parts: parts, {}, "criterion 'mine'|importance|mine") for parts in returned),
        ("weights", wrong, {}, failed),
        ("labels", wrong, {}, failed),
        ("activations", wrong, end, failed),
        ("activations", lambda layer, tokens: {"n": jnp.zeros(3)}, {"finish": wrong}, r"'mine' failed .*KeyError"),
        ("activations", lambda layer, tokens: jnp.zeros(3), end, r"<lambda> returned float32\[3\], expected"),
    ):
        monkeypatch.setitem(CRITERIA, "mine", Criterion(("layers",), needs, function, **more))
        batches = None if needs == "weights" else [batch(config())]
        refused(fact, vp.score, model(config()), batches, criterion="mine")


# Folder -> its tower's, fingerprint, and digest of the tower alone (in feature caches), as version 0.1 had them.
RECORDED = {
    "ckpt/llava_hf": (None, "902ec3b7b450-2a789f82436b315f", "0685091b6ee933bd"),
    "ckpt/llava_orig": ("clip_tower", "df4a8ed235a6-eb6da374909e978d", "0685091b6ee933bd"),
    "ckpt/bunny": ("siglip_tower", "7f78d53b9f52-a3eb288d3ff95d00", "0c97bb3f1a591618"),
    "ckpt/internvl": (None, "2810277b6788-642eeb491504e34a", "51796fc2d809e09f"),
    "ckpt/llama_gqa": (None, "cff8283a927b-69f816189e457871", None),
    # repeated patterns of layers: as when every group of equal neighbours was a scan of its own
    "families/gemma3/ckpt": (None, "3c4e3edce981-93272974e9356bcc", None),
    "families/qwen2_5_vl/ckpt": (None, "1871027a9195-f729ef883da4cde5", None),
    "families/qwen3_5/ckpt": (None, "ebecdf488f55-dd998ca9e02f683a", None),
}


@pytest.mark.parametrize("name", RECORDED)
def test_fingerprints_do_not_change_between_versions(goldens, name):
    tower, expected, of_tower = RECORDED[name]
    tower = tower and goldens / "ckpt" / tower
    for one in (vp.load(goldens / name, vision_dir=tower), open_model(goldens / name, tower)):
        assert fingerprint(one) == expected
        assert of_tower is None or content_digest(one, "vision") == of_tower


def test_fingerprints_of_models_without_files():
    assert shape_digest(llava_7b()) == "d8b6a9ed2ff2"
    assert fingerprint(model(config(UNEQUAL, vision=True))) == "368d270bd755-10c272a11cc197fa"
