"""Pruning models whose images are of any size: grids, positions and deepstack in gradients and layer by layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import decoder_values
from hf_cases import keep_layers, mean_loss, prune, random_ids
from prune_cases import kept_units, layer_scores, plain_gradients
from refusal import refused
from repository import load_arrays

import vlmprune_jax as vp
from vlmprune_jax.core.models.inputs import read_inputs
from vlmprune_jax.core.models.media import Packed, repack
from vlmprune_jax.core.models.params import unstack_layers
from vlmprune_jax.core.models.vlm import ENCODED, Model, encode, to_nnx
from vlmprune_jax.core.prune import KeptLayer, gptq, reconstruction
from vlmprune_jax.core.prune.batches import row_batches
from vlmprune_jax.core.prune.calibration import calibration_batches
from vlmprune_jax.core.prune.criteria.greedy import _Cut
from vlmprune_jax.core.prune.reconstruct_config import TokenWeights
from vlmprune_jax.core.prune.select import moved_features
from vlmprune_jax.core.prune.stream import LayerStream

FAMILIES = ("qwen3_vl", "qwen2_5_vl")


@functools.cache
def golden(goldens, family):
    """(model, batch as its processor makes it) of rows without an image, with one and with two."""
    folder = goldens / "families" / family
    arrays = load_arrays(folder / "golden.npz")
    names = ("input_ids", "attention_mask", "labels", "image_grid_thw")
    rows = {name: arrays[f"batch_right_{name}"] for name in names}
    pixels = np.concatenate([arrays[f"image{k}_pixel_values"] for k in (3, 1, 2)])
    return vp.load(folder / "ckpt"), {**rows, "pixel_values": pixels}


def in_rows(cfg, batch, packs):
    """The images of a processor's batch in packed rows, with the positions of its tokens."""
    images = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    inputs = read_inputs(cfg, batch["input_ids"], batch["attention_mask"], images, packs)
    placed = {} if inputs.positions is None else {"position_ids": inputs.positions}
    return {"media": inputs.media} | placed


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_equals_plain_differentiation(goldens, family):
    model, batch = golden(goldens, family)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    arrays = in_rows(model.cfg, batch, len(ids))
    found = plain_gradients(
        model.params, model.cfg, arrays | {"input_ids": ids, "attention_mask": mask}, batch["labels"]
    )
    for stack in ("text", "vision"):
        scores = vp.score(model, [batch], criterion="taylor", variant="param_first", reduction="sum", stack=stack)
        weights, by = (unstack_layers(params, model.cfg, stack)[0] for params in (model.params, found))
        for i, neurons in enumerate(scores.along("mlp")):
            expected = 0
            for name in (name for name in weights[i] if name.startswith("mlp/") and name.endswith("/weight")):
                importance = np.abs(weights[i][name] * by[i][name])
                expected += importance.sum(0 if name.split("/")[1] in ("down_proj", "fc2") else 1)
            np.testing.assert_allclose(neurons, expected, rtol=1e-4, atol=1e-7, err_msg=f"{stack} {i}")


def test_layers_with_features_stay(goldens):
    model, batch = golden(goldens, "qwen3_vl")
    lowest = vp.Scores("l1", vp.fingerprint(model), {}, layer_scores(np.arange(5.0)))
    kept = vp.make_plan(lowest, model.cfg, method="depth", layers_removed=2)
    assert kept.removed_layers == (2, 3)
    assert moved_features(kept, model.cfg) is None
    moved = vp.make_plan(lowest, model.cfg, method="depth", layers_removed=2, deepstack="move")
    assert moved.removed_layers == (0, 1)
    assert moved.options["deepstack"] == "move"
    assert "behind layers 2, 3" in moved_features(moved, model.cfg)
    pruned = vp.apply_plan(model, moved)
    images = {name: batch[name] for name in ("attention_mask", "pixel_values", "image_grid_thw")}
    logits, _ = vp.forward(pruned, batch["input_ids"], **images)
    expected, _ = vp.forward(keep_layers(model, [2, 3, 4])[0], batch["input_ids"], **images)
    np.testing.assert_array_equal(logits, expected)
    for options in ({"layers_removed": 4, "deepstack": "move"}, {"layers_removed": 4}):
        refused("must be between 0 and 3", vp.make_plan, lowest, model.cfg, method="depth", **options)
    refused(r"decoder has 1 layers, but .* first 2", keep_layers, model, [4])
    tower = dataclasses.replace(lowest, values=layer_scores(np.arange(4.0), "vision"))
    refused("layers of this vision tower cannot be removed", vp.make_plan, tower, model.cfg, method="depth", ratio=0.1)


