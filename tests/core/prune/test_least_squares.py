"""Repair of the weights that read the stream: what is merged, when it is tried, and that it never does harm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prune_cases import EQUAL, config, missing, model, narrow, rows

from vlmprune_jax.core.prune import apply_plan
from vlmprune_jax.core.prune.layers import Layer
from vlmprune_jax.core.prune.reconstruction import reconstruct

SHAPES = {"sequential": {"qk_norm": True}, "parallel": {"parallel": True, "norm": "layer", "gated": False}}


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_weights_read_the_changed_input(shape):
    whole = model(config(EQUAL, **SHAPES[shape]))
    layer = Layer.of(whole.replace(params=jax.tree.map(jnp.asarray, whole.params)), "text", 1)
    draw = np.random.default_rng(0)
    change, x = draw.normal(size=(layer.cfg.hidden_size,) * 2), draw.normal(size=(7, layer.cfg.hidden_size))
    merged = layer.reading(change.astype(np.float32), "mlp")
    own, theirs = ("mlp/fc1/weight",), ("self_attn/q_proj/weight",)
    if shape == "sequential":
        own = ("mlp/gate_proj/weight", "mlp/up_proj/weight")
    names = {*own, *((f"self_attn/{name}_proj/weight" for name in "qkv") if shape == "parallel" else ())}
    assert set(merged.changes_from(layer)) == names
    for path in own:
        before, after = (np.asarray(one.params[path], np.float64) for one in (layer, merged))
        np.testing.assert_allclose(x @ after.T, (x + x @ change) @ before.T, atol=1e-4)
    changed = {path for path in layer.params if not jnp.array_equal(layer.params[path], merged.params[path])}
    assert changed == names
    assert shape == "parallel" or theirs[0] not in changed


@pytest.mark.parametrize("shape", SHAPES)
def test_readers_help_where_much_is_removed_and_only_there(shape):
    teacher, batches = model(config(EQUAL, **SHAPES[shape])), rows(64, batch=16)
    plan = narrow(teacher, 3)
    pruned = apply_plan(teacher, plan)
    without, told = reconstruct(pruned, plan, teacher, batches, readers="none")
    assert {one["module"] for one in told} == {"down_proj"}
    found, told = reconstruct(pruned, plan, teacher, batches)
    readers = [one for one in told if one["module"] in ("self_attn", "mlp")]
    assert readers[0]["ridge"] is None  # the first layer reads the same embeddings
    accepted = [one for one in readers if one["ridge"] is not None]
    assert accepted
    assert all(one["error_after"] < one["error_before"] for one in accepted)
    new = rows(16, seed=1)
    errors = [sum(missing(one, teacher, batch) for batch in new) for one in (found, without, pruned)]
    assert errors[0] < errors[1] < errors[2]
    half = narrow(teacher, 6)
    _, told = reconstruct(apply_plan(teacher, half), half, teacher, batches)
    assert {one["module"] for one in told} == {"down_proj"}
