"""Records in the forms that people have: messages, turns, or columns; with images, or videos in files and frames."""

import base64

import pytest
from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.media import StoredImage
from vlmprune_jax.io.data.records import make_records

ASKED = (("human", "<image>\nWhat is it?"), ("gpt", "A cat."))
USER = {"role": "user", "content": "<image>\nWhat is it?"}
ANSWER = {"role": "assistant", "content": "A cat."}
TEXT = {"type": "text", "text": "What is it?"}


@pytest.fixture
def images(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": [USER, ANSWER], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, TEXT]}, ANSWER], "image": "a.png"},
        {"messages": [{"role": "user", "content": "What is it?"}, ANSWER], "image": "a.png"},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, TEXT]}, ANSWER]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, TEXT]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            ]
        },
        {
            "conversations": [
                {"from": "user", "value": "<image>\nWhat is it?"},
                {"from": "assistant", "value": "A cat."},
            ],
            "image": "a.png",
        },
        {"question": "What is it?", "answer": "A cat.", "image": "a.png"},
        {"question": "<image>\nWhat is it?", "answer": "A cat.", "images": ["a.png"]},
    ],
)
def test_every_form_is_the_same_record(images, entry):
    (record,) = make_records([entry], images)
    assert record.turns == ASKED
    assert record.images == (images / "a.png",)


def test_questions_with_choices_and_without_images():
    choice, plain = make_records(
        [
            {"id": "q", "question": "Which?", "choices": ["red", "blue"], "answer": 1, "category": "colour"},
            {"question": "How many?", "answers": ["2", "two"]},
        ],
        None,
    )
    assert choice.turns == (("human", "Which?\nA. red\nB. blue"), ("gpt", "B"))
    assert (choice.id, choice.fields["category"]) == ("q", "colour")
    assert plain.turns == (("human", "How many?"),)
    assert plain.references == ("2", "two")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"messages": [{"role": "system", "content": "Be brief."}, USER]},
            "has a system message: remove it, and set data.system",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "message 0 must have 'role' user or assistant, and 'content'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "message 0 must have 'role' user or assistant",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0 must have 'role' user or assistant"),
        ({"messages": {}}, "message 0 must have 'role' user or assistant"),
        ({"messages": []}, "'conversations' must be a non-empty list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "image": "b.png"},
            "some images are in messages, others in 'images'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": 3}]}]}, "'image' must be a path"),
        (
            {"text": "What is it?"},
            "{from, value} turns .or use 'messages' of {role, content}, or 'question' and 'answer'",
        ),
    ],
)
def test_malformed_entries_are_told(images, entry, message):
    with pytest.raises(UserError, match=message):
        make_records([entry], images)


# --- videos ---------------------------------------------------------------------------------------------------------


MOVES, SAID = "What moves?", {"from": "gpt", "value": "A disc."}
VIDEO = [{"from": "human", "value": f"<video>\n{MOVES}"}, SAID]
TWO = [{"from": "human", "value": f"<video><video>\n{MOVES}"}, SAID]


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


def shown(*parts):
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": MOVES}]},
        {"role": "assistant", "content": "A disc."},
    ]


@pytest.mark.parametrize(
    "entry",
    [
        {"video": "a.mp4", "conversations": VIDEO},
        {"videos": ["a.mp4"], "conversations": VIDEO},
        {"video": "a.mp4", "conversations": [{"from": "human", "value": f"<image>\n{MOVES}"}, SAID]},  # LLaVA-Video
        {"video": "a.mp4", "question": MOVES, "answer": "A disc."},
        {"messages": shown({"type": "video", "video": "a.mp4"})},
        {"messages": shown({"type": "video_url", "video_url": {"url": "a.mp4"}})},
        {"video": "a.mp4", "messages": shown({"type": "video"})},
        {"video": "a.mp4", "messages": shown()},
    ],
)
def test_every_form_of_a_video(root, entry):
    (record,) = make_records([entry], root)
    assert record.turns == (("human", f"<video>\n{MOVES}"), ("gpt", "A disc."))
    assert (record.videos, record.images) == ((root / "a.mp4",), ())


