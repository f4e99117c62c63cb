"""What changes no score of any criterion: how calibration rows are cut, ordered and padded, and the mesh."""

import functools

import numpy as np
import pytest
from prune_cases import batch, on_mesh, seeing
from stack_cases import tower_layer

from vlmprune_jax.core.prune import CRITERIA, score

ONE = seeing((tower_layer(2, 2, 10),) * 3)
ROWS = batch(ONE.cfg, rows=8)
ROWS["labels"][:, 0] = -100  # nothing predicts the first token, unless padding is before it
OPTIONS = {
    "angular": {"layers_removed": 2}, "taylor": {"variant": "param_mix"}, "greedy_loss": {"candidates": 2, "search": 3}
}  # fmt: skip
ALL = [(name, stack) for name, one in CRITERIA.items() if one.scores != ("experts",) for stack in one.stacks]


def scores(one, criterion, stack, batches):
    return score(one, batches, criterion=criterion, stack=stack, **OPTIONS.get(criterion, {})).values


@functools.cache
def scores_of_one_batch(criterion, stack):
    return scores(ONE, criterion, stack, [taken(range(8 if stack == "text" else 7))])  # the last row has no image


def assert_near(found, expected):
    for key, values in expected.items():
        largest = np.abs(values[np.isfinite(values)]).max()
        np.testing.assert_allclose(found[key], values, rtol=2e-4, atol=1e-6 * largest, err_msg=str(key))


def taken(rows, left=False):
    """Some rows as a batch, on request with their padding on the left."""
    found = {name: array[rows] for name, array in ROWS.items()}
    if left:
        shifts = 9 - found["attention_mask"].sum(axis=1)
        for name in ("input_ids", "attention_mask", "labels"):
            found[name] = np.stack([np.roll(row, shift) for row, shift in zip(found[name], shifts, strict=True)])
    return found


@pytest.mark.parametrize(("criterion", "stack"), ALL)
def test_rows_may_be_cut_ordered_and_padded_in_any_way(criterion, stack):
    text = {name: array for name, array in taken([7]).items() if name != "pixel_values"}
    filler = {name: np.full_like(array, -100 if name == "labels" else 0) for name, array in taken([0, 1]).items()}
    found = scores(ONE, criterion, stack, [taken([6, 1, 4], left=True), text, taken([0, 5, 3, 2]), filler])
    assert_near(found, scores_of_one_batch(criterion, stack))


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "stack"), ALL)
def test_a_mesh_gives_the_same_scores(criterion, stack):
    batches = [taken([0, 1, 2]), taken(range(3, 8 if stack == "text" else 7))]
    assert_near(scores(on_mesh(ONE, 2, 2, 2), criterion, stack, batches), scores_of_one_batch(criterion, stack))
