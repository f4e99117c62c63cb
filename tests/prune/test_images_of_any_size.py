"""Pruning models whose images are of any size: gradients through grids, positions and deepstack; which layers stay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_cases import keep_layers, mean_loss

import vlmprune_jax as vp
from vlmprune_jax.config import LayerShape
from vlmprune_jax.errors import UserError
from vlmprune_jax.models.params import unstack_layers
from vlmprune_jax.models.patch_rows import patch_rows
from vlmprune_jax.models.vlm import apply
from vlmprune_jax.prune.select import moved_features

FAMILIES = ("qwen3_vl", "qwen2_5_vl")


@functools.cache
def golden(goldens, family):
    """(model, batch as its processor makes it) of rows without an image, with one and with two."""
    folder = goldens / "families" / family
    arrays = np.load(folder / "golden.npz")
    names = ("input_ids", "attention_mask", "labels", "image_grid_thw")
    rows = {name: arrays[f"batch_right_{name}"] for name in names}
    pixels = np.concatenate([arrays[f"image{k}_pixel_values"] for k in (3, 1, 2)])
    return vp.load(folder / "ckpt"), {**rows, "pixel_values": pixels}


@functools.partial(jax.jit, static_argnames="cfg")
def gradients(params, cfg, arrays, labels):
    def loss(params):
        logs = jax.nn.log_softmax(apply(params, cfg, **arrays)[0][:, :-1])
        wanted = labels[:, 1:]
        picked = jnp.take_along_axis(logs, jnp.maximum(wanted, 0)[..., None], axis=-1)[..., 0]
        keep = (wanted != -100).astype(jnp.float32)
        return -(picked * keep).sum() / keep.sum()

    return jax.grad(loss)(params)


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_equals_plain_differentiation(goldens, family):
    model, batch = golden(goldens, family)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    arrays = patch_rows(model.cfg, ids, mask, batch["pixel_values"], batch["image_grid_thw"])
    arrays = {name: array for name, array in arrays.items() if name != "deltas"}
    found = gradients(model.params, model.cfg, arrays | {"input_ids": ids, "attention_mask": mask}, batch["labels"])
    for stack in ("text", "vision"):
        scores = vp.score(model, [batch], criterion="taylor", variant="param_first", reduction="sum", stack=stack)
        weights, by = (unstack_layers(params, model.cfg, stack)[0] for params in (model.params, found))
        for i, neurons in enumerate(scores.mlp):
            expected = 0
            for name in (name for name in weights[i] if name.startswith("mlp/") and name.endswith("/weight")):
                importance = np.abs(weights[i][name] * by[i][name])
                expected += importance.sum(0 if name.split("/")[1] in ("down_proj", "fc2") else 1)
            np.testing.assert_allclose(neurons, expected, rtol=1e-4, atol=1e-7, err_msg=f"{stack} {i}")


def test_layers_with_features_stay(goldens):
    model, batch = golden(goldens, "qwen3_vl")
    scores = vp.score(model, [batch], criterion="block_influence")
    lowest = dataclasses.replace(scores, importance=np.arange(5.0))
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
        with pytest.raises(UserError, match="must be between 0 and 3"):
            vp.make_plan(lowest, model.cfg, method="depth", **options)
    with pytest.raises(UserError, match=r"decoder of 1 layers, and features .* first 2"):
        keep_layers(model, [4])
    with pytest.raises(UserError, match=r"blocks of this vision tower cannot be removed"):
        vp.make_plan(
            vp.score(model, [batch], criterion="block_influence", stack="vision"),
            model.cfg, method="depth", layers_removed=1,
        )  # fmt: skip


def test_blocks_with_windows_keep_them(goldens):
    model, batch = golden(goldens, "qwen2_5_vl")
    scores = vp.score(model, [batch], criterion="block_influence", stack="vision")
    plan = vp.make_plan(
        dataclasses.replace(scores, importance=np.array([3.0, 0, 2, 1])), model.cfg, method="depth", layers_removed=1
    )
    shorter = vp.apply_plan(model, plan).cfg.vision.layers
    assert shorter == tuple(LayerShape(5, 5, 52, window) for window in (3, 3, None))


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_a_batch(goldens, family):
    """The golden loss, and no distance from a teacher that is the model itself."""
    model, batch = golden(goldens, family)
    rows = patch_rows(
        model.cfg, batch["input_ids"], batch["attention_mask"], batch["pixel_values"], batch["image_grid_thw"]
    )
    del rows["deltas"]
    losses = vp.LossConfig(ce=1.0, kl=1.0, l2=1.0, l2_layers=(1, 2, -1))
    found = vp.losses(model, batch | rows, losses, teacher=model)
    logits, _ = vp.forward(model, **{name: array for name, array in batch.items() if name != "labels"})
    np.testing.assert_allclose(found["ce"], mean_loss(np.asarray(logits), batch["labels"]), rtol=1e-5)
    assert max(found["kl"], found["l2"]) < 1e-6
