"""Cached arrays that are whole but another's: refused with the record, not found out by a broadcast."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.cached_arrays import FeatureLoader, TeacherRows, record_key
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.media import image_key
from vlmprune_jax.io.data.records import Record

RECORD = Record("r1", (("human", "a"), ("gpt", "b")), ())
ROW = {"labels": np.zeros(4, np.int32), "attention_mask": np.ones(4, np.int32)}


def cache(folder, **arrays):
    made = ArrayCache(folder, {"a": 1})
    made.add(arrays)
    made.publish()
    return made


@pytest.mark.parametrize(
    ("ids", "logprobs"),
    [
        (np.zeros((4, 2), np.uint16), np.zeros((4, 4), np.float32)),
        (np.zeros((4, 3), np.uint16), np.zeros((4, 3), np.float32)),
        (np.zeros((4, 3), np.uint16), np.zeros((3, 4), np.float32)),
        (np.zeros((4, 3), np.float32), np.zeros((4, 4), np.float32)),
        (np.zeros(4, np.uint16), np.zeros(4, np.float32)),
        (np.zeros((), np.uint16), np.zeros((), np.float32)),
    ],
)
def test_a_teachers_rows_of_another_shape(tmp_path, ids, logprobs):
    key = record_key(RECORD)
    rows = TeacherRows(
        cache(tmp_path, **{f"{key}.ids": ids, f"{key}.logprobs": logprobs}), 3, "all", np.dtype("f4"), 100
    )
    with pytest.raises(UserError, match=r"record r1: .* does not have the teacher's top 3 tokens: remove"):
        rows.fill(dict(ROW), RECORD)


def test_parts_of_a_video_have_rows_of_their_own(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    whole = Record("r", (("human", "<video>?"), ("gpt", "no")), (), videos=(tmp_path / "a.mp4",))
    assert len({record_key(replace(whole, part=part)) for part in (None, (0.0, 1.0), (0.0, 2.0))}) == 3


@pytest.mark.parametrize("wrong", [-1, 100, 2**31 - 1])
def test_ids_outside_the_vocabulary(tmp_path, wrong):
    key, ids = record_key(RECORD), np.zeros((4, 3), np.int32)
    ids[2, 1] = wrong
    arrays = {f"{key}.ids": ids, f"{key}.logprobs": np.zeros((4, 4), np.float32)}
    rows = TeacherRows(cache(tmp_path, **arrays), 3, "all", np.dtype("f4"), 100)
    with pytest.raises(
        UserError, match=rf"record r1: .* {wrong}.*, but the vocabulary has 0 to 99: remove that folder"
    ):
        rows.fill(dict(ROW), RECORD)


@pytest.mark.parametrize("features", [np.zeros((1, 5, 7), np.float32), np.zeros((1, 4, 8), np.int32), np.zeros(())])
def test_features_of_another_shape(goldens, tmp_path, features):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    folder = goldens / "ckpt/clip_tower"
    images = load_image_processor(folder, DataSpec(aspect_ratio="pad", cache_megabytes=0))
    stored = cache(tmp_path / "cache", **{image_key(tmp_path / "a.png"): features})
    loader = FeatureLoader(images, stored, (4, 8), np.dtype(np.float32))
    with pytest.raises(
        UserError, match=r"a\.png \(record r1\): .* expected float32\[tiles, 4, 8\]: remove that folder"
    ):
        loader.load(tmp_path / "a.png", "r1")
