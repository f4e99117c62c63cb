"""The demo's data set: counts, and captions that the pictures confirm."""

from collections import Counter
from pathlib import Path

import easy_vqa
import pytest
from PIL import Image

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.records import Record, read_records
from vlmprune_jax.demo.easyvqa import (
    CAPTION_PROMPT,
    balanced,
    caption_records,
    image_facts,
    multi_turn_records,
    single_turn_records,
    write_dataset,
)

RGB = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_dataset(tmp_path_factory.mktemp("data") / "easyvqa")


def test_counts_and_images(paths: dict[str, Path]) -> None:
    train, test = read_records(paths["train"], paths["images"]), read_records(paths["test"], paths["images"])
    assert (len(train), len(test)) == (38_575, 9_673)
    assert len({record.images for record in train}) == 4_000
    assert len({record.images for record in test}) == 1_000
    assert train[123].id == "train-000123"
    assert len({record.id for record in train + test}) == 48_248
    questions, answers, images = easy_vqa.get_test_questions()
    for number in (0, 4_000, 9_672):
        turns = (("human", f"<image>\n{questions[number]}"), ("gpt", answers[number]))
        assert test[number] == Record(
            f"test-{number:06d}", turns, (paths["images"] / "test" / f"{images[number]}.png",)
        )
        original = easy_vqa.get_test_image_paths()[images[number]]
        assert test[number].images[0].read_bytes() == Path(original).read_bytes()


def test_captions_are_what_the_pictures_show(paths: dict[str, Path]) -> None:
    records = read_records(paths["train_captions"], paths["images"])
    assert len(records) == 3_578
    assert Counter(text for record in records for _, text in record.turns[:1]) == {CAPTION_PROMPT: 3_578}
    for record in records[::4]:
        color, _ = record.turns[1][1].split()
        pixels = Image.open(record.images[0]).convert("RGB").getcolors(64 * 64)
        main = [rgb for _, rgb in sorted(pixels, reverse=True)[:2]]  # the background and the shape
        assert RGB[color] in main, record.id


def test_facts_come_from_open_and_negated_questions() -> None:
    asked = [
        ("what color is the circle?", "red", 0),
        ("is there not a triangle?", "no", 1),
        ("is no blue shape present?", "no", 1),
        ("does the image not contain a circle?", "yes", 2),
        ("is there a triangle?", "no", 2),
        ("is there a teal shape?", "no", 2),
        ("what is the shape?", "triangle", 3),
    ]
    questions, answers, images = (list(column) for column in zip(*asked, strict=True))
    assert image_facts((questions, answers, images)) == {
        0: ("red", "circle"),
        1: ("blue", "triangle"),
        2: (None, "rectangle"),
        3: (None, "triangle"),
    }
    captions = caption_records((questions, answers, images), "train")
    assert [entry["conversations"][1]["value"] for entry in captions] == ["red circle", "blue triangle"]


def test_facts_never_contradict_each_other() -> None:
    for questions in (easy_vqa.get_train_questions(), easy_vqa.get_test_questions()):
        facts = image_facts(questions)
        for question, answer, image in zip(*questions, strict=True):
            color, shape = facts[image]
            if question == "what shape is present?":
                assert shape == answer
            if question == "what color is the shape?":
                assert color == answer


def test_multi_turn_records_hold_every_question_once(paths: dict[str, Path]) -> None:
    questions = easy_vqa.get_train_questions()
    records = read_records(paths["train_multi_turn"], paths["images"])
    assert len(records) == 4_000
    turns = Counter(
        (text.removeprefix("<image>\n"), answer[1], record.images[0].stem)
        for record in records
        for (_, text), answer in zip(record.turns[::2], record.turns[1::2], strict=True)
    )
    assert turns == Counter((q, a, str(i)) for q, a, i in zip(*questions, strict=True))
    few = tuple(column[:40] for column in questions)
    assert multi_turn_records(few, "train", 1) == multi_turn_records(few, "train", 1)
    assert multi_turn_records(few, "train", 1) != multi_turn_records(few, "train", 2)


def test_wording_does_not_answer_balanced_questions(paths: dict[str, Path]) -> None:
    every, kept = Counter(), Counter()
    for name, found in (("train", every), ("train_balanced", kept)):
        for record in read_records(paths[name], paths["images"]):
            text, answer = record.turns[0][1], record.turns[1][1]
            found["not" in text.split() or "no" in text.split(), answer] += 1
    assert not any(negated for negated, _ in kept)
    assert all(kept[key] == every[key] for key in every if not key[0] and key[1] not in ("yes", "no"))
    assert kept[False, "no"] == kept[False, "yes"] == every[False, "yes"] < every[False, "no"] / 4
    questions = easy_vqa.get_train_questions()
    assert balanced(questions, 0) == balanced(questions, 0) != balanced(questions, 1)


def test_folder_is_kept_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "easyvqa"
    with monkeypatch.context() as patch:
        patch.setattr("vlmprune_jax.demo.easyvqa.multi_turn_records", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_dataset(out)
    assert list(tmp_path.iterdir()) == []  # nothing half-written
    first = write_dataset(out)
    before = first["train"].stat().st_mtime_ns
    assert write_dataset(out) == first
    assert first["train"].stat().st_mtime_ns == before
    (out / "images/train/7.png").unlink()
    with pytest.raises(UserError, match="not a complete easy-VQA folder"):
        write_dataset(out)


def test_records_carry_their_split() -> None:
    assert single_turn_records((["q?"], ["yes"], [5]), "test") == [
        {
            "id": "test-000000",
            "image": "test/5.png",
            "conversations": [{"from": "human", "value": "<image>\nq?"}, {"from": "gpt", "value": "yes"}],
        }
    ]
