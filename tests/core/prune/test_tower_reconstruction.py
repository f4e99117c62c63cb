"""Reconstruction of towers: against normal equations in float64, before the decoder, and each image once."""

import jax
import numpy as np
import pytest
from block_cases import assert_changed_by, real_values, solved_change
from prune_cases import hand_plan, kept_units, seeing
from refusal import refused
from stack_cases import tower_layer

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.core.config import PatchConfig
from vlmprune_jax.core.models.params import unstack_layers
from vlmprune_jax.core.models.vlm import forward
from vlmprune_jax.core.prune import apply_plan, fingerprint
from vlmprune_jax.core.prune.reconstruction import layers_to_solve, reconstruct

TOWER = (tower_layer(2, 2, 10),) * 4
HEADS = (0, 1)
WHOLE = tuple(range(10))
NEURONS = [kept_units(0, HEADS, HEADS, WHOLE[:6]), kept_units(1, (1,), (1,), WHOLE), kept_units(3, HEADS, HEADS, WHOLE)]
DEPTH = [kept_units(i, HEADS, HEADS, WHOLE) for i in (0, 1, 3)]
SCALED = {"layer_scale": True, "class_token": False, "patches": PatchConfig(bias=True), "pre_norm": False}


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


def blocks(one, batches):
    return real_values(one, {"images": batches[0]["pixel_values"][:, 0]}, names=("down_proj",))


def test_the_layer_before_a_cut_equals_normal_equations_in_float64():
    """With layer scale, what the weight writes is solved for, not the weight."""
    teacher, batches = seeing(TOWER, **SCALED), rows()
    plan = plan_for(teacher, vision=DEPTH)
    pruned = apply_plan(teacher, plan)
    solved, (told,) = reconstruct(pruned, plan, teacher, batches)
    assert (told["stack"], told["layer"], told["module"]) == ("vision", 1, "down_proj")
    assert told["ridge"] is not None
    assert told["error_after"] < told["error_before"]
    dense, ours = blocks(teacher, batches), blocks(pruned, batches)
    target, residual = dense[2]["after"], dense[2]["after"] - ours[1]["after"]
    change = solved_change(ours[1]["down_proj"], residual, target, told["ridge"])
    change /= unstack_layers(pruned.params, pruned.cfg, "vision")[0][1]["layer_scale2/weight"]
    assert_changed_by(change, 1, "mlp/fc2", pruned, solved, stack="vision")
    texts = zip(*(jax.tree.leaves(one.params["text"]) for one in (solved, pruned)), strict=True)
    assert all(np.array_equal(*pair) for pair in texts)


@pytest.mark.slow
def test_the_tower_comes_before_the_decoder_that_reads_it(tmp_path):
    teacher, batches = seeing(TOWER), rows(32)
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
    teacher, batches = seeing(TOWER), rows()
    kept = [kept_units(1, HEADS, HEADS, WHOLE[:5]), *(kept_units(i, HEADS, HEADS, WHOLE) for i in (2, 3))]
    plan = plan_for(teacher, vision=kept)
    pruned = apply_plan(teacher, plan)
    _, (told,) = reconstruct(pruned, plan, teacher, batches, held_out=0.9)
    dense, ours = blocks(teacher, batches)[1]["after"], blocks(pruned, batches)[0]["after"]
    relative = ((dense - ours) ** 2).mean(1) / (dense**2).mean(1)
    assert abs(told["error_before"] - relative.mean()) < 0.2 * relative.mean()


def test_images_are_held_out_once():
    teacher = seeing(TOWER)
    plan = plan_for(teacher, vision=DEPTH)
    refused("at least 2 calibration images", reconstruct, apply_plan(teacher, plan), plan, teacher, rows(same=True))
