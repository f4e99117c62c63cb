"""Reconstruction of towers: against normal equations in float64, before the decoder, and each image once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import tower_values
from media_cases import packed
from prune_cases import EQUAL, config, hand_plan, kept_units, model
from stack_cases import tower_layer, with_facts

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import PatchConfig
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.models.vlm import Model, forward, to_nnx
from vlmprune_jax.core.prune import apply_plan, fingerprint
from vlmprune_jax.core.prune.reconstruction import layers_to_solve, reconstruct

TOWER = (tower_layer(2, 2, 10),) * 4
HEADS = (0, 1)
WHOLE = tuple(range(10))
NEURONS = [kept_units(0, HEADS, HEADS, WHOLE[:6]), kept_units(1, (1,), (1,), WHOLE), kept_units(3, HEADS, HEADS, WHOLE)]
DEPTH = [kept_units(i, HEADS, HEADS, WHOLE) for i in (0, 1, 3)]
SCALED = {"layer_scale": True, "class_token": False, "patches": PatchConfig(bias=True), "pre_norm": False}


def seeing(**changes):
    cfg = config(EQUAL, vision=True)
    vision = with_facts(dataclasses.replace(cfg.vision, n_layers_total=4, layers=TOWER), **changes)
    select = "patch" if vision.class_token else "full"
    return model(dataclasses.replace(cfg, vision=vision, feature_select=select))


def plan_for(teacher, **stacks):
    """A plan that keeps these layers of stacks, and all others whole."""
    return hand_plan(teacher.cfg, fingerprint(teacher), **stacks)


def rows(number=16, seed=0, same=False):
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 61, (number, 9))
    ids[:, 1:5] = 61
    pixels = draw.standard_normal((number, 1, 3, 6, 6)).astype(np.float32)
    if same:
        pixels[:] = pixels[:1]
    return [{"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": pixels}]


@functools.partial(jax.jit, static_argnames="cfg")
def hooked(params, cfg, images):
    found = tower_values(to_nnx(Model(params, cfg)).vision, packed(images), ("o_proj", "down_proj"))
    return [block._replace(block=None) for block in found]


def blocks(one, batches):
    """Per layer (before, after, what fc2 reads), float64[images * positions, ...]."""
    images = jnp.asarray(batches[0]["pixel_values"][:, 0])
    found = hooked(jax.tree.map(jnp.asarray, one.params), one.cfg, images)
    return [
        [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (b.before, b.after, b.inputs["down_proj"])]
        for b in found
    ]


def test_the_layer_before_a_cut_equals_normal_equations_in_float64():
    """With layer scale, what the weight writes is solved for, not the weight."""
    teacher, batches = seeing(**SCALED), rows()
    plan = plan_for(teacher, vision=DEPTH)
    pruned = apply_plan(teacher, plan)
    solved, (told,) = reconstruct(pruned, plan, teacher, batches)
    assert (told["stack"], told["layer"], told["module"]) == ("vision", 1, "down_proj")
    assert told["ridge"] is not None
    assert told["error_after"] < told["error_before"]
    dense, ours = blocks(teacher, batches), blocks(pruned, batches)
    target, residual = dense[2][1], dense[2][1] - ours[1][1]
    x = np.concatenate([ours[1][2], np.ones((len(target), 1))], axis=1)
    weighted = x / np.mean(target**2, axis=1, keepdims=True)
    gram, cross = weighted.T @ x, weighted.T @ residual
    change = np.linalg.solve(gram + told["ridge"] * np.diag(np.diag(gram)), cross)
    before, after = (flatten(one.params["vision"]["layers"]["0"]) for one in (pruned, solved))
    change = change / before["layer_scale2/weight"][1]
    found = [np.asarray(after[f"mlp/fc2/{part}"])[1] - before[f"mlp/fc2/{part}"][1] for part in ("weight", "bias")]
    scale = np.abs(change).max()
    np.testing.assert_allclose(found[0].T, change[:-1], atol=1e-4 * scale, rtol=0)
    np.testing.assert_allclose(found[1], change[-1], atol=1e-4 * scale, rtol=0)
    others = {path for path in before if not np.array_equal(before[path], after[path])}
    assert others == {"mlp/fc2/weight", "mlp/fc2/bias"}
    texts = zip(*(jax.tree.leaves(one.params["text"]) for one in (solved, pruned)), strict=True)
    assert all(np.array_equal(*pair) for pair in texts)


@pytest.mark.slow
def test_the_tower_comes_before_the_decoder_that_reads_it(tmp_path):
    teacher, batches = seeing(), rows(32)
    text = [kept_units(i, tuple(range(4)), HEADS, tuple(range(9))) for i in (1, 2, 3, 4)]
    plan = plan_for(teacher, vision=NEURONS, text=text)
    pruned, seen = apply_plan(teacher, plan), list[int]()
    solved, report = reconstruct(pruned, plan, teacher, batches, progress=seen.append)
    assert seen == [*range(1, layers_to_solve(plan) + 1)] == [*range(1, 8)]
    assert [(one["stack"], one["layer"], one["module"]) for one in report] == [
        ("vision", 0, "down_proj"), ("vision", 1, "o_proj"), ("vision", 1, "down_proj"),
        *(("text", i, "down_proj") for i in (1, 2, 3, 4)),
    ]  # fmt: skip
    assert all(one["error_after"] <= one["error_before"] for one in report)
    new = rows(8, seed=1)[0]

    def error(one, name):
        ours, wanted = (forward(m, **new, capture=("image_features", "hidden"))[1] for m in (one, teacher))
        ours, wanted = (aux[name] if name == "image_features" else aux["hidden"][-1] for aux in (ours, wanted))
        return float(((ours - wanted) ** 2).mean())

    assert error(solved, "image_features") < 0.8 * error(pruned, "image_features")
    assert error(solved, "hidden") < error(pruned, "hidden")
    # the decoder is fitted to what the solved tower sees: the same from the tower's model alone
    alone = plan_for(teacher, vision=NEURONS)
    tower, _ = reconstruct(apply_plan(teacher, alone), alone, teacher, batches)
    pairs = zip(*(jax.tree.leaves(one.params["vision"]) for one in (tower, solved)), strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)

    def stop(done):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(pruned, plan, teacher, batches, progress=stop, cache=ArrayCache(tmp_path / "parts", {"of": 1}))
    cache = ArrayCache(tmp_path / "parts", {"of": 1})
    assert cache.missing(["vision/0/down_proj", *(f"text/{i}/down_proj" for i in range(3))]) == ["text/2/down_proj"]
    again, told = reconstruct(pruned, plan, teacher, batches, cache=cache)
    assert told == report
    assert all(
        np.array_equal(*pair) for pair in zip(*(jax.tree.leaves(m.params) for m in (again, solved)), strict=True)
    )


@pytest.mark.slow
def test_a_first_layer_that_goes_is_part_of_the_target():
    """Nothing before it can make up for it, but what follows is measured against a stream that went through it."""
    teacher, batches = seeing(), rows()
    kept = [kept_units(1, HEADS, HEADS, WHOLE[:5]), *(kept_units(i, HEADS, HEADS, WHOLE) for i in (2, 3))]
    plan = plan_for(teacher, vision=kept)
    pruned = apply_plan(teacher, plan)
    _, (told,) = reconstruct(pruned, plan, teacher, batches, held_out=0.9)
    dense, ours = blocks(teacher, batches)[1][1], blocks(pruned, batches)[0][1]
    relative = ((dense - ours) ** 2).mean(1) / (dense**2).mean(1)
    assert abs(told["error_before"] - relative.mean()) < 0.2 * relative.mean()


def test_images_are_held_out_once():
    teacher = seeing()
    plan = plan_for(teacher, vision=DEPTH)
    with pytest.raises(UserError, match="at least 2 calibration images, one for the fit and one held out"):
        reconstruct(apply_plan(teacher, plan), plan, teacher, rows(same=True))
