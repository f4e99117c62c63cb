"""Positions of text and images in three rows: those of transformers, and grids that do not fit."""

import numpy as np
import pytest

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.media import mrope_positions

IMAGE, VIDEO = 354, 355


def positions_of(ids, mask, grids, seconds=None, per_second=0.0):
    tokens = {"tokens": (IMAGE, VIDEO), "merge": 2, "tokens_per_second": per_second}
    if grids is not None and np.ndim(grids) == 2:  # of all rows together
        grids, seconds = [grids], None if seconds is None else [seconds]
    return mrope_positions(ids, mask, grids, seconds, **tokens)


def rope_deltas(positions, deltas, mask):
    """Offsets at which generation goes on: after the text, and after every temporal patch of a video."""
    lengths = mask.sum(axis=1)
    return np.maximum(lengths + deltas, positions.max(axis=(1, 2)) + 1) - lengths


@pytest.mark.parametrize(("family", "per_second"), [("qwen3_vl", 0), ("qwen2_5_vl", 3)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_videos(goldens, family, per_second, side):
    """Rows with a video, a text and two videos, padded, and the offset at which generation goes on."""
    stored = np.load(goldens / "video" / family / "golden.npz")
    grids = np.concatenate([stored["frames_video_grid_thw"], stored["two_video_grid_thw"]])
    names = ("frames_second_per_grid_ts", "two_second_per_grid_ts")
    seconds = np.concatenate([stored[name] for name in names]) if names[0] in stored else None
    ids, mask = stored[f"batch_{side}_input_ids"], stored[f"batch_{side}_attention_mask"]
    positions, deltas = positions_of(ids, mask, grids, seconds, per_second)
    for found, expected, real in zip(positions, stored[f"batch_{side}_position_ids"].swapaxes(0, 1), mask, strict=True):
        np.testing.assert_array_equal(found[:, real == 1], expected[:, real == 1])
    np.testing.assert_array_equal(rope_deltas(positions, deltas, mask), stored[f"batch_{side}_rope_delta"])


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("case", ["single", "two", "text", "tiny", "batch_left", "batch_right"])
def test_positions_of_transformers(goldens, family, case):
    arrays = np.load(goldens / "families" / family / "golden.npz")
    ids, grids = np.atleast_2d(arrays[f"{case}_input_ids"]), arrays.get(f"{case}_image_grid_thw")
    mask = arrays.get(f"{case}_attention_mask")
    positions, deltas = positions_of(ids, mask, grids)
    expected = arrays[f"{case}_position_ids"]
    expected = expected.swapaxes(0, 1) if case.startswith("batch") else expected[None]
    real = np.ones(ids.shape, bool) if mask is None else mask != 0
    for found, stored, row in zip(positions, expected, real, strict=True):
        np.testing.assert_array_equal(found[:, row], stored[:, row])
    np.testing.assert_array_equal(rope_deltas(positions, deltas, real), arrays[f"{case}_rope_delta"])
    if case.startswith("batch"):  # the images of its rows, in slots
        slots = np.stack([[grids[0], [0] * 3], np.zeros((2, 3), int), grids[1:]])
        by_row, _ = positions_of(ids, mask, slots)
        np.testing.assert_array_equal(by_row, positions)


@pytest.mark.parametrize("cut", [6, 8, 9])
def test_a_row_continues_after_its_beginning(cut):
    """Text after a beginning that ends in a video whose temporal positions are the largest, or in text."""
    ids = np.array([[1, 1, *[VIDEO] * 4, 1, 1, 1, 1]])
    grids, seconds = [[4, 2, 2]], [1.2]
    whole, _ = positions_of(ids, None, grids, seconds, 3.0)
    assert whole[0, 0, 6:].tolist() == [3, 4, 5, 6]  # as after an image of one cell
    beginning, deltas = positions_of(ids[:, :cut], None, grids, seconds, 3.0)
    np.testing.assert_array_equal(beginning, whole[:, :, :cut])
    expected = np.arange(cut, ids.shape[1]) + deltas
    np.testing.assert_array_equal(whole[0, :, cut:], np.stack([expected] * 3))


ROWS = np.array([[1, IMAGE, IMAGE, 1, 1], [1, 1, IMAGE, IMAGE, IMAGE]])


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        (None, r"row 0 has 2 image tokens, but its image_grid_thw \[\] need 0"),
        ([[1, 2, 4], [1, 4, 4]], "row 1 has 3 image tokens, .* need 4"),
        ([[1, 2, 4], [1, 2, 6], [1, 2, 2]], "row 1 has 3 image tokens, .* need 4"),
        ([[[1, 2, 4]], [[0, 0, 0]]], "row 1 has 3 image tokens, .* need 0"),
        ([[1, 2, 4], [1, 3, 4]], r"\[1, 3, 4\]: .* multiples of 2"),
        ([[1, 2, 4], [3, 2, 2]], None),
        ([[1, 2, 2], [1, 2, 2], [1, 2, 6]], None),
        ([[[0, 0, 0], [1, 2, 4]], [[1, 6, 2], [0, 0, 0]]], None),
    ],
)
def test_grids_that_do_not_fit(grids, said):
    if said is None:
        positions_of(ROWS, None, grids)
        return
    with pytest.raises(UserError, match=said):
        positions_of(ROWS, None, grids)


def test_text_among_the_tokens_of_an_image():
    with pytest.raises(UserError, match="text tokens interrupt"):
        positions_of(np.array([[IMAGE, 1, IMAGE]]), None, [[1, 2, 4]])