def test_blocks_with_windows_keep_them(goldens):
    model, batch = golden(goldens, "qwen2_5_vl")
    scores = vp.score(model, [batch], criterion="block_influence", stack="vision")
    scores = dataclasses.replace(scores, values=layer_scores([3.0, 0, 2, 1], "vision"))
    plan = vp.make_plan(scores, model.cfg, method="depth", layers_removed=1)
    shorter = vp.apply_plan(model, plan).cfg.vision.layers
    assert shorter == tuple(model.cfg.vision.layers[number] for number in (0, 2, 3))
    assert [layer.mixer.window for layer in shorter] == [3, 3, None]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_a_batch(goldens, family):
    """The golden loss, and no distance from a teacher that is the model itself."""
    model, batch = golden(goldens, family)
    logits, _ = vp.forward(model, **{name: array for name, array in batch.items() if name != "labels"})
    both = vp.LossConfig(ce=1.0, kl=1.0, l2=1.0, l2_layers=(1, 2, -1))
    for packs, losses, teacher in ((3, both, model), (1, vp.LossConfig(ce=1.0), None)):
        images = in_rows(model.cfg, batch, packs)
        assert len(images["media"]["vision"].values) == packs
        found = vp.losses(model, batch | images, losses, teacher=teacher)
        np.testing.assert_allclose(found["ce"], mean_loss(np.asarray(logits), batch["labels"]), rtol=1e-5)
        assert max(found.get("kl", 0), found.get("l2", 0)) < 1e-6


def rows_apart(batch):
    """Rows without an image and with two in a batch, the one with an image in another: with other room for patches."""
    ids = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    grids, pixels = batch["image_grid_thw"], batch["pixel_values"]
    end = int(grids[0].prod())  # of the first row's image
    parts = (slice(1, 3), grids[1:], pixels[end:]), (slice(0, 1), grids[:1], pixels[:end])
    return [
        {name: array[rows] for name, array in ids.items()} | {"image_grid_thw": own, "pixel_values": values}
        for rows, own, values in parts
    ]


@functools.partial(jax.jit, static_argnames="cfg")
def _forward_of(params, cfg, arrays):
    names = ("o_proj", "down_proj")
    inputs = {name: arrays.get(name) for name in ENCODED}
    _, aux = encode(params, cfg, arrays["input_ids"], **inputs, states=tuple(range(len(cfg.text.layers) + 1)))
    blocks = decoder_values(params, cfg, arrays["input_ids"], names, **inputs)
    return aux["states"], [[block.inputs[name] for name in names] for block in blocks]


def forward_of(model, step):
    """(streams between the layers, the last one normed, and what o_proj and down_proj of each layer read) of a step."""
    arrays = step.inputs | step.context
    return jax.tree.map(np.asarray, _forward_of(model.params, model.cfg, arrays))


def normed(model, x):
    return np.asarray(to_nnx(model).text.final_norm(jnp.asarray(x)))


def of_rows(hidden, batch, step):
    """What a forward of the batch has at the real tokens of a step's rows, float[rows] of [tokens, embed]."""
    ids, real = batch["input_ids"], batch["attention_mask"] == 1
    where = {tuple(row[own]): (number, own) for number, (row, own) in enumerate(zip(ids, real, strict=True))}
    rows = (
        where[tuple(row[own == 1])]
        for row, own in zip(step.inputs["input_ids"], step.context["attention_mask"], strict=True)
        if own.any()
    )
    return np.concatenate([np.asarray(hidden)[number][own] for number, own in rows])


