"""Frames that the stock video processors sample, by family and setting, for clips of 1 to 36,000 frames."""

import dataclasses
import json

import pytest

from vlmprune_jax.core.video import DEFAULT_FRAMES, VideoConfig, frame_indices

RULES = {
    "qwen3_vl": "linspace",
    "qwen2_5_vl": "steps",
    "smolvlm": "trimmed",
    "internvl3": "middles",
    "gemma4": "starts",
}
# Values of folders on the hub, in the tables' cases of longer clips.
HUB = {
    "qwen3_vl": {"min_frames": 4, "max_frames": 768, "fps": 2},
    "qwen2_5_vl": {"min_frames": 4, "max_frames": 768},
    "smolvlm": {"fps": 1, "num_frames": 64},
    "internvl3": {},
    "gemma4": {"num_frames": 32},
}


def config(family, processor, values):
    processor = {**processor, **(HUB[family] if values == "hub" else {})}
    names = ("fps", "num_frames", "min_frames", "max_frames")
    given = {name: processor[name] for name in names if processor.get(name) is not None}
    return VideoConfig(RULES[family], temporal_patch=processor.get("temporal_patch_size", 1), **given)


@pytest.mark.parametrize("family", RULES)
def test_as_the_stock_processors(goldens, family):
    """The indices of every case; every frame, or fewer, where the stock processor raises an error."""
    golden = json.loads((goldens / f"video/{family}/golden.json").read_text())
    compared = 0
    for case in golden["sampling"]:
        setting, video = dict(case["setting"]), config(family, golden["video_processor"], case["values"])
        stock = setting.pop("stock", {})
        if family == "qwen2_5_vl":  # the only processor that reads these arguments of a call
            video = dataclasses.replace(
                video, **{name: stock[name] for name in stock if name in ("min_frames", "max_frames")}
            )
        every = list(range(case["frames"]))
        indices = frame_indices(video, case["frames"], case["fps"], duration=case["duration"], **setting)
        if "error" in case and "exclusive" in case["error"]:  # Gemma 4 has no rate; both settings at once are refused
            continue
        if "initial_shift" in stock or "do_sample_frames" in stock:
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


def test_a_rate_for_gemma4_and_bounds():
    video = VideoConfig("starts", num_frames=32)
    assert frame_indices(video, 100, 25.0, video_fps=1) == [0, 25, 50, 75]
    assert frame_indices(video, 10, 25.0, video_fps=1) == [0]
    steps = VideoConfig("steps", temporal_patch=2, min_frames=4, max_frames=768)
    assert frame_indices(steps, 16, 8.0, video_frames=1) == [0, 8]  # at least one temporal patch
