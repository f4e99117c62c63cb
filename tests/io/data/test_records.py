"""Files of every form become records; everything malformed is refused in one line with its file and record."""

import base64
import contextlib
import json
import os
import re

import pytest
from refusal import refused

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.media import StoredImage
from vlmprune_jax.io.data.records import Record, data_files, make_records, read_records, take_fraction

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
TEXT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Nothing."}]
MOVES, SAID = "What moves?", {"from": "gpt", "value": "A disc."}
VIDEO = [{"from": "human", "value": f"<video>\n{MOVES}"}, SAID]
TWO = [{"from": "human", "value": f"<video><video>\n{MOVES}"}, SAID]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    for name in ("a.png", "sub/b.png", "a.mp4", "b.webm", "frames/2.png", "frames/10.png", "frames/.hidden"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"only its place matters here")
    (tmp_path / "outside.png").write_bytes(b"")
    (folder / "link_in.png").symlink_to(folder / "a.png")
    (folder / "frames_out").mkdir()
    for link in ("link_out.png", "link.mp4", "frames_out/1.png"):
        (folder / link).symlink_to(tmp_path / "outside.png")
    return folder


def read(tmp_path, root, content, name="d.json", **options):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_records(path, root, **options)


def asked(*parts):
    return {"role": "user", "content": [*parts, {"type": "text", "text": MOVES}]}


def shown(*parts):
    return [asked(*parts), {"role": "assistant", "content": "A disc."}]


def test_json_and_jsonl_give_the_same_records(goldens):
    listed = read_records(goldens / "data/samples.json", goldens / "data/images")
    assert listed == read_records(goldens / "data/samples.jsonl", goldens / "data/images")
    assert len(listed) == 14
    assert (listed[0].id, listed[0].images) == ("000000", (goldens / "data/images/img0.png",))
    assert listed[4].images == ()
    assert listed[7].turns == (("human", "What is the time?"), ("gpt", "It is 10:45."))  # without gpt's first turn


def test_ids_images_answers_and_other_fields(tmp_path, root):
    two, question = [{"from": "human", "value": "<image><image>Which?"}], TEXT[:1]
    listed = [{"answer": "net", "answer_id": 1}, {"answer": "a net", "answer_id": 2}]
    entries = [
        {"conversations": question, "answers": ["5", "five"], "choices": ["a", "b"], "question_id": 7},
        {"id": 7, "image": "sub/b.png", "conversations": TALK},
        {"id": "x", "images": ["a.png", "link_in.png"], "conversations": two},
        {"id": "y", "image": None, "conversations": TEXT, "answers": listed},
    ]
    records = read(tmp_path, root, entries)
    assert [record.id for record in records] == ["0", "7", "x", "y"]
    images = [(), (root / "sub/b.png",), (root / "a.png", root / "link_in.png"), ()]
    assert [record.images for record in records] == images
    assert [record.references for record in records] == [("5", "five"), ("A dog.",), (), ("net", "a net")]
    assert [dict(record.fields) for record in records] == [{"choices": ["a", "b"], "question_id": 7}, {}, {}, {}]
    assert hash(records[0]) == hash(records[0])  # records are keys of caches
    for name, content in (("d.json", json.dumps(entries[1:2])), ("d.jsonl", json.dumps(entries[1]))):
        assert read(tmp_path, root, f"\ufeff{content}", name) == records[1:2]  # a byte order mark


def test_mark_of_a_lone_image_may_be_left_out(tmp_path, root):
    def read_leading(entry):
        return read(tmp_path, root, [{"id": "r1", **entry}], image_lead=True)[0]

    assert read_leading({"image": "a.png", "conversations": TEXT}).images == (root / "a.png",)
    assert read_leading({"image": "a.png", "conversations": TALK}).turns[0][1] == "<image>\nWhat?"
    for images, talk in ((["a.png", "a.png"], TEXT), (["a.png", "a.png"], TALK), ([], TALK)):
        told = r"record r1: text has \d <image> placeholder\(s\)"
        refused(told, read_leading, {"images": images, "conversations": talk})


