"""Positions of text and images in three rows: those of transformers, and grids that do not fit."""

import numpy as np
import pytest

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.models.positions import mrope_positions

IMAGE = 354


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("case", ["single", "two", "text", "tiny", "batch_left", "batch_right"])
def test_positions_of_transformers(goldens, family, case):
    arrays = np.load(goldens / "families" / family / "golden.npz")
    ids, grids = np.atleast_2d(arrays[f"{case}_input_ids"]), arrays.get(f"{case}_image_grid_thw")
    mask = arrays.get(f"{case}_attention_mask")
    positions, deltas = mrope_positions(ids, mask, grids, IMAGE, 2)
    expected = arrays[f"{case}_position_ids"]
    expected = expected.swapaxes(0, 1) if case.startswith("batch") else expected[None]
    real = np.ones(ids.shape, bool) if mask is None else mask != 0
    for found, stored, row in zip(positions, expected, real, strict=True):
        np.testing.assert_array_equal(found[:, row], stored[:, row])
    np.testing.assert_array_equal(deltas, arrays[f"{case}_rope_delta"])
    if case.startswith("batch"):  # the images of its rows, in slots
        slots = np.stack([[grids[0], [0] * 3], np.zeros((2, 3), int), grids[1:]])
        by_row, _ = mrope_positions(ids, mask, slots, IMAGE, 2)
        np.testing.assert_array_equal(by_row, positions)


ROWS = np.array([[1, IMAGE, IMAGE, 1, 1], [1, 1, IMAGE, IMAGE, IMAGE]])


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        (None, r"row 0 has 2 image tokens, but its image_grid_thw \[\] need 0"),
        ([[1, 2, 4], [1, 4, 4]], "row 1 has 3 image tokens, .* need 4"),
        ([[1, 2, 4], [1, 2, 6], [1, 2, 2]], "row 1 has 3 image tokens, .* need 4"),
        ([[[1, 2, 4]], [[0, 0, 0]]], "row 1 has 3 image tokens, .* need 0"),
        ([[1, 2, 4], [1, 3, 4]], r"\[1, 3, 4\]: .* multiples of 2"),
        ([[1, 2, 4], [3, 2, 2]], r"\[3, 2, 2\] has several frames"),
        ([[2, 4], [2, 6]], r"has shape \[2, 2\]"),
        ([[1, 2, 2], [1, 2, 2], [1, 2, 6]], None),
        ([[[0, 0, 0], [1, 2, 4]], [[1, 6, 2], [0, 0, 0]]], None),
    ],
)
def test_grids_that_do_not_fit(grids, said):
    if said is None:
        mrope_positions(ROWS, None, grids, IMAGE, 2)
        return
    with pytest.raises(UserError, match=said):
        mrope_positions(ROWS, None, grids, IMAGE, 2)


def test_text_among_the_tokens_of_an_image():
    with pytest.raises(UserError, match="text tokens interrupt"):
        mrope_positions([[IMAGE, 1, IMAGE]], None, [[1, 2, 4]], IMAGE, 2)