def test_a_batch_of_texts_is_packed_as_one_without_images(goldens):
    """A group of calibration rows may have the arrays of images, and no image."""
    cfg = golden(goldens, "qwen2_5_vl")[0].cfg
    pixels, grids = np.zeros((3, 4, cfg.vision.patch_values), np.float32), np.zeros((3, 2, 3), np.int32)
    images = repack(cfg, np.zeros((3, 5), np.int32), None, Packed(pixels, grids), 1)
    assert images.values.shape[::2] == (1, cfg.vision.patch_values)
    assert not images.grid.any()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_is_the_forward(goldens, family):
    model, batch = golden(goldens, family)
    images = {name: batch[name] for name in ("attention_mask", "pixel_values", "image_grid_thw")}
    hidden = vp.forward(model, batch["input_ids"], **images, capture=("hidden",))[1]["hidden"]
    weights = {"prompt_weight": 1.0, "image_weight": 0.5, "answer_weight": 0.25}
    means = vp.imatrix(model, rows_apart(batch), **weights).means
    stream = gptq.decoder_stream(model, rows_apart(batch), TokenWeights(**weights))
    hooks = [forward_of(model, step)[1] for step in stream.batches]
    counts = [np.asarray(step.weight, np.float64) for step in stream.batches]
    for number in range(len(model.cfg.text.layers)):
        layer, last = stream.load(number), number + 1 == len(model.cfg.text.layers)
        sums, gram, squares = gptq.finite_sums(gptq.input_sums, layer, stream, "test"), 0.0, 0.0
        stream.advance(layer)
        for step, state, hooked, count in zip(stream.batches, stream.states, hooks, counts, strict=True):
            found = normed(model, state.x) if last else state.x
            np.testing.assert_allclose(
                found[step.context["attention_mask"] == 1], of_rows(hidden[number + 1], batch, step), atol=1e-5
            )
            attended, neurons = (read.reshape(*count.shape, -1).astype(np.float64) for read in hooked[number])
            scaled = neurons * (count / np.mean(state.x**2, axis=2))[..., None]
            gram += np.einsum("bsi,bsj->ij", scaled, neurons)
            squares += np.einsum("bsi,bs->i", attended**2, count) / sum(one.sum() for one in counts)
        np.testing.assert_allclose(sums["down_proj"], gram, atol=1e-5 * gram.max())
        mean = means[f"text/layers/{number}/self_attn/o_proj/weight"]
        np.testing.assert_allclose(mean, squares, atol=1e-5 * squares.max())


def many(model, seeds):
    """Batches of two rows with an image each, padded."""
    batches = [random_ids(model, seed) for seed in seeds]
    return [one | {"attention_mask": np.pad(np.ones((2, 28), np.int32), ((0, 0), (0, 2)))} for one in batches]


def seen_streams(monkeypatch):
    """A list that gets the streams of `reconstruct`: the dense one, then the pruned model's."""
    streams = []

    class Seen(reconstruction._Repair):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            streams[:] = [self.unpruned, self]

    monkeypatch.setattr(reconstruction, "_Repair", Seen)
    return streams


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl"])  # positions as the other, and features in the decoder besides
def test_reconstruction(goldens, family, monkeypatch):
    """Features of the tower move with the cut: the dense stream has them behind layers 0 and 1, ours behind 0 and 2."""
    teacher, _ = golden(goldens, family)
    whole = [KeptLayer.whole(i, shape) for i, shape in enumerate(teacher.cfg.text.layers)]
    pruned, plan = prune(teacher, [whole[0], whole[2], kept_units(3, (2, 3), (1,), tuple(range(40))), whole[4]])
    streams = seen_streams(monkeypatch)
    solved, report = vp.reconstruct(pruned, plan, teacher, many(teacher, range(16)), image_weight=1.0)
    assert [(one["layer"], one["module"]) for one in report] == [(0, "down_proj"), (3, "o_proj"), (3, "down_proj")]
    assert all(one["ridge"] is not None and one["error_after"] < one["error_before"] for one in report)
    dense, ours, steps = *streams, streams[0].batches
    errors, weights = [], [step.weight for step in steps if step.held_out]
    for step in (step for step in steps if step.held_out):
        whole, cut = (forward_of(model, step)[0][at] for model, at in ((teacher, 2), (pruned, 1)))
        errors.append(np.mean((whole - cut) ** 2, axis=2) / np.mean(whole**2, axis=2))
    np.testing.assert_allclose(report[0]["error_before"], np.average(errors, weights=weights), rtol=1e-4)
    ours.advance(LayerStream(solved, "text", []).load(3))
    for at in (0, -1):
        real = steps[at].context["attention_mask"] == 1
        for model, stream in ((teacher, dense), (solved, ours)):
            expected = forward_of(model, steps[at])[0][-1]
            np.testing.assert_allclose(normed(model, stream.states[at].x)[real], expected[real], atol=2e-5)


