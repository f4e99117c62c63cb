"""The data set "moving shapes": answers agree with the decoded frames, and reversed clips have the opposite ones."""

import json
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("av", reason="PyAV is not installed (extra video)")
import moving_shapes
import video_study

from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.records import read_records
from vlmprune_jax.io.data.tiling import Tiling
from vlmprune_jax.io.data.video.process import Limits
from vlmprune_jax.io.data.video.reader import VideoReader

LIMITS = Limits(file_bytes=2**20, frames=16, seconds=2, pixels=64 * 64, kept_pixels=2**17, wall=60)
FRAMES = Tiling(16, 1, 1, False, False, (0.5,) * 3, (0.5,) * 3, 3, False)


def seen(frames):
    """{colour: (x, y) of its centre in every frame, NaN where it is not}, of eight frames."""
    centres = {}
    for name, colour in moving_shapes.COLOURS.items():
        masks = np.abs(frames.astype(int) - colour).sum(-1) < 90
        spots = [np.argwhere(mask) for mask in masks]
        centres[name] = np.array([spot.mean(0)[::-1] if len(spot) > 40 else (np.nan, np.nan) for spot in spots])
    return centres


def direction(centres):
    across, down = centres[-1] - centres[0]
    if abs(across) > abs(down):
        return "right" if across > 0 else "left"
    return "down" if down > 0 else "up"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")
    (out / "clips").mkdir()
    return out, moving_shapes.write_set(out, "test", 8, 3, ("shuffled", "middle"))


def test_answers_are_in_the_frames(written):
    out, sets = written
    reader, checked = VideoReader(VideoConfig("linspace"), LIMITS, FRAMES, count=8), Counter()
    (out / "test.json").write_text(json.dumps(sets["test"]))
    for record in read_records(out / "test.json", out):
        frames = reader.read(record.videos[0], record.id).frames
        centres, question, answer = seen(frames), record.turns[0][1], record.turns[1][1]
        kind = record.fields["question_type"]
        there = {name: ~np.isnan(places[:, 0]) for name, places in centres.items()}
        if kind == "direction":
            (colour,) = [name for name in centres if name in question]
            assert answer == direction(centres[colour])
        elif kind == "speed":
            moved = max((np.abs(np.diff(places, axis=0)).sum(1) for places in centres.values()), key=np.nansum)
            assert answer == ("faster" if moved[-1] > moved[0] else "slower")
        elif kind == "colour_after":
            (changed,) = [name for name, frame in there.items() if frame[-1] and not frame[0]]
            assert answer == changed
        elif kind == "static":
            assert there[answer].any()
        elif kind == "half":
            (colour,) = [name for name, frame in there.items() if frame.sum() == 2]
            assert answer == ("first" if np.flatnonzero(there[colour])[0] < 4 else "second")
        else:
            continue
        checked[kind] += 1
    assert len(checked) == 5


def test_controls(written):
    out, sets = written
    reader = VideoReader(VideoConfig("linspace"), LIMITS, FRAMES, count=8)
    frames = {name: reader.read(out / records[0]["video"], name).frames.astype(int) for name, records in sets.items()}
    assert np.abs(frames["test_middle"] - frames["test"][4]).mean() < 2
    assert np.abs(frames["test_shuffled"] - frames["test"]).mean() > 2
    nearest = [np.abs(frames["test"] - frame).mean((1, 2, 3)).argmin() for frame in frames["test_shuffled"]]
    assert sorted(nearest) == list(range(8))
    texts = [[record["conversations"] for record in records] for records in sets.values()]
    assert texts[0] == texts[1] == texts[2]


def test_the_table_of_the_study(tmp_path, capsys):
    """Kinds that shuffled frames do not hurt are left out; shares of the lead over the floors."""
    cell = {"frames": 8, "recovery": "none", "seed": 0}
    kinds = {kind: [5, 10] for kind in moving_shapes.TEMPORAL}
    whole = {"test": {**kinds, "half": [9, 10], "static": [85, 100]}, "test_shuffled": kinds}
    pruned = [{"test": {**kinds, "half": [n, 10], "static": [25, 100]}, "test_shuffled": kinds} for n in (6, 8)]
    rows = [{**cell, "method": "unpruned", "ratio": 0.0, **whole}]
    rows += [{**cell, "method": "depth", "ratio": 0.3, **row} for row in pruned]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    video_study.summary(tmp_path / "rows.jsonl")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Questions about time: half."
    assert printed[-2] == "| 8 | unpruned | none | 1 | 90.0 | 85.0 | 50.0 | 1.00 | 1.00 |"
    assert printed[-1] == "| 8 | depth 30 % | none | 2 | 70.0 ± 127.1 | 25.0 ± 0.0 | 50.0 ± 0.0 | 0.50 | 0.00 |"
