"""`vp.expand_images`: one id per image becomes one per feature."""

import numpy as np
import pytest
from prune_cases import EQUAL, config, expanded
from stack_cases import decoder_layer

import vlmprune_jax as vp
from vlmprune_jax.io.checkpoints.read import read_config


def test_golden_batches_come_out_as_the_reference_has_them(goldens):
    arrays = np.load(goldens / "block_influence" / "llava.npz")
    cfg = vp.load(goldens / "ckpt/llava_orig", vision_dir=goldens / "ckpt/clip_tower").cfg
    for n in range(6):
        ids, mask, labels, pixels = (
            arrays[f"s{n}_{name}"] for name in ("input_ids", "attention_mask", "labels", "pixel_values")
        )
        found = vp.expand_images(ids, cfg, attention_mask=mask, labels=labels)
        for name, array in found.items():
            np.testing.assert_array_equal(array, expanded(ids, mask, labels, pixels)[name], err_msg=name)


def test_padding_on_either_side_and_several_tiles():
    cfg = config(EQUAL, vision=True)
    image, each = cfg.image_token_id, cfg.tokens_per_image
    ids = [[0, 0, 5, image, 6], [image, 7, image, 8, 0]]
    mask = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    found = vp.expand_images(ids, cfg, attention_mask=mask, tiles=[1, 2, 1])
    rows = [[5, *[image] * each, 6], [*[image] * (2 * each), 7, *[image] * each, 8]]
    width = len(rows[1])
    np.testing.assert_array_equal(found["input_ids"], [row + [0] * (width - len(row)) for row in rows])
    np.testing.assert_array_equal(found["attention_mask"].sum(axis=1), [len(row) for row in rows])
    assert set(found) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_images_of_any_size_are_counted_by_their_grids(goldens, family):
    with np.load(goldens / f"families/{family}/golden.npz") as stored:
        two, grids = stored["two_input_ids"], stored["two_image_grid_thw"]
    _, cfg = read_config(goldens / f"families/{family}/ckpt", None)
    again = np.concatenate([[True], (two[1:] != cfg.image_token_id) | (two[:-1] != cfg.image_token_id)])
    found = vp.expand_images(two[again][None], cfg, image_grid_thw=grids)
    np.testing.assert_array_equal(found["input_ids"][0], two)
    for options in ({}, {"image_grid_thw": grids[:1]}, {"image_grid_thw": grids, "tiles": [1, 1]}):
        with pytest.raises(vp.UserError, match="image_grid_thw"):
            vp.expand_images(two[again][None], cfg, **options)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([1, 2], {}, "must have one shape"),
        ([[1, 61]], {"tiles": [1, 1]}, "1 positive numbers, one per image"),
        ([[1, 61]], {"tiles": [0]}, "1 positive numbers"),
        ([[1, 61]], {"image_grid_thw": [[1, 2, 2]]}, "takes tiles, not image_grid_thw"),
        ([[1, 61]], {"attention_mask": [[1]]}, "must have one shape"),
    ],
)
def test_what_does_not_fit_is_refused(ids, options, message):
    with pytest.raises(vp.UserError, match=message):
        vp.expand_images(ids, config(EQUAL, vision=True), **options)


def test_a_model_without_images():
    with pytest.raises(vp.UserError, match="takes no images"):
        vp.expand_images([[1]], config((decoder_layer(2, 2, 4),)))
