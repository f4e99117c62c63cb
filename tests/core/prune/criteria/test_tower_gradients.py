"""Scores of the vision stack against the same quantities computed apart, in float64 or by plain differentiation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import tower_values
from media_cases import packed
from prune_cases import batch, config, model, on_mesh
from stack_cases import tower_layer, with_facts

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.params import flatten, unflatten, unstack_layers
from vlmprune_jax.core.models.vlm import Model, apply, to_nnx
from vlmprune_jax.core.prune import CRITERIA, Criterion, Scores, score
from vlmprune_jax.io.exports.pruning import make_plan

SCALES = {"self_attn/out_proj/weight": "layer_scale1/weight", "mlp/fc2/weight": "layer_scale2/weight"}
SHAPES = (tower_layer(2, 2, 10), tower_layer(2, 2, 10), tower_layer(4, 4, 6))


def seeing():
    """A model whose tower has unequal layers, and InternViT's scaled branches."""
    cfg = config(vision=True)
    vision = with_facts(dataclasses.replace(cfg.vision, n_layers_total=3, layers=SHAPES), layer_scale=True)
    return model(dataclasses.replace(cfg, vision=vision))


@functools.partial(jax.jit, static_argnames="cfg")
def hooked(params, cfg, images):
    found = tower_values(to_nnx(Model(params, cfg)).vision, packed(images), ("o_proj", "down_proj"))
    return [block._replace(block=None) for block in found]


def of_real_images(one, arrays):
    """Per layer what `BlockValues` has, as float64[images * positions, ...], of those images that the rows have."""
    images = jnp.asarray(arrays["pixel_values"][:-1, 0])
    for block in hooked(jax.tree.map(jnp.asarray, one.params), one.cfg, images):
        parts = {"before": block.before, "after": block.after, **block.inputs}
        yield {name: np.asarray(x, np.float64).reshape(-1, *x.shape[2:]) for name, x in parts.items()}


def test_a_tap_sees_the_blocks_of_the_tower():
    """What a block adds to the stream are the products of what it hooks, scaled."""
    one = seeing()
    blocks = list(of_real_images(one, batch(one.cfg)))
    for i, (block, layer) in enumerate(zip(blocks, unstack_layers(one.params, one.cfg, "vision")[0], strict=True)):
        total = block["before"]
        for name, path in zip(("o_proj", "down_proj"), SCALES, strict=True):
            x, weight = block[name].reshape(len(total), -1), layer[path].reshape(8, -1)
            total = total + (x @ weight.T + layer[path.replace("weight", "bias")]) * layer[SCALES[path]]
        np.testing.assert_allclose(total, block["after"], atol=1e-5)
        if i + 1 < len(blocks):
            np.testing.assert_array_equal(block["after"], blocks[i + 1]["before"])


@pytest.mark.parametrize("criterion", ["activation", "fluctuation"])
def test_widths_equal_sums_in_float64(criterion):
    one = seeing()
    arrays = batch(one.cfg)
    found = score(one, [arrays], criterion=criterion, stack="vision")
    layers, _ = unstack_layers(one.params, one.cfg, "vision")
    for i, (block, layer) in enumerate(zip(of_real_images(one, arrays), layers, strict=True)):
        expected = []
        for name, path in zip(("o_proj", "down_proj"), SCALES, strict=True):
            x, weight = block[name].reshape(len(block[name]), -1), layer[path].reshape(8, -1)
            norm = np.linalg.norm(weight * layer[SCALES[path]][:, None], axis=0)
            expected.append((x**2).mean(0) ** 0.5 * norm if criterion == "activation" else x.var(0) * norm**2)
        np.testing.assert_allclose(
            found.along("kv_heads")[i], expected[0].reshape(SHAPES[i].mixer.kv_heads, -1).sum(1), rtol=2e-4
        )
        np.testing.assert_allclose(found.along("mlp")[i], expected[1], rtol=2e-4, atol=1e-6 * expected[1].max())


