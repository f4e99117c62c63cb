"""LLaVA-format files become records, and everything malformed is refused in one line with its file and record."""

import contextlib
import json
import os

import pytest

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.records import Record, data_files, read_records, take_fraction

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
TEXT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Nothing."}]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        (folder / name).write_bytes(b"only its place matters here")
    (tmp_path / "outside.png").write_bytes(b"")
    (folder / "link_out.png").symlink_to(tmp_path / "outside.png")
    (folder / "link_in.png").symlink_to(folder / "a.png")
    return folder


def read(tmp_path, root, content, name="d.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_records(path, root)


def test_json_and_jsonl_give_the_same_records(goldens):
    listed = read_records(goldens / "data/samples.json", goldens / "data/images")
    assert listed == read_records(goldens / "data/samples.jsonl", goldens / "data/images")
    assert len(listed) == 14
    assert listed[0].id == "000000"
    assert listed[0].images == (goldens / "data/images/img0.png",)
    assert listed[4].images == ()


def test_first_turn_of_gpt_is_dropped(goldens):
    record = read_records(goldens / "data/samples.json", goldens / "data/images")[7]
    assert record.turns == (("human", "What is the time?"), ("gpt", "It is 10:45."))


def test_ids_lists_of_images_and_links_inside(tmp_path, root):
    two = [{"from": "human", "value": "<image><image>Which?"}]
    records = read(
        tmp_path,
        root,
        [
            {"conversations": TEXT},
            {"id": 7, "image": "sub/b.png", "conversations": TALK},
            {"id": "x", "images": ["a.png", "link_in.png"], "conversations": two},
            {"id": "y", "image": None, "conversations": TEXT},
        ],
    )
    assert [record.id for record in records] == ["0", "7", "x", "y"]
    assert [record.images for record in records] == [
        (),
        (root / "sub/b.png",),
        (root / "a.png", root / "link_in.png"),
        (),
    ]


def test_several_answers_and_other_fields(tmp_path, root):
    question = TEXT[:1]
    records = read(
        tmp_path,
        root,
        [
            {"conversations": question, "answers": ["5", "five"], "choices": ["a", "b"], "question_id": 7},
            {
                "conversations": TEXT,
                "answers": [{"answer": "net", "answer_id": 1}, {"answer": "a net", "answer_id": 2}],
            },
            {"id": "x", "image": "a.png", "conversations": TALK},
            {"conversations": question},
        ],
    )
    assert [record.references for record in records] == [("5", "five"), ("net", "a net"), ("A dog.",), ()]
    assert [dict(record.fields) for record in records] == [{"choices": ["a", "b"], "question_id": 7}, {}, {}, {}]
    assert hash(records[0]) == hash(records[0])  # records are keys of caches


def test_mark_of_a_lone_image_may_be_left_out(tmp_path, root):
    path = tmp_path / "d.json"

    def read_leading(entry):
        path.write_text(json.dumps([{"id": "r1", **entry}]))
        return read_records(path, root, image_lead=True)

    assert read_leading({"image": "a.png", "conversations": TEXT})[0].images == (root / "a.png",)
    assert read_leading({"image": "a.png", "conversations": TALK})[0].turns[0][1] == "<image>\nWhat?"
    for wrong in (
        {"images": ["a.png", "a.png"], "conversations": TEXT},
        {"images": ["a.png", "a.png"], "conversations": TALK},
        {"conversations": TALK},
    ):
        with pytest.raises(UserError, match=r"record r1: text has \d <image> placeholder\(s\)"):
            read_leading(wrong)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"id": "r1", "conversations": TEXT, "answers": []}, "'answers' must be a non-empty list of strings, got []"),
        ({"id": "r1", "conversations": TEXT, "answers": "5"}, "'answers' must be a non-empty list of strings, got '5'"),
        ({"id": "r1", "conversations": TEXT, "answers": ["5", 5]}, "must be a non-empty list of strings, got ['5', 5]"),
        ({"id": "r1", "conversations": TEXT, "answers": ["\ud83d"]}, "'answers' contains a lone surrogate"),
        ({"id": "r1", "conversations": TALK}, "1 <image> placeholder(s) for 0 image(s)"),
        ({"id": "r1", "image": "a.png", "conversations": TEXT}, "0 <image> placeholder(s) for 1 image(s)"),
        ({"id": "r1", "images": ["a.png", "a.png"], "conversations": TALK}, "for 2 image(s)"),
        ({"id": "r1", "image": "none.png", "conversations": TALK}, "does not exist"),
        ({"id": "r1", "image": "sub", "conversations": TALK}, "is not a file"),
        ({"id": "r1", "image": "\0", "conversations": TALK}, "must be a path below the image root"),
        ({"id": "r1", "image": "\ud800", "conversations": TALK}, "does not exist"),
        ({"id": "r1", "image": ["a.png"] * 10**6, "conversations": TALK}, "for 1000000 image(s)"),
        ({"id": "r1", "image": {"a": 1}, "conversations": TALK}, "path or a list of paths, got {'a': 1}"),
        ({"id": "r1", "image": "a" * 300, "conversations": TALK}, "does not exist"),
        ({"id": "r1", "image": "../outside.png", "conversations": TALK}, "below the image root"),
        ({"id": "r1", "image": "sub/../a.png", "conversations": TALK}, "below the image root"),
        ({"id": "r1", "image": "/etc/passwd", "conversations": TALK}, "below the image root"),
        ({"id": "r1", "image": "link_out.png", "conversations": TALK}, "outside the image root"),
        ({"id": "r1", "image": "a/" * 4000, "conversations": TALK}, "does not exist"),
        (
            {"id": "r1", "image": "data:image/png;base64," + "A" * 9999, "conversations": TALK},
            "AAA...' is not a file: save",
        ),
        (
            {"id": "r1", "image": "https://host/a.png", "conversations": TALK},
            "'https://host/a.png' is not a file: save it",
        ),
        ({"id": "r1", "image": "", "conversations": TALK}, "path or a list of paths"),
        ({"id": "r1", "image": 3, "conversations": TALK}, "path or a list of paths"),
        ({"id": "r1", "image": "a.png", "images": ["a.png"], "conversations": TALK}, "keep one"),
        ({"id": "r1", "video": "a.png", "conversations": TEXT}, "0 <video> placeholder(s) for 1 video(s)"),
        ({"id": "r1"}, "non-empty list"),
        ({"id": "r1", "conversations": []}, "non-empty list"),
        ({"id": "r1", "conversations": ["hello"]}, "turn 0"),
        ({"id": "r1", "conversations": [TEXT[0], {"from": "bot", "value": "x"}]}, "turn 1"),
        ({"id": "r1", "conversations": [{"from": "human", "value": 3}]}, "turn 0"),
        ({"id": "r1", "conversations": [TEXT[0], {"from": "gpt", "value": "\ud83d"}]}, "turn 1 contains a lone"),
        ({"id": "r1", "conversations": [TEXT[0], TEXT[0]]}, "alternate"),
        ({"id": "r1", "conversations": [TEXT[1]]}, "alternate"),
    ],
)
def test_malformed_record_names_file_and_record(tmp_path, root, entry, words):
    with pytest.raises(UserError) as caught:
        read(tmp_path, root, [entry])
    message = str(caught.value)
    assert words in message
    assert f"{tmp_path / 'd.json'}, record r1" in message
    assert "\n" not in message
    assert len(message) < 800


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("[{]", "d.json", "line 1: not valid JSON"),
        ('[{"id": ' + "9" * 5000 + "}]", "d.json", "line 1: not valid JSON (Exceeds the limit"),
        ('{"conversations": []}\n{"conversations": []}', "d.json", "JSON Lines need the suffix .jsonl"),
        ('{"id": "a"', "d.jsonl", "line 1: not valid JSON"),
        ("\n\n{bad}", "d.jsonl", "line 3: not valid JSON"),
        ('{"a": 1}', "d.json", "'a' is not a data set, expected an object"),
        ("3", "d.json", "contains a JSON int"),
        ("[]", "d.json", "contains no records"),
        ("", "d.jsonl", "contains no records"),
        ("[3]", "d.json", "record 0: is a int"),
        ('[{"id": "", "conversations": []}]', "d.json", "record 0: id ''"),
        ('[{"id": true, "conversations": []}]', "d.json", "record 0: id True"),
        ('[{"id": "\\ud83d", "conversations": []}]', "d.json", "record 0: id '\\ud83d' must be"),
        ("{}", "d.json", "the data sets in this file have no records"),
        ("[" * 100_000, "d.json", "not valid JSON"),
    ],
)
def test_malformed_file(tmp_path, root, content, name, words):
    with pytest.raises(UserError) as caught:
        read(tmp_path, root, content, name)
    assert words in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path, root):
    entries = [{"id": "r1", "image": "a.png", "conversations": TALK}]
    for name, content in (("d.json", json.dumps(entries)), ("d.jsonl", json.dumps(entries[0]))):
        assert read(tmp_path, root, f"\ufeff{content}", name) == read(tmp_path, root, entries)
    path = sets(tmp_path, root)
    path.write_text(f"\ufeff{path.read_text()}")
    assert len(read_records(path, tmp_path)) == 8


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"none.json: no such file"):
        read_records(tmp_path / "none.json", None)
    for suffix in (".json", ".jsonl"):
        os.mkfifo(tmp_path / f"fifo{suffix}")
        with pytest.raises(UserError, match=f"fifo{suffix}: is a FIFO, expected a file"):
            read_records(tmp_path / f"fifo{suffix}", None)
    (tmp_path / "latin.json").write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match="not UTF-8"):
        read_records(tmp_path / "latin.json", None)