@functools.partial(jax.jit, static_argnames="cfg")
def _tower(params, cfg, images):
    return to_nnx(Model(params, cfg)).vision(images)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)  # windows and gated neurons, and a table of positions
def test_towers_are_reconstructed(goldens, family, monkeypatch):
    """Images of several sizes beside each other, each with its own rows, columns and windows."""
    teacher, _ = golden(goldens, family)
    sizes = [layer.sizes for layer in teacher.cfg.vision.layers]
    layers = [
        kept_units(i, range(x["q_heads"]), range(x["kv_heads"]), range(0, x["mlp"], 2)) for i, x in enumerate(sizes)
    ]
    pruned, plan = prune(teacher, layers, "vision")
    streams = seen_streams(monkeypatch)
    batches = many(teacher, range(16))
    solved, report = vp.reconstruct(pruned, plan, teacher, batches)
    assert [(one["stack"], one["module"]) for one in report] == [("vision", "down_proj")] * len(layers)
    assert all(one["ridge"] is not None and one["error_after"] < one["error_before"] for one in report)
    dense, ours, steps = *streams, streams[0].batches
    images = np.concatenate([batch["image_grid_thw"].reshape(-1, 3) for batch in batches])
    packed = [grid for step in steps for grid in step.inputs["media"]["vision"].grid.reshape(-1, 3) if grid.any()]
    assert sorted(map(tuple, packed)) == sorted(map(tuple, images))
    assert sum(int(step.weight.sum()) for step in steps) == images.prod(axis=1).sum()
    ours.advance(LayerStream(solved, "vision", []).load(len(layers) - 1))
    for at in (0, -1):
        real, inputs = steps[at].weight == 1, steps[at].inputs
        for model, stream in ((teacher, dense), (solved, ours)):
            norm, x = to_nnx(model).vision.post_layernorm, stream.states[at].x
            found = x if norm is None else np.asarray(norm(jnp.asarray(x)))
            expected = _tower(model.params, model.cfg, inputs["media"]["vision"])
            np.testing.assert_allclose(found[real], np.asarray(expected)[real], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_search_counts_places_anew(goldens, family):
    """What each cut costs is the loss of the model without these layers, whose first layers have the features."""
    model, batch = golden(goldens, family)
    arrays = {name: array for name, array in batch.items() if name != "labels"}
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    options = {"prompt_weight": 1.0, "image_weight": 1.0, "answer_weight": 1.0}
    rows = row_batches(list(calibration_batches([batch], model.cfg, labels=True)), options)
    cut = _Cut(model, rows, solved=False)
    for gone in ([], [0]):
        for layer in gone:
            cut.remove(layer)
        for layer in cut.kept:
            left, _ = keep_layers(model, [i for i in cut.kept if i != layer])
            expected = tokens * mean_loss(vp.forward(left, **arrays)[0], batch["labels"])
            np.testing.assert_allclose(cut.loss_without(layer), expected, rtol=1e-5)