def test_layers_equal_cosines_in_float64():
    one = seeing()
    arrays = batch(one.cfg)
    blocks = list(of_real_images(one, arrays))

    def cosine(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    influence = score(one, [arrays], criterion="block_influence", stack="vision").layers
    np.testing.assert_allclose(influence, [np.mean(1 - cosine(b["before"], b["after"])) for b in blocks], rtol=1e-4)
    # every position of an image is looked at, not the last alone
    found = score(one, [arrays], criterion="angular", layers_removed=2, stack="vision").layers
    states = [b["before"] for b in blocks] + [blocks[-1]["after"]]
    angles = [np.mean(np.arccos(cosine(states[i], states[i + 2]))) / np.pi for i in (0, 1)]
    np.testing.assert_allclose(found, [*angles, np.inf], rtol=1e-4)


@pytest.mark.slow
def test_taylor_equals_plain_differentiation():
    one = seeing()
    arrays = batch(one.cfg)
    params = jax.tree.map(jnp.asarray, one.params)

    def row_losses(layers):
        filled = {**params, "vision": {**params["vision"], "layers": layers}}
        logits, _ = apply(
            filled, one.cfg, jnp.asarray(arrays["input_ids"]), media={"vision": packed(arrays["pixel_values"])},
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
        found = score(one, [arrays], criterion="taylor", variant=variant, stack="vision")
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


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["activation", "taylor"])
def test_batches_text_alone_and_a_mesh_do_not_change_it(criterion):
    one = seeing()
    whole = batch(one.cfg, rows=8)
    parts = [{name: array[at : at + 4] for name, array in whole.items()} for at in (0, 4)]
    text = {name: array for name, array in batch(config()).items() if name != "pixel_values"}
    expected = score(one, [whole], criterion=criterion, stack="vision")
    other, batches = (on_mesh(one, 2, 2, 2), [whole]) if criterion == "taylor" else (one, [text, *parts])
    found = score(other, batches, criterion=criterion, stack="vision")
    for name, values in expected._arrays().items():
        np.testing.assert_allclose(found._arrays()[name], values, rtol=2e-5)


@pytest.mark.parametrize("criterion", [name for name, one in CRITERIA.items() if "vision" in one.stacks])
def test_every_criterion_scores_it_and_makes_a_plan(criterion, tmp_path):
    one = seeing()
    options = {"layers_removed": 2} if criterion == "angular" else {}
    found = score(one, [batch(one.cfg)], criterion=criterion, stack="vision", **options)
    found.save(tmp_path / "scores.npz")
    again = Scores.load(tmp_path / "scores.npz")
    assert (again.components, again.criterion) == (("vision",), criterion)
    if not found.axes:
        plan = make_plan(again, one.cfg, method="depth", layers_removed=2 if options else 1)
    else:
        plan = make_plan(again, one.cfg, method="width", ratio=0.02)
    assert plan.stacks["text"].is_whole
    assert not plan.stacks["vision"].is_whole


def test_magnitude_sums_the_towers_weights():
    one = seeing()
    found = score(one, criterion="l2", stack="vision", reduction="sum")
    layers, _ = unstack_layers(one.params, one.cfg, "vision")
    for i, layer in enumerate(layers):
        squares = {name: np.asarray(leaf, np.float64) ** 2 for name, leaf in layer.items()}
        np.testing.assert_allclose(
            found.along("mlp")[i], squares["mlp/fc1/weight"].sum(1) + squares["mlp/fc2/weight"].sum(0), rtol=1e-5
        )


def test_what_cannot_be_scored_is_refused(monkeypatch):
    one = seeing()
    with pytest.raises(UserError, match=r"this model has no stack of layers 'vision' \(it has text\)"):
        score(model(config()), criterion="l1", stack="vision")
    text = {name: array for name, array in batch(config()).items() if name != "pixel_values"}
    for criterion in ("block_influence", "taylor"):
        with pytest.raises(UserError, match="the calibration batches have no images, which scores of vision need"):
            score(one, [text], criterion=criterion, stack="vision")
    unlabelled = batch(one.cfg) | {"labels": np.full((4, 9), -100)}
    with pytest.raises(UserError, match="the calibration batches with images have no label"):
        score(one, [unlabelled], criterion="taylor", stack="vision")
    monkeypatch.setitem(CRITERIA, "mine", Criterion(("layers",), "weights", lambda model: {}))
    with pytest.raises(UserError, match="criterion 'mine' does not score the vision stack: use block_influence"):
        score(one, criterion="mine", stack="vision")
    broken = flatten(one.params)
    broken["vision/layers/0/mlp/fc2/weight"] = broken["vision/layers/0/mlp/fc2/weight"] * np.nan
    with pytest.raises(UserError, match="activation scores vision/0/mlp contain NaN"):
        score(one.replace(params=unflatten(broken)), [batch(one.cfg)], criterion="activation", stack="vision")