# --- forms of a record ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "video"])
def test_every_form_is_the_same_record(root, kind):
    path = {"image": "a.png", "video": "a.mp4"}[kind]
    turns = [{"from": "user", "value": f"<{kind}>\n{MOVES}"}, {"from": "assistant", "value": "A disc."}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A disc."}]}
    forms = [
        {kind: path, "conversations": turns},
        {f"{kind}s": [path], "conversations": turns},
        {kind: path, "question": MOVES, "answer": "A disc."},
        {f"{kind}s": [path], "question": f"<{kind}>\n{MOVES}", "answer": "A disc."},
        {"messages": shown({"type": kind, kind: path})},
        {"messages": [asked({"type": f"{kind}_url", f"{kind}_url": {"url": path}}), answer]},
        {kind: path, "messages": shown({"type": kind})},
        {kind: path, "messages": shown()},
        {f"{kind}s": [path], "messages": [{"role": "user", "content": f"<{kind}>\n{MOVES}"}, answer]},
    ]
    if kind == "video":  # LLaVA-Video's
        forms.append({"video": path, "conversations": [{"from": "human", "value": f"<image>\n{MOVES}"}, SAID]})
    for form in forms:
        (record,) = make_records([form], root)
        assert record.turns == (("human", f"<{kind}>\n{MOVES}"), ("gpt", "A disc.")), form
        assert (record.images, record.videos)[kind == "video"] == (root / path,), form
        assert len(record.images + record.videos) == 1


def test_questions_with_choices_and_without_images():
    entry = {"id": "q", "question": "Which?", "choices": ["red", "blue"], "answer": 1, "category": "colour"}
    choice, plain = make_records([entry, {"question": "How many?", "answers": ["2", "two"]}], None)
    assert choice.turns == (("human", "Which?\nA. red\nB. blue"), ("gpt", "B"))
    assert (choice.id, choice.fields["category"]) == ("q", "colour")
    assert plain.turns == (("human", "How many?"),)
    assert plain.references == ("2", "two")


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
    mixed = [{"type": "image", "image": "a.png"}, {"type": "video", "video": "b.webm"}]
    (record,) = make_records([{"messages": shown(*mixed)}], root)
    assert (record.images, record.videos) == ((root / "a.png",), (root / "b.webm",))
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


# --- what is refused --------------------------------------------------------------------------------------------------


TURN = "message 0 must have 'role' user or assistant, and 'content'"
PLACED = {"type": "image", "image": "a.png"}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"conversations": TEXT, "answers": []}, "'answers' must be a non-empty list of strings, got []"),
        ({"conversations": TEXT, "answers": ["5", 5]}, "must be a non-empty list of strings, got ['5', 5]"),
        ({"conversations": TEXT, "answers": ["\ud83d"]}, "'answers' contains a lone surrogate"),
        ({}, "{from, value} turns (or use 'messages' of {role, content}, or 'question' and 'answer'"),
        ({"conversations": []}, "non-empty list"),
        ({"conversations": ["hello"]}, "turn 0"),
        ({"conversations": [TEXT[0], {"from": "bot", "value": "x"}]}, "turn 1"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 0"),
        ({"conversations": [TEXT[0], {"from": "gpt", "value": "\ud83d"}]}, "turn 1 contains a lone"),
        ({"conversations": [TEXT[0], TEXT[0]]}, "alternate"),
        ({"conversations": [TEXT[1]]}, "alternate"),
        ({"messages": [{"role": "system", "content": "Be brief."}, asked()]}, "remove it, and set data.system"),
        ({"messages": [{"role": "tool", "content": "x"}]}, TURN),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, TURN),
        ({"messages": {}}, TURN),
        ({"messages": [asked(PLACED)], "image": "b.png"}, "some images are in messages, others in 'images'"),
        ({"messages": [asked({"type": "image", "image": 3})]}, "'image' must be a path"),
        ({"conversations": TALK}, "1 <image> placeholder(s) for 0 image(s)"),
        ({"image": "a.png", "conversations": TEXT}, "0 <image> placeholder(s) for 1 image(s)"),
        ({"image": ["a.png"] * 10**5, "conversations": TALK}, "for 100000 image(s)"),
        ({"image": {"a": 1}, "conversations": TALK}, "path or a list of paths, got {'a': 1}"),
        ({"image": "", "conversations": TALK}, "path or a list of paths"),
        ({"image": "a.png", "images": ["a.png"], "conversations": TALK}, "keep one"),
        ({"image": "none.png", "conversations": TALK}, "does not exist"),
        ({"image": "sub", "conversations": TALK}, "is not a file"),
        ({"image": "\0", "conversations": TALK}, "must be a path below the image root"),
        ({"image": "\ud800", "conversations": TALK}, "does not exist"),
        ({"image": "a" * 300, "conversations": TALK}, "does not exist"),
        ({"image": "a/" * 4000, "conversations": TALK}, "does not exist"),
        ({"image": "sub/../a.png", "conversations": TALK}, "below the image root"),
        ({"image": "/etc/passwd", "conversations": TALK}, "below the image root"),
        ({"image": "link_out.png", "conversations": TALK}, "link to a file outside the image root"),
        ({"image": "data:image/png;base64," + "A" * 9999, "conversations": TALK}, "AAA...' is not a file: save"),
        ({"image": "https://host/a.png", "conversations": TALK}, "'https://host/a.png' is not a file: save it"),
        ({"video": "a.mp4", "conversations": TWO}, "2 <video> placeholder(s) for 1 video(s): write one"),
        ({"video": "a.mp4", "start": 3, "end": 1, "conversations": VIDEO}, "got 3 and 1"),
        ({"video": "a.mp4", "end": "9", "conversations": VIDEO}, "'start' and 'end' must be seconds"),
        ({"video": "link.mp4", "conversations": VIDEO}, "link to a file outside the image root"),
        ({"video": "frames_out", "conversations": VIDEO}, "link to a file outside the image root"),
        ({"video": "../root/frames", "conversations": VIDEO}, "must be a path below the image root"),
        ({"video": "/usr", "conversations": VIDEO}, "must be a path below the image root"),
        ({"video": "rtsp://host/a", "conversations": VIDEO}, "is not a file"),
        ({"video": "concat:a.mp4|b.webm", "conversations": VIDEO}, "does not exist"),
        ({"video": "data:video/mp4;base64,!", "conversations": VIDEO}, "is not valid base64"),
        ({"video": [[]], "conversations": VIDEO}, "list whose items are paths or lists of frames, got [[]]"),
        ({"video": "a.mp4", "videos": ["a.mp4"], "conversations": VIDEO}, "keep one"),
        ({"video": "a.mp4", "messages": shown({"type": "video", "video": "a.mp4"})}, "some videos are in messages"),
    ],
)
def test_malformed_record_names_file_and_record(tmp_path, root, entry, words):
    message = refused(re.escape(words), read, tmp_path, root, [{"id": "r1", **entry}])
    assert f"{tmp_path / 'd.json'}, record r1" in message
    assert len(message) < 800


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("[{]", "d.json", "line 1: not valid JSON"),
        ('[{"id": ' + "9" * 5000 + "}]", "d.json", "line 1: not valid JSON (Exceeds the limit"),
        ('{"conversations": []}\n{"conversations": []}', "d.json", "JSON Lines need the suffix .jsonl"),
        ("\n\n{bad}", "d.jsonl", "line 3: not valid JSON"),
        ('{"a": 1}', "d.json", "'a' is not a data set, expected an object"),
        ("3", "d.json", "contains a JSON int"),
        ("[]", "d.json", "contains no records"),
        ("", "d.jsonl", "contains no records"),
        ("[3]", "d.json", "record 0: is a int"),
        ('[{"id": true, "conversations": []}]', "d.json", "record 0: id True"),
        ('[{"id": "\\ud83d", "conversations": []}]', "d.json", "record 0: id '\\ud83d' must be"),
        ("{}", "d.json", "the data sets in this file have no records"),
        ("[" * 100_000, "d.json", "not valid JSON"),
        ('[{"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}]}]', "d.json", "no image folder"),
    ],
)
def test_malformed_file(tmp_path, content, name, words):
    assert str(tmp_path / name) in refused(re.escape(words), read, tmp_path, None, content, name)


