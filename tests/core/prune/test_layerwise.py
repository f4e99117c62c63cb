"""Training of one layer at a time: from the first cut on, no worse on held-out rows, refused where it gains nothing."""

import jax
import numpy as np
import pytest
from prune_cases import EQUAL, config, missing, model, narrow, plan_for, rows

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.prune import apply_plan, layerwise
from vlmprune_jax.core.prune.reconstruction import reconstruct


def test_layers_behind_a_cut_come_nearer_to_the_dense_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(layerwise, "RATE", 3e-3)  # a small random model learns slowly
    seen, step = set(), layerwise._step

    def recorded(*arguments):
        seen.add(np.asarray(arguments[4].x).tobytes())
        return step(*arguments)

    monkeypatch.setattr(layerwise, "_step", recorded)
    teacher, batches = model(config(EQUAL)), rows(64, batch=16)
    heads, keys, neurons = tuple(range(4)), (0, 1), tuple(range(12))
    plan = plan_for(teacher, [(i, heads, keys, neurons) for i in (0, 1, 3, 4)])
    pruned = apply_plan(teacher, plan)
    solved, _ = reconstruct(pruned, plan, teacher, batches, refit=False)
    cache = ArrayCache(tmp_path / "parts", {"of": 1})
    trained, told = reconstruct(pruned, plan, teacher, batches, method="layerwise", cache=cache)
    layers = [one for one in told if one["module"] == "layer"]
    assert [one["layer"] for one in layers] == [1, 3, 4]  # from the layer before the cut on
    assert all(one["error_after"] <= one["error_before"] for one in layers)
    assert any(one["ridge"] == 0 for one in layers)
    assert len(seen) == 3 * (64 - 8) // layerwise.ROWS  # of three layers, without the rows held out
    new = rows(16, seed=1)
    errors = [sum(missing(one, teacher, batch) for batch in new) for one in (trained, solved)]
    assert errors[0] < errors[1]
    cache = ArrayCache(tmp_path / "parts", {"of": 1})
    again, same = reconstruct(pruned, plan, teacher, batches, method="layerwise", cache=cache)
    assert same == told
    assert all(map(np.array_equal, jax.tree.leaves(again.params), jax.tree.leaves(trained.params)))


def test_a_plan_without_removed_layers_is_refused():
    teacher = model(config(EQUAL))
    plan = narrow(teacher, 6)
    with pytest.raises(UserError, match="needs a plan that removes layers"):
        reconstruct(apply_plan(teacher, plan), plan, teacher, rows(), method="layerwise")