def test_frames_folders_and_several_videos(root):
    frames = tuple(root / "frames" / name for name in ("2.png", "10.png"))  # in the order of their numbers
    entries = [
        {"video": [["frames/2.png", "frames/10.png"]], "conversations": VIDEO},
        {"video": "frames", "conversations": VIDEO},
        {"messages": shown({"type": "video", "video": ["frames/2.png", "frames/10.png"]})},
    ]
    assert [record.videos for record in make_records(entries, root)] == [(frames,)] * 3
    (part,) = make_records([{"video": "a.mp4", "start": 1.5, "end": 3, "conversations": VIDEO}], root)
    assert part.visuals[0].part == (1.5, 3)
    (two,) = make_records([{"video": ["a.mp4", "frames"], "conversations": TWO}], root)
    assert two.videos == (root / "a.mp4", frames)
    mixed = [{"type": "image", "image": "still.png"}, {"type": "video", "video": "b.webm"}]
    (record,) = make_records([{"messages": shown(*mixed)}], root)
    assert (record.images, record.videos) == ((root / "still.png",), (root / "b.webm",))
    assert record.turns[0][1] == f"<image>\n<video>\n{MOVES}"


def test_data_uris():
    encoded = [base64.b64encode(content).decode() for content in (b"clip", b"frame")]
    urls = [f"data:video/mp4;base64,{encoded[0]}", f"data:video/jpeg;base64,{encoded[1]},{encoded[1]}"]
    parts = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    (record,) = make_records([{"messages": shown(*parts)}], None)
    clip, frames = record.videos
    assert isinstance(clip, StoredImage)
    assert clip.read_bytes() == b"clip"
    assert [frame.read_bytes() for frame in frames] == [b"frame"] * 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"video": "a.mp4", "conversations": TWO}, r"2 <video> placeholder\(s\) for 1 video\(s\): write one"),
        ({"conversations": VIDEO}, r"1 <video> placeholder\(s\) for 0 video\(s\)"),
        ({"video": "no.mp4", "conversations": VIDEO}, r"video .*no.mp4 does not exist"),
        (
            {"video": "a.mp4", "start": 3, "end": 1, "conversations": VIDEO},
            r"seconds of the record's only .* got 3 and 1:",
        ),
        ({"video": "a.mp4", "end": "9", "conversations": VIDEO}, r"'start' and 'end' must be seconds"),
        ({"video": "link.mp4", "conversations": VIDEO}, r"link to a file outside the image root"),
        ({"video": "frames_out", "conversations": VIDEO}, r"link to a file outside the image root"),
        ({"video": "../root/frames", "conversations": VIDEO}, r"must be a path below the image root"),
        ({"video": "/usr", "conversations": VIDEO}, r"must be a path below the image root"),
        ({"video": "https://host/a.mp4", "conversations": VIDEO}, r"video 'https://host/a.mp4' is not a file: save it"),
        ({"video": "rtsp://host/a", "conversations": VIDEO}, r"is not a file"),
        ({"video": "concat:a.mp4|b.webm", "conversations": VIDEO}, r"does not exist"),
        ({"video": "data:video/mp4;base64,!", "conversations": VIDEO}, r"is not valid base64"),
        ({"video": [[]], "conversations": VIDEO}, r"list whose items are paths or lists of frames, got \[\[\]\]"),
        ({"video": 3, "conversations": VIDEO}, r"got 3"),
        ({"video": "a.mp4", "videos": ["a.mp4"], "conversations": VIDEO}, r"keep one"),
        ({"video": "a.mp4", "messages": shown({"type": "video", "video": "a.mp4"})}, r"some videos are in messages"),
    ],
)
def test_videos_that_are_refused(root, entry, message):
    with pytest.raises(UserError, match=rf"record r1: {message}|record r1: .*{message}"):
        make_records([{"id": "r1", **entry}], root)
