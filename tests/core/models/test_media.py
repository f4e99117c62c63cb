"""Images of any size and videos: positions, what does not fit together, windows in the kernel, frames of clips."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusal import refused
from repository import load_arrays

import vlmprune_jax as vp
from vlmprune_jax.core.models import kernels
from vlmprune_jax.core.models.generate import SharedPrefix
from vlmprune_jax.core.models.kernels import segment_attention, xla_attention
from vlmprune_jax.core.models.media import Packed, mrope_positions
from vlmprune_jax.core.models.vision import places_of, windows_of
from vlmprune_jax.core.video import DEFAULT_FRAMES, VideoConfig, frame_indices
from vlmprune_jax.io.checkpoints.read import read_config

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
@pytest.mark.parametrize("case", ["single", "tiny", "batch_left", "batch_right", "videos_left", "videos_right"])
def test_positions_of_transformers(goldens, family, per_second, case):
    """Rows with images, or with a video, a text and two videos, padded, and where generation goes on."""
    folder = goldens / ("video" if case.startswith("videos") else "families")
    stored, case = load_arrays(folder / family / "golden.npz"), case.replace("videos", "batch")
    ids, mask, grids = (stored.get(f"{case}_{name}") for name in ("input_ids", "attention_mask", "image_grid_thw"))
    seconds, expected = None, stored[f"{case}_position_ids"]
    if folder.name == "video":
        grids = np.concatenate([stored["frames_video_grid_thw"], stored["two_video_grid_thw"]])
        names = ("frames_second_per_grid_ts", "two_second_per_grid_ts")
        seconds = np.concatenate([stored[name] for name in names]) if names[0] in stored else None
    positions, deltas = positions_of(np.atleast_2d(ids), mask, grids, seconds, per_second)
    expected = expected[None] if mask is None else expected.swapaxes(0, 1)
    real = np.ones((1, len(ids)), bool) if mask is None else mask != 0
    for found, wanted, row in zip(positions, expected, real, strict=True):
        np.testing.assert_array_equal(found[:, row], wanted[:, row])
    np.testing.assert_array_equal(rope_deltas(positions, deltas, real), stored[f"{case}_rope_delta"])
    if mask is not None and folder.name == "families":  # the images of its rows, in slots
        slots = np.stack([[grids[0], [0] * 3], np.zeros((2, 3), int), grids[1:]])
        np.testing.assert_array_equal(positions_of(ids, mask, slots, None, per_second)[0], positions)


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
    ],
)
def test_grids_that_do_not_fit(grids, said):
    refused(said, positions_of, ROWS, None, grids)


def test_grids_that_fit_unless_text_is_among_the_tokens():
    in_slots = [[[0] * 3, [1, 2, 4]], [[1, 6, 2], [0] * 3]]
    for grids in ([[1, 2, 4], [3, 2, 2]], [[1, 2, 2], [1, 2, 2], [1, 2, 6]], in_slots):
        positions_of(ROWS, None, grids)
    refused("text tokens interrupt", positions_of, np.array([[IMAGE, 1, IMAGE]]), None, [[1, 2, 4]])


@pytest.fixture(scope="module")
def qwen(goldens):
    folder = goldens / "families/qwen3_vl"
    return vp.load(folder / "ckpt"), load_arrays(folder / "golden.npz")


def in_a_row(pixels, grid):
    return {"media": {"vision": Packed(pixels[None], np.array(grid))}}


def single(arrays):
    names = ("input_ids", "mm_token_type_ids")
    rows = {name: arrays[f"single_{name}"][None] for name in names}
    return {**rows, "pixel_values": arrays["image0_pixel_values"], "image_grid_thw": arrays["single_image_grid_thw"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: {"pixel_values": x["pixel_values"][:-4]}, r"\[56, 144\], expected \[60, 144\]"),
        (lambda x: {"pixel_values": x["pixel_values"][:, :48]}, r"\[60, 48\]"),
        (lambda x: {"image_grid_thw": [[1, 6, 8]]}, r"\[60, 144\], expected \[48, 144\]"),
        (lambda x: {"image_grid_thw": [[1, 5, 12]]}, "multiples of 2"),
        (lambda x: {"pixel_values_videos": x["pixel_values"]}, "pixel_values_videos needs video_grid_thw"),
        (lambda x: {"image_grid_thw": None}, "pixel_values needs image_grid_thw"),
        (lambda x: {"pixel_values": None}, "15 image positions, but pixel_values is missing"),
        (lambda x: {"mm_token_type_ids": x["mm_token_type_ids"] * 2}, "does not mark the image tokens .id 354."),
        (lambda x: {"mm_token_type_ids": 1 - x["mm_token_type_ids"]}, "does not mark the image tokens"),
        (lambda x: {"input_ids": x["input_ids"] * 0 + 355}, "40 image positions, but pixel_values_videos is missing"),
        (lambda x: {"pixel_values": x["pixel_values"][None]}, r"pixel_values has shape \[1, 60, 144\]"),
        (lambda x: in_a_row(x["pixel_values"], [[[1, 8, 8]]]), "15 .* need 16"),
        (lambda x: in_a_row(x["pixel_values"][4:], [[[1, 6, 10]]]), "up to 15 image positions: .* room for 14"),
        (lambda x: in_a_row(x["pixel_values"][None], [[[1, 6, 10]]]), r"images have shape \[1, 1, 60, 144\]"),
        (lambda x: in_a_row(x["pixel_values"], [[1, 6, 10]]), r"and grids \[1, 3\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(qwen, change, said):
    model, arrays = qwen
    inputs = single(arrays)
    for call in (vp.forward, lambda *a, **k: vp.generate(*a, **k, max_new_tokens=1)):
        refused(said, call, model, **inputs | change(inputs))


def test_grids_for_images_of_one_size(goldens):
    model = vp.load(goldens / "families/internvl3/ckpt")
    refused("images all have one size", vp.forward, model, [[1, 2]], image_grid_thw=[[1, 2, 2]])


@pytest.mark.slow
def test_rows_that_share_an_image(qwen):
    """One prefix with the image, two questions of other length; and whole prompts, padded on the right."""
    model, arrays = qwen
    inputs, cut = single(arrays), 24  # the image ends at 20
    prompts = [arrays["single_input_ids"][:32], arrays["single_input_ids"][:29]]
    options = {"max_new_tokens": 5, "eos_token_ids": ()}
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    whole = [vp.generate(model, prompt[None], **images, **options)[0] for prompt in prompts]
    ids, mask = np.zeros((2, 8), np.int32), np.zeros((2, 8), np.int32)
    for row, prompt in enumerate(prompts):
        rest = prompt[cut:]
        ids[row, : len(rest)], mask[row, : len(rest)] = rest, 1
    prefix = SharedPrefix(prompts[0][None, :cut], np.ones((1, cut), np.int32), np.zeros(2, np.int32))
    shared = vp.generate(model, ids, attention_mask=mask, prefix=prefix, **images, **options)
    np.testing.assert_array_equal(shared, whole)


@pytest.mark.slow
def test_windows_in_the_kernel(monkeypatch):
    """Windows of packed rows in splash attention (interpreted), of whose 3 blocks not all meet, as a mask in XLA's."""
    monkeypatch.setattr(kernels, "_LARGEST_BLOCK", 128)
    grid = jnp.asarray([[[1, 14, 10], [1, 20, 12]], [[1, 6, 4], [1, 4, 8]]])
    places = places_of(grid, 384, 2)
    windows = windows_of(places, 2, 3)
    assert np.unique(windows[0]).tolist() == [*range(15)]
    assert np.unique(windows[1], return_counts=True)[1].tolist() == [24, 24, 8, 328]
    q, k, v, out = jax.random.normal(jax.random.key(0), (4, 2, 384, 2, 64))
    out = out * places.real[..., None, None].astype(jnp.float32)

    def with_gradients(attend):
        result, pull = jax.vjp(attend, q, k, v)
        return [jnp.where(out == 0, 0, result), *pull(out)]

    mask = (windows[:, :, None] == windows[:, None])[:, None]
    expected = with_gradients(lambda *args: xla_attention(*args, mask))
    found = with_gradients(lambda *args: segment_attention(*args, windows, interpret=True))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_both_spellings_of_tied_embeddings(goldens, tmp_path):
    """Version 5 looks at Qwen2.5-VL's outer flag and then at the decoder's, version 4 at the decoder's."""
    shutil.copy(goldens / "families/qwen2_5_vl/ckpt/config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    for inner, version, tied in ((True, "5.24.0", True), (False, "5.24.0", False), (True, "4.57.0", True)):
        config["text_config"]["tie_word_embeddings"], config["transformers_version"] = inner, version
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_config(tmp_path)[1].text.tie_embeddings is tied
    assert dataclasses.replace(read_config(tmp_path)[1].text.rope, theta=1.0).sections == (1, 2, 3)


# Family -> the rule of its processor, and values of its folder on the hub, in the tables' cases of longer clips.
RULES = {
    "qwen3_vl": ("linspace", {"min_frames": 4, "max_frames": 768, "fps": 2}),
    "qwen2_5_vl": ("steps", {"min_frames": 4, "max_frames": 768}),
    "smolvlm": ("trimmed", {"fps": 1, "num_frames": 64}),
    "internvl3": ("middles", {}),
    "gemma4": ("starts", {"num_frames": 32}),
}


@pytest.mark.parametrize("family", RULES)
def test_frames_of_the_stock_processors(goldens, family):
    """The indices of every case; every frame, or fewer, where the stock processor raises an error."""
    golden, compared, (rule, hub) = json.loads((goldens / f"video/{family}/golden.json").read_text()), 0, RULES[family]
    for case in golden["sampling"]:
        setting, values = dict(case["setting"]), golden["video_processor"] | (hub if case["values"] == "hub" else {})
        stock = setting.pop("stock", {})
        if family == "qwen2_5_vl":  # the only processor that reads these arguments of a call
            values = values | {name: stock[name] for name in ("min_frames", "max_frames") if name in stock}
        names = ("fps", "num_frames", "min_frames", "max_frames")
        given = {name: values[name] for name in names if values.get(name) is not None}
        video = VideoConfig(rule, temporal_patch=values.get("temporal_patch_size", 1), **given)
        every = list(range(case["frames"]))
        indices = frame_indices(video, case["frames"], case["fps"], duration=case["duration"], **setting)
        # Gemma 4 has no rate; both settings at once are refused
        if "exclusive" in case.get("error", "") or "initial_shift" in stock or "do_sample_frames" in stock:
            continue
        if "error" in case:
            assert indices == every, case
        elif "count" in case:
            assert (len(indices), indices[:6], indices[-6:]) == (case["count"], case["first"], case["last"]), case
            assert sum(indices) == case["sum"], case
        elif case["indices"] == "all" and case["frames"] > DEFAULT_FRAMES and not setting:
            assert len(indices) == DEFAULT_FRAMES  # our default, since every frame of a long clip fits in no memory
        else:
            expected = every if case["indices"] == "all" else case["indices"]
            assert indices == [index for index in expected if index < case["frames"]], case
        compared += 1
    assert compared >= 60


def test_frames_at_a_rate_for_gemma4_and_at_least_one_temporal_patch():
    video = VideoConfig("starts", num_frames=32)
    assert frame_indices(video, 100, 25.0, video_fps=1) == [0, 25, 50, 75]
    assert frame_indices(video, 10, 25.0, video_fps=1) == [0]
    steps = VideoConfig("steps", temporal_patch=2, min_frames=4, max_frames=768)
    assert frame_indices(steps, 16, 8.0, video_frames=1) == [0, 8]
