"""Block Influence, angular distance, activations, fluctuation: the reference, sums in float64; greedy search."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import real_values
from hf_cases import mean_loss, random_ids
from prune_cases import EQUAL, UNEQUAL, assert_scores, batch, config, expanded, golden_llava, hand_plan, model, seeing
from refusal import refused
from repository import load_arrays
from stack_cases import tower_layer

import vlmprune_jax as vp
from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.core.models.params import flatten, unflatten, unstack_layers
from vlmprune_jax.core.models.vlm import forward
from vlmprune_jax.core.prune import CRITERIA, Criterion, KeptLayer, apply_plan, fingerprint, reconstruct, score
from vlmprune_jax.core.prune.activations import _sums
from vlmprune_jax.core.prune.criteria import greedy
from vlmprune_jax.core.prune.criteria.distance import cosine_distance
from vlmprune_jax.core.prune.stream import LayerStream
from vlmprune_jax.io.checkpoints.read import open_model
from vlmprune_jax.io.exports.pruning import make_plan


def golden_samples(goldens):
    arrays = load_arrays(goldens / "block_influence" / "llava.npz")
    names = ("input_ids", "attention_mask", "labels", "pixel_values")
    return [expanded(*(arrays[f"s{n}_{name}"] for name in names)) for n in range(6)], arrays


def test_block_influence_equals_the_reference(goldens):
    samples, arrays = golden_samples(goldens)
    recorded = json.loads((goldens / "block_influence" / "llava.json").read_text())
    one = golden_llava(goldens)
    seen = []
    scores = score(one, samples, criterion="block_influence", reference_compat=True, progress=seen.append)
    np.testing.assert_allclose(scores.layers, arrays["importances"], rtol=1e-5)
    assert seen == [1, 2, 3, 4, 5, 6]
    for n, removed in recorded["removed"].items():
        plan = make_plan(scores, one.cfg, method="depth", layers_removed=int(n))
        assert list(plan.removed_layers) == sorted(removed)
        assert list(plan.kept_layers) == recorded["kept"][n]


def as_one_batch(samples):
    """All samples in one batch, padded on the right."""
    length = max(one["input_ids"].shape[1] for one in samples)
    result = {"pixel_values": np.concatenate([one["pixel_values"] for one in samples])}
    for name in ("input_ids", "attention_mask"):
        result[name] = np.concatenate([np.pad(s[name], ((0, 0), (0, length - s[name].shape[1]))) for s in samples])
    return result


def test_angular_distance_equals_the_reference(goldens):
    samples, arrays = golden_samples(goldens)
    samples = [as_one_batch(samples)]
    recorded = json.loads((goldens / "block_influence" / "llava.json").read_text())
    one = golden_llava(goldens)
    for n in (2, 3, 4, 5):
        scores = score(one, samples, criterion="angular", layers_removed=n, reference_compat=True)
        starts = 6 - n + 1
        np.testing.assert_allclose(scores.layers[:starts], arrays[f"angular_importances_k{n}"][:starts], rtol=1e-5)
        assert np.isinf(scores.layers[starts:]).all()
        plan = make_plan(scores, one.cfg, method="depth", layers_removed=n)
        assert list(plan.removed_layers) == recorded["angular"][str(n)]["removed"]


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_default_is_the_mean_over_real_tokens():
    cfg = config(UNEQUAL)
    arrays = batch(cfg)
    _, aux = forward(model(cfg), arrays["input_ids"], attention_mask=arrays["attention_mask"], capture=("hidden",))
    hidden, mask = np.stack([np.asarray(h, np.float64) for h in aux["hidden"]]), arrays["attention_mask"] == 1
    distance = 1 - cosine(hidden[:-1], hidden[1:])
    scores = score(model(cfg), [arrays], criterion="block_influence")
    np.testing.assert_allclose(scores.layers, distance[:, mask].mean(axis=1), rtol=1e-5)
    compat = score(model(cfg), [arrays], criterion="block_influence", reference_compat=True)
    np.testing.assert_allclose(compat.layers, distance.sum(axis=(1, 2)), rtol=1e-5)


def test_angular_is_the_mean_angle_at_the_last_real_token():
    cfg = config(EQUAL)
    arrays = batch(cfg)
    _, aux = forward(model(cfg), arrays["input_ids"], attention_mask=arrays["attention_mask"], capture=("hidden",))
    last = arrays["attention_mask"].sum(axis=1) - 1
    states = np.stack([np.asarray(h, np.float64)[np.arange(4), last] for h in aux["hidden"]])
    scores = score(model(cfg), [arrays], criterion="angular", layers_removed=3)
    angles = np.arccos(cosine(states[:-3], states[3:])) / np.pi
    np.testing.assert_allclose(scores.layers[:3], angles.mean(axis=1), rtol=1e-5)


def test_cosine_distance_of_zero_opposite_and_nearly_equal_vectors():
    a = jnp.asarray([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0], [3.0, 4.0], [1.0, 0.0]])
    b = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [-2.0, -4.0], [6.0, 8.0], [1.0, 1e-4]])
    np.testing.assert_allclose(cosine_distance(a, b), [0.5, 0.5, 2.0, 0.0, 5e-9], rtol=1e-4, atol=1e-12)


def test_a_model_in_files_is_scored_with_one_layer_on_the_device(goldens, monkeypatch):
    """Scores are those of the loaded model; each layer is read once for all batches, and no other is on the device."""
    folder = goldens / "families/qwen3_vl/ckpt"
    loaded = vp.load(folder, dtype="float32")
    batches = [
        {**(ids := random_ids(loaded, seed)), "attention_mask": np.ones_like(ids["input_ids"])} for seed in (0, 1)
    ]
    expected = {name: score(loaded, batches, criterion=name) for name in ("block_influence", "activation")}
    runs = loaded.params["text"]["layers"].values()
    n_layers = len(loaded.cfg.text.layers)
    one_layer = sum(leaf.nbytes for run in runs for leaf in jax.tree.leaves(run)) // n_layers
    stacked = {leaf.shape for run in runs for leaf in jax.tree.leaves(run) if leaf.ndim > 2}
    del loaded, runs
    files, peaks, load = open_model(folder, dtype="float32"), [], LayerStream.load
    present = {id(array) for array in jax.live_arrays()}

    def counted(stream, number):
        layer = load(stream, number)
        shapes = {leaf.shape for leaf in layer.params.values() if leaf.ndim > 1}
        new = [array for array in jax.live_arrays() if id(array) not in present]
        peaks.append(sum(array.nbytes for array in new if array.shape in shapes))
        assert not {array.shape for array in new} & stacked
        return layer

    monkeypatch.setattr(LayerStream, "load", counted)
    for name, scores in expected.items():
        found = score(files, batches, criterion=name)
        assert_scores(found, scores, rtol=1e-5)
    assert len(peaks) == 2 * n_layers
    assert 0 < max(peaks) <= 2 * one_layer  # the next layer is read before the last is dropped


def test_the_model_is_not_traced_again_for_every_batch():
    cfg = config(EQUAL)
    score(model(cfg), [batch(cfg)], criterion="block_influence")
    before = _sums._cache_size()
    score(model(cfg), [batch(cfg, seed=s) for s in range(3)], criterion="block_influence")
    assert _sums._cache_size() == before


SHAPES = {
    "sequential": {"vision": True}, "parallel": {"parallel": True, "norm": "layer", "gated": False}, "tower": None
}  # fmt: skip
ONE = seeing((tower_layer(2, 2, 10), tower_layer(2, 2, 10), tower_layer(4, 4, 6)), layer_scale=True)
WRITERS = {"o_proj": ("o_proj", "dense", "out_proj"), "down_proj": ("down_proj", "fc2")}


def contribution(layer, name, x, weight, criterion):
    """Score of each input of the projection that writes `name` to the stream, float64[inputs]."""
    (path,) = (path for path in layer if path.endswith(tuple(f"{writer}/weight" for writer in WRITERS[name])))
    scale = layer.get(f"layer_scale{1 + (name == 'down_proj')}/weight", 1.0)
    matrix = np.asarray(layer[path], np.float64).reshape(len(layer[path]), -1) * np.reshape(scale, (-1, 1))
    share, norm = weight[:, None] / weight.sum(), np.linalg.norm(matrix, axis=0)
    if criterion == "activation":
        return np.sqrt((share * x * x).sum(0)) * norm
    return (share * (x - (share * x).sum(0)) ** 2).sum(0) * norm**2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("criterion", ["activation", "fluctuation"])
def test_scores_equal_sums_in_float64(criterion, shape):
    stack = "vision" if shape == "tower" else "text"
    one = ONE if stack == "vision" else model(config(UNEQUAL, **SHAPES[shape]))
    arrays = batch(one.cfg)
    found = score(one, [arrays], criterion=criterion, stack=stack, image_weight=0.1)
    inputs = {"images": arrays["pixel_values"][:-1, 0]} if stack == "vision" else arrays
    blocks = real_values(one, inputs, names=tuple(WRITERS))
    weight = np.where(arrays["input_ids"] == one.cfg.image_token_id, 0.1, 1.0)[arrays["attention_mask"] == 1]
    weight = np.ones(len(blocks[0]["before"])) if stack == "vision" else weight
    layers, shapes = unstack_layers(one.params, one.cfg, stack)[0], one.cfg.stack(stack).layers
    for i, (block, layer, of) in enumerate(zip(blocks, layers, shapes, strict=True)):
        heads, neurons = (contribution(layer, name, block[name], weight, criterion) for name in WRITERS)
        expected = heads.reshape(of.mixer.kv_heads, -1).sum(1)
        np.testing.assert_allclose(found.along("kv_heads")[i], expected, rtol=2e-4)
        np.testing.assert_allclose(found.along("mlp")[i], neurons, rtol=2e-4, atol=1e-6 * neurons.max())
    make_plan(found, one.cfg, method="width", ratio=0.02, heads="auto")


# Of the vision stack.


def test_layers_of_a_tower_equal_cosines_in_float64():
    arrays = batch(ONE.cfg)
    images = {"images": arrays["pixel_values"][:-1, 0]}  # of the images that rows have
    blocks = real_values(ONE, images, names=tuple(WRITERS))
    influence = score(ONE, [arrays], criterion="block_influence", stack="vision").layers
    np.testing.assert_allclose(influence, [np.mean(1 - cosine(b["before"], b["after"])) for b in blocks], rtol=1e-4)
    # every position of an image is looked at, not the last alone
    found = score(ONE, [arrays], criterion="angular", layers_removed=2, stack="vision").layers
    states = [b["before"] for b in blocks] + [blocks[-1]["after"]]
    angles = [np.mean(np.arccos(cosine(states[i], states[i + 2]))) / np.pi for i in (0, 1)]
    np.testing.assert_allclose(found, [*angles, np.inf], rtol=1e-4)


def test_magnitude_sums_the_towers_weights():
    found = score(ONE, criterion="l2", stack="vision", reduction="sum")
    layers, _ = unstack_layers(ONE.params, ONE.cfg, "vision")
    for i, layer in enumerate(layers):
        squares = {name: np.asarray(leaf, np.float64) ** 2 for name, leaf in layer.items()}
        expected = squares["mlp/fc1/weight"].sum(1) + squares["mlp/fc2/weight"].sum(0)
        np.testing.assert_allclose(found.along("mlp")[i], expected, rtol=1e-5)


def test_what_no_tower_has_is_refused(monkeypatch):
    refused(r"no stack of layers 'vision' \(it has text\)", score, model(config()), criterion="l1", stack="vision")
    text = {name: array for name, array in batch(config()).items() if name != "pixel_values"}
    for criterion in ("block_influence", "taylor"):
        refused("the calibration batches have no images", score, ONE, [text], criterion=criterion, stack="vision")
    unlabelled = batch(ONE.cfg) | {"labels": np.full((4, 9), -100)}
    refused("batches with images have no label", score, ONE, [unlabelled], criterion="taylor", stack="vision")
    monkeypatch.setitem(CRITERIA, "mine", Criterion(("layers",), "weights", lambda model: {}))
    refused("'mine' does not score the vision stack", score, ONE, criterion="mine", stack="vision")
    broken = flatten(ONE.params)
    broken["vision/layers/0/mlp/fc2/weight"] = broken["vision/layers/0/mlp/fc2/weight"] * np.nan
    broken = ONE.replace(params=unflatten(broken))
    fact = "activation scores vision/0/mlp contain NaN"
    refused(fact, score, broken, [batch(ONE.cfg)], criterion="activation", stack="vision")


# Greedy search, against the models that it chooses between, each pruned and run whole.


def batches():
    cfg = config(EQUAL)
    return [batch(cfg), batch(cfg, seed=3)]


def loss(one, data):
    total = 0.0
    for rows in data:
        logits, _ = forward(one, rows["input_ids"], attention_mask=rows["attention_mask"])
        total += mean_loss(logits, rows["labels"]) * (rows["labels"][:, 1:] != -100).sum()
    return total


def without(teacher, gone, data, solved):
    """The loss of the teacher without these layers."""
    layers = [KeptLayer.whole(i, shape) for i, shape in enumerate(teacher.cfg.text.layers) if i not in gone]
    plan = hand_plan(teacher.cfg, fingerprint(teacher), "depth", text=layers)
    pruned = apply_plan(teacher, plan)
    return loss(reconstruct(pruned, plan, teacher, data)[0] if solved else pruned, data)


@pytest.mark.parametrize("solved", [False, True])
def test_each_time_the_layer_goes_without_which_the_loss_is_least(solved):
    teacher, data = model(config(EQUAL), seed=1), batches()  # layers whose order changes as others go
    told = []
    found = score(teacher, data, criterion="greedy_loss", solved=solved, candidates=9, search=3, progress=told.append)
    gone = list(map(int, np.argsort(found.layers)))
    assert sorted(gone) == [*range(len(teacher.cfg.text.layers))]
    assert told == [
        done for cut in range(3) for done in [*[cut] * (len(gone) - cut), cut + 1]
    ]  # also of what was tried
    for so_far in range(1 if solved else 3):  # solved for, the others are judged behind the first as it was then
        before, rest = gone[:so_far], gone[so_far:]
        assert gone[so_far] == min(rest, key=lambda i: without(teacher, [*before, i], data, solved))


@pytest.mark.parametrize("candidates", [1, 3])
def test_what_a_layer_cost_before_other_cuts_is_not_taken_for_what_it_costs(monkeypatch, candidates):
    tried = []

    def loss_without(cut, layer):
        """Every cut makes all others dearer: layer i costs i + 1 at first, twice that after a cut, then three times."""
        gone = [i for i in range(5) if i not in cut.kept]
        tried.append(layer)
        return cut.loss + sum((i + 1) * (n + 1) for n, i in enumerate(gone)) + (layer + 1) * (len(gone) + 1)

    monkeypatch.setattr(greedy._Cut, "loss_without", loss_without)
    found = score(model(config(EQUAL)), batches(), criterion="greedy_loss", candidates=candidates, search=3)
    assert list(map(int, np.argsort(found.layers)))[:3] == [0, 1, 2]
    assert tried == [0, 1, 2, 3, 4, *([1, 2] if candidates == 1 else [1, 2, 3, 4, 2, 3])]


def test_an_interrupted_search_continues_with_its_trials(monkeypatch, tmp_path):
    teacher, data = model(config(EQUAL)), batches()
    options = {"criterion": "greedy_loss", "solved": True, "candidates": 2, "search": 2}
    expected = score(teacher, data, **options)
    tried, loss_without = [], greedy._Cut.loss_without
    monkeypatch.setattr(greedy._Cut, "loss_without", lambda cut, i: tried.append(i) or loss_without(cut, i))

    def stop(done):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(teacher, data, **options, progress=stop, cache=ArrayCache(tmp_path, {"of": 1}))
    first = len(tried)
    found = score(teacher, data, **options, cache=ArrayCache(tmp_path, {"of": 1}))
    assert (first, len(tried)) == (len(teacher.cfg.text.layers), first + 2)
    assert np.array_equal(found.layers, expected.layers)


def test_searches_that_are_refused():
    one = model(config(EQUAL))
    broken = one.replace(params=jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), one.params))
    for searched, options, fact in (
        (one, {"search": 5}, "search=5 must be at most 4 of the 5 layers"),
        (one, {"candidates": 0}, "candidates=0 at least 1"),
        (broken, {}, "loss of the unpruned model is not finite"),
    ):
        refused(fact, score, searched, batches(), criterion="greedy_loss", **options)
