"""Videos of records in every form, as files, frame lists, folders and data URIs, and those that are refused."""

import base64

import pytest

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.media import StoredImage
from vlmprune_jax.io.data.records import make_records

ASKED, SAID = "What moves?", {"from": "gpt", "value": "A disc."}
TALK = [{"from": "human", "value": f"<video>\n{ASKED}"}, SAID]
TWO = [{"from": "human", "value": f"<video><video>\n{ASKED}"}, SAID]


@pytest.fixture
def root(tmp_path):
    for name in ("a.mp4", "b.webm", "still.png", "frames/2.png", "frames/10.png", "frames/.hidden"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(b"x")
    (tmp_path / "outside.mp4").write_bytes(b"x")
    (tmp_path / "root/link.mp4").symlink_to(tmp_path / "outside.mp4")
    (tmp_path / "root/frames_out").mkdir()
    (tmp_path / "root/frames_out/1.png").symlink_to(tmp_path / "outside.mp4")
    return tmp_path / "root"


def asked(*parts):
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": ASKED}]},
        {"role": "assistant", "content": "A disc."},
    ]


@pytest.mark.parametrize(
    "entry",
    [
        {"video": "a.mp4", "conversations": TALK},
        {"videos": ["a.mp4"], "conversations": TALK},
        {"video": "a.mp4", "conversations": [{"from": "human", "value": f"<image>\n{ASKED}"}, SAID]},  # LLaVA-Video
        {"video": "a.mp4", "question": ASKED, "answer": "A disc."},
        {"messages": asked({"type": "video", "video": "a.mp4"})},
        {"messages": asked({"type": "video_url", "video_url": {"url": "a.mp4"}})},
        {"video": "a.mp4", "messages": asked({"type": "video"})},
        {"video": "a.mp4", "messages": asked()},
    ],
)
def test_every_form_is_the_same_record(root, entry):
    (record,) = make_records([entry], root)
    assert record.turns == (("human", f"<video>\n{ASKED}"), ("gpt", "A disc."))
    assert (record.videos, record.images) == ((root / "a.mp4",), ())


def test_frames_folders_and_several_videos(root):
    frames = tuple(root / "frames" / name for name in ("2.png", "10.png"))  # in the order of their numbers
    entries = [
        {"video": [["frames/2.png", "frames/10.png"]], "conversations": TALK},
        {"video": "frames", "conversations": TALK},
        {"messages": asked({"type": "video", "video": ["frames/2.png", "frames/10.png"]})},
    ]
    assert [record.videos for record in make_records(entries, root)] == [(frames,)] * 3
    (part,) = make_records([{"video": "a.mp4", "start": 1.5, "end": 3, "conversations": TALK}], root)
    assert part.visuals[0].part == (1.5, 3)
    (two,) = make_records([{"video": ["a.mp4", "frames"], "conversations": TWO}], root)
    assert two.videos == (root / "a.mp4", frames)
    mixed = [{"type": "image", "image": "still.png"}, {"type": "video", "video": "b.webm"}]
    (record,) = make_records([{"messages": asked(*mixed)}], root)
    assert (record.images, record.videos) == ((root / "still.png",), (root / "b.webm",))
    assert record.turns[0][1] == f"<image>\n<video>\n{ASKED}"


def test_data_uris():
    encoded = [base64.b64encode(content).decode() for content in (b"clip", b"frame")]
    urls = [f"data:video/mp4;base64,{encoded[0]}", f"data:video/jpeg;base64,{encoded[1]},{encoded[1]}"]
    parts = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    (record,) = make_records([{"messages": asked(*parts)}], None)
    clip, frames = record.videos
    assert isinstance(clip, StoredImage)
    assert clip.read_bytes() == b"clip"
    assert [frame.read_bytes() for frame in frames] == [b"frame"] * 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"video": "a.mp4", "conversations": TWO}, r"2 <video> placeholder\(s\) for 1 video\(s\): write one"),
        ({"conversations": TALK}, r"1 <video> placeholder\(s\) for 0 video\(s\)"),
        ({"video": "no.mp4", "conversations": TALK}, r"video .*no.mp4 does not exist"),
        (
            {"video": "a.mp4", "start": 3, "end": 1, "conversations": TALK},
            r"seconds of the record's only .* got 3 and 1:",
        ),
        ({"video": "a.mp4", "end": "9", "conversations": TALK}, r"'start' and 'end' must be seconds"),
        ({"video": "link.mp4", "conversations": TALK}, r"link to a file outside the image root"),
        ({"video": "frames_out", "conversations": TALK}, r"link to a file outside the image root"),
        ({"video": "../root/frames", "conversations": TALK}, r"must be a path below the image root"),
        ({"video": "/usr", "conversations": TALK}, r"must be a path below the image root"),
        ({"video": "https://host/a.mp4", "conversations": TALK}, r"video 'https://host/a.mp4' is not a file: save it"),
        ({"video": "rtsp://host/a", "conversations": TALK}, r"is not a file"),
        ({"video": "concat:a.mp4|b.webm", "conversations": TALK}, r"does not exist"),
        ({"video": "data:video/mp4;base64,!", "conversations": TALK}, r"is not valid base64"),
        ({"video": [[]], "conversations": TALK}, r"list whose items are paths or lists of frames, got \[\[\]\]"),
        ({"video": 3, "conversations": TALK}, r"got 3"),
        ({"video": "a.mp4", "videos": ["a.mp4"], "conversations": TALK}, r"keep one"),
        ({"video": "a.mp4", "messages": asked({"type": "video", "video": "a.mp4"})}, r"some videos are in messages"),
    ],
)
def test_refused(root, entry, message):
    with pytest.raises(UserError, match=rf"record r1: {message}|record r1: .*{message}"):
        make_records([{"id": "r1", **entry}], root)