def test_image_without_a_root(tmp_path):
    with pytest.raises(UserError, match="there is no image folder"):
        read(tmp_path, None, [{"image": "a.png", "conversations": TALK}])


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
    (tmp_path / "meta.json").write_text(json.dumps({"text": text, "seen": seen}, indent=1))
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
    with pytest.raises(UserError, match=r"seen\.jsonl, line 1: not valid JSON"):
        read_records(path, tmp_path)
    kept = read_records(path, tmp_path, on_error="skip")
    assert [(r.id, r.problem is None) for r in kept][2:] == [("seen/0", False)] * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"annotation": None}, "'seen' is not a data set"),
        ({"annotation": "none.jsonl"}, "none.jsonl: no such file"),
        ({"repeat_time": 1.5}, "set seen: repeat_time 1.5"),
        ({"repeat_time": True}, "set seen: repeat_time True"),
        ({"repeat_time": float("inf")}, "set seen: repeat_time inf must be an integer up to 1000"),
        ({"repeat_time": float("nan")}, "set seen: repeat_time nan"),
        ({"repeat_time": 1e308}, "set seen: repeat_time 1e+308"),
        ({"repeat_time": 10**9}, "set seen: repeat_time 1000000000"),
        ({"repeat_time": [1]}, "set seen: repeat_time [1]"),
        ({"annotation": "meta.json"}, "meta.json: contains a JSON dict, expected a list of conversations"),
        ({"annotation": "a\0b"}, "path contains an invalid character"),
        ({"annotation": "a" * 5000}, "cannot be opened (File name too long)"),
        ({"data_augment": True}, "set seen: data_augment and max_dynamic_patch"),
        ({"max_dynamic_patch": 6}, "set data.max_tiles for all"),
    ],
)
def test_sets_that_cannot_be_read(tmp_path, root, changes, words):
    with pytest.raises(UserError) as caught:
        read_records(sets(tmp_path, root, **changes), tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_deeply_nested_values(tmp_path, root):
    """Deep enough that printing one fails, not so deep that parsing does."""
    for depth in range(800, 1000, 10):
        deep = "[" * depth + "]" * depth
        for field in ("id", "image", "conversations", "answers", "other"):
            (tmp_path / "d.json").write_text(f'[{{"{field}": {deep}}}]')
            with pytest.raises(UserError) as caught:
                read_records(tmp_path / "d.json", root)
            assert "\n" not in str(caught.value)
            with contextlib.suppress(UserError):  # where parsing fails
                assert read_records(tmp_path / "d.json", root, on_error="skip")[0].id == "0"


def test_ids_that_are_no_text_or_long(tmp_path, root):
    entries = [{"id": name, "conversations": []} for name in ("\ud83d", "x" * 10**6, "\33[2J\r\n", [1], 1.5, None)]
    (tmp_path / "d.json").write_text(json.dumps(entries))
    records = read_records(tmp_path / "d.json", root, on_error="skip")
    assert [len(record.id) for record in records] == [1, 10**6, 6, 1, 1, 1]
    for record in records:
        assert len(str(record.problem)) < 1000
        assert str(record.problem).isprintable()


def test_skipped_entries_keep_their_places(tmp_path, root):
    entries = [{"id": "a", "conversations": TEXT}, 3, {"id": "c", "image": "no.png", "conversations": TALK}]
    (tmp_path / "d.json").write_text(json.dumps([*entries, {"id": "d", "conversations": TEXT}]))
    records = read_records(tmp_path / "d.json", root, on_error="skip")
    assert [record.id for record in records] == ["a", "1", "c", "d"]
    assert [record.problem is None for record in records] == [True, False, False, True]
    assert "record c: image" in str(records[2].problem)
    (tmp_path / "d.json").write_text("[3")
    with pytest.raises(UserError, match="not valid JSON"):  # nothing of it can be told apart
        read_records(tmp_path / "d.json", root, on_error="skip")
