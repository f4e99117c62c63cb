"""Scores of the vision stack against the same quantities computed apart, in float64 or by plain differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import packed, real_values
from prune_cases import batch, config, model, seeing
from refusal import refused
from stack_cases import tower_layer

from vlmprune_jax.core.models.params import flatten, unflatten, unstack_layers
from vlmprune_jax.core.models.vlm import apply
from vlmprune_jax.core.prune import CRITERIA, Criterion, Scores, score
from vlmprune_jax.io.exports.pruning import make_plan

SHAPES = (tower_layer(2, 2, 10), tower_layer(2, 2, 10), tower_layer(4, 4, 6))
ONE = seeing(SHAPES, layer_scale=True)


def test_layers_equal_cosines_in_float64():
    arrays = batch(ONE.cfg)
    blocks = real_values(ONE, {"images": arrays["pixel_values"][:-1, 0]}, names=())  # of the images that rows have

    def cosine(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    influence = score(ONE, [arrays], criterion="block_influence", stack="vision").layers
    np.testing.assert_allclose(influence, [np.mean(1 - cosine(b["before"], b["after"])) for b in blocks], rtol=1e-4)
    # every position of an image is looked at, not the last alone
    found = score(ONE, [arrays], criterion="angular", layers_removed=2, stack="vision").layers
    states = [b["before"] for b in blocks] + [blocks[-1]["after"]]
    angles = [np.mean(np.arccos(cosine(states[i], states[i + 2]))) / np.pi for i in (0, 1)]
    np.testing.assert_allclose(found, [*angles, np.inf], rtol=1e-4)


@pytest.mark.slow
def test_taylor_equals_plain_differentiation():
    arrays = batch(ONE.cfg)
    params = jax.tree.map(jnp.asarray, ONE.params)

    def row_losses(layers):
        filled = {**params, "vision": {**params["vision"], "layers": layers}}
        logits, _ = apply(
            filled, ONE.cfg, jnp.asarray(arrays["input_ids"]), media={"vision": packed(arrays["pixel_values"])},
            attention_mask=jnp.asarray(arrays["attention_mask"]),
        )  # fmt: skip
        wanted = jnp.asarray(arrays["labels"])[:, 1:]
        logs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.maximum(wanted, 0)[..., None], 2)[..., 0]
        return -jnp.sum(jnp.where(wanted != -100, logs, 0.0), axis=1)

    gradients = flatten(jax.jit(jax.jacrev(row_losses))(params["vision"]["layers"]))
    labels = (arrays["labels"][:, 1:] != -100).sum(1)
    weights = flatten(params["vision"]["layers"])
    names = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "self_attn/out_proj", "mlp/fc1", "mlp/fc2")
    for variant in ("param_first", "param_mix"):
        found = score(ONE, [arrays], criterion="taylor", variant=variant, stack="vision")
        for layer, (run, index) in enumerate((("0", 0), ("0", 1), ("1", 0))):
            units = [
                channel_scores(weights, gradients, f"{run}/{name}/weight", index, labels, variant) for name in names
            ]
            np.testing.assert_allclose(found.along("kv_heads")[layer], sum(units[:4]), rtol=1e-4)
            np.testing.assert_allclose(found.along("mlp")[layer], sum(units[4:]), rtol=1e-4)


def channel_scores(weights, gradients, path, index, labels, variant):
    """Of one weight, a head's channels summed; `gradients` of each row's summed loss."""
    w, rows = (np.asarray(flat[path], np.float64) for flat in (weights, gradients))
    w, rows = w[index], rows[:, index]
    g = rows.sum(0) / labels.sum()
    a = np.mean([(row / n) ** 2 for row, n in zip(rows, labels, strict=True)], axis=0)
    axis = 0 if "out_proj" in path or "fc2" in path else -1
    channels = np.abs(w * g - (w * a * w / 2 if variant == "param_mix" else 0)).sum(axis)
    return channels.sum(1) if channels.ndim == 2 else channels


@pytest.mark.parametrize("criterion", [name for name, one in CRITERIA.items() if "vision" in one.stacks])
def test_every_criterion_scores_it_and_makes_a_plan(criterion, tmp_path):
    options = {"layers_removed": 2} if criterion == "angular" else {}
    found = score(ONE, [batch(ONE.cfg)], criterion=criterion, stack="vision", **options)
    found.save(tmp_path / "scores.npz")
    again = Scores.load(tmp_path / "scores.npz")
    assert (again.components, again.criterion) == (("vision",), criterion)
    if not found.axes:
        plan = make_plan(again, ONE.cfg, method="depth", layers_removed=2 if options else 1)
    else:
        plan = make_plan(again, ONE.cfg, method="width", ratio=0.02)
    assert plan.stacks["text"].is_whole
    assert not plan.stacks["vision"].is_whole


def test_magnitude_sums_the_towers_weights():
    found = score(ONE, criterion="l2", stack="vision", reduction="sum")
    layers, _ = unstack_layers(ONE.params, ONE.cfg, "vision")
    for i, layer in enumerate(layers):
        squares = {name: np.asarray(leaf, np.float64) ** 2 for name, leaf in layer.items()}
        expected = squares["mlp/fc1/weight"].sum(1) + squares["mlp/fc2/weight"].sum(0)
        np.testing.assert_allclose(found.along("mlp")[i], expected, rtol=1e-5)


def test_what_cannot_be_scored_is_refused(monkeypatch):
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
