"""Damaged video files: decoding them returns frames or raises one line that names the file."""

import pytest
from fuzz_cases import damaged, fuzz, reads
from hypothesis import strategies as st

from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.data.video.process import Limits
from vlmprune_jax.data.video.reader import VideoReader

pytest.importorskip("av", reason="PyAV is not installed (extra video)")
CLIPS = ("main.mp4", "second.webm", "ntsc.mp4", "minutes.mkv", "audio.webm", "rotated.mp4", "no_video.m4a")
LIMITS = Limits(file_bytes=2**20, frames=200, seconds=1000, pixels=10**5, kept_pixels=10**6, wall=20)


def test_clips(goldens, tmp_path):
    whole = [(goldens / "video/clips" / name).read_bytes() for name in CLIPS]
    path = tmp_path / "clip.mp4"

    @fuzz(25, content=st.sampled_from(whole).flatmap(damaged))
    def check(content):
        path.write_bytes(content)
        reader = VideoReader(VideoConfig("linspace"), LIMITS, video_frames=4)
        clip = reads(lambda: reader.read(path, "r1"), path.name)
        assert clip is None or clip.frames.shape == (4, clip.height, clip.width, 3)

    check()