def test_unreadable_files(tmp_path):
    refused("none.json: no such file", read_records, tmp_path / "none.json", None)
    for suffix in (".json", ".jsonl"):
        os.mkfifo(tmp_path / f"fifo{suffix}")
        refused(f"fifo{suffix}: is a FIFO, expected a file", read_records, tmp_path / f"fifo{suffix}", None)
    (tmp_path / "latin.json").write_bytes(b'["\xff"]')
    refused("not UTF-8", read_records, tmp_path / "latin.json", None)


def test_deeply_nested_values(tmp_path, root):
    """Deep enough that printing one fails, not so deep that parsing does."""
    for depth in range(800, 1000, 10):
        deep = "[" * depth + "]" * depth
        for field in ("id", "image", "conversations", "answers", "other"):
            content = f'[{{"{field}": {deep}}}]'
            refused(".", read, tmp_path, root, content)
            with contextlib.suppress(UserError):  # where parsing fails
                assert read(tmp_path, root, content, on_error="skip")[0].id == "0"


def test_skipped_entries_keep_their_places(tmp_path, root):
    entries = [{"id": "a", "conversations": TEXT}, 3, {"id": "c", "image": "no.png", "conversations": TALK}]
    odd = ["\ud83d", "x" * 10**6, "\33[2J\r\n", [1], 1.5, None]  # ids that are no text, or long
    entries += [{"id": name, "conversations": []} for name in odd]
    records = read(tmp_path, root, [*entries, {"id": "d", "conversations": TEXT}], on_error="skip")
    assert [record.id for record in records[:3]] == ["a", "1", "c"]
    assert [len(record.id) for record in records[3:]] == [1, 10**6, 6, 1, 1, 1, 1]
    assert [record.problem is None for record in records] == [True, *[False] * 8, True]
    assert "record c: image" in records[2].problem
    for record in records[1:-1]:
        assert len(record.problem) < 1000
        assert record.problem.isprintable()
    refused("not valid JSON", read, tmp_path, root, "[3", on_error="skip")  # nothing of it can be told apart


