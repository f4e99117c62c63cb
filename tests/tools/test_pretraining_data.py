"""The data of pretraining: captions that the pictures confirm, and questions that need the image."""

from collections import Counter
from pathlib import Path

import easy_vqa
import pytest
from PIL import Image
from pretraining_data import (
    CAPTION_PROMPT,
    balanced,
    caption_records,
    image_facts,
    multi_turn_records,
    write_pretraining_data,
)

from vlmprune_jax.io.data.records import read_records

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
    return write_pretraining_data(tmp_path_factory.mktemp("data") / "easyvqa")


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