# --- sets, and shares of them -----------------------------------------------------------------------------------------


def test_fraction_is_a_fixed_draw_in_file_order():
    records = [Record(str(index), (("human", "q"),), ()) for index in range(100)]
    chosen = [record.id for record in take_fraction(records, 0.05, 7)]
    assert chosen == ["26", "42", "50", "54", "88"]  # stored: another process or machine must draw the same
    assert [record.id for record in take_fraction(records, 0.05, 8)] != chosen
    assert take_fraction(records, 1.0, 7) == records
    assert len(take_fraction(records, 0.001, 7)) == 1
    assert len(take_fraction(records, 0.29, 7)) == int(100 * 0.29)


def sets(tmp_path, root, **changes):
    """InternVL's object of two sets: ten records of text, and three with an image in a folder of their own."""
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"id": n, "conversations": TEXT}) for n in range(10)))
    lines = [json.dumps({"id": n, "image": "b.png", "conversations": TALK}) for n in range(3)]
    (tmp_path / "seen.jsonl").write_text("\n".join(lines))
    text = {"root": "", "annotation": "text.jsonl", "data_augment": False, "repeat_time": 0.29, "length": 10}
    seen = {"root": f"{root.name}/sub", "annotation": "seen.jsonl", "repeat_time": 2, **changes}
    (tmp_path / "meta.json").write_text("\ufeff" + json.dumps({"text": text, "seen": seen}, indent=1))
    return tmp_path / "meta.json"


def test_the_sets_that_internvl_lists(tmp_path, root, monkeypatch):
    path = sets(tmp_path, root)
    records = read_records(path, tmp_path)
    assert [r.id for r in records] == ["text/0", "text/1", *[f"seen/{n}" for n in (0, 1, 2)] * 2]
    assert records[2].images == (root / "sub/b.png",)
    assert data_files(path, tmp_path) == [path, tmp_path / "text.jsonl", tmp_path / "seen.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert len(read_records(path, None)) == len(records)
    (tmp_path / "seen.jsonl").write_text('{"id": 1\n')
    refused(r"seen\.jsonl, line 1: not valid JSON", read_records, path, tmp_path)
    kept = read_records(path, tmp_path, on_error="skip")
    assert [(r.id, r.problem is None) for r in kept][2:] == [("seen/0", False)] * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"annotation": None}, "'seen' is not a data set"),
        ({"annotation": "none.jsonl"}, "none.jsonl: no such file"),
        ({"annotation": "meta.json"}, "meta.json: contains a JSON dict, expected a list of conversations"),
        ({"annotation": "a\0b"}, "path contains an invalid character"),
        ({"annotation": "a" * 5000}, "cannot be opened (File name too long)"),
        ({"repeat_time": 1.5}, "set seen: repeat_time 1.5"),
        ({"repeat_time": True}, "set seen: repeat_time True"),
        ({"repeat_time": float("inf")}, "set seen: repeat_time inf must be an integer up to 1000"),
        ({"repeat_time": float("nan")}, "set seen: repeat_time nan"),
        ({"repeat_time": 10**9}, "set seen: repeat_time 1000000000"),
        ({"repeat_time": [1]}, "set seen: repeat_time [1]"),
        ({"data_augment": True}, "set seen: data_augment and max_dynamic_patch"),
        ({"max_dynamic_patch": 6}, "set data.max_tiles for all"),
    ],
)
def test_sets_that_cannot_be_read(tmp_path, root, changes, words):
    refused(re.escape(words), read_records, sets(tmp_path, root, **changes), tmp_path)
