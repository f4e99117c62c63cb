"""The demo's data set: counts, captions that the pictures confirm, and a tokenizer that agrees with LlavaProcessor."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import easy_vqa
import numpy as np
import pytest
from PIL import Image

from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.prompts import load_tokenizer, tokenize_prompt, tokenize_training
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
from vlmprune_jax.demo.vocabulary import make_tokenizer
from vlmprune_jax.families import templates

BARE = dataclasses.replace(templates()["llava_v1"], system="")
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


@pytest.fixture(scope="module")
def folder(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    entries = [entry for name in ("train", "train_captions") for entry in json.loads(paths[name].read_text())]
    assert make_tokenizer(entries, out, image_size=64, patch_size=8) <= 320
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


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


def test_every_question_is_short_and_every_answer_one_word(paths: dict[str, Path], tokenizer: Any) -> None:
    seen = {record.turns for record in read_records(paths["test"], paths["images"])}
    for (_, question), (_, answer) in seen:
        assert len(tokenizer(question.removeprefix("<image>\n"), add_special_tokens=False)["input_ids"]) <= 12
        record = Record("r", (("human", question), ("gpt", answer)), (Path("x"),))
        ids, labels = tokenize_training(
            record, tokenizer, BARE, image_token_id=4, tokens_per_image=64, cut_text_at=None
        )
        kept = labels[labels != IGNORED]
        assert len(kept) == 2  # the word and </s>
        assert tokenizer.decode(kept) == f" {answer}</s>"
        assert (ids == 4).sum() == 64
        assert 0 not in ids


def test_special_ids_and_any_text(tokenizer: Any) -> None:
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>", "<image>"]) == [0, 1, 2, 3, 4]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    for text in ("naïve ☕ 你好\t42", "is it a purple-ish Hexagon?"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1
        assert 0 not in ids
        assert tokenizer.decode(ids[1:]) == text
    system = templates()["llava_v1"].system
    assert len(tokenizer(system)["input_ids"]) == 1 + len(system.replace(".", " .").replace(",", " ,").split()) + 1


def test_equal_records_give_equal_files(paths: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    entries = [entry for name in ("train", "train_captions") for entry in json.loads(paths[name].read_text())]
    make_tokenizer(reversed(entries), tmp_path, image_size=64, patch_size=8)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in folder.iterdir())
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_too_many_words_are_refused(tmp_path: Path) -> None:
    words = " ".join(f"{chr(97 + a)}{chr(97 + b)}" for a in range(10) for b in range(10))
    entries = [{"conversations": [{"from": "human", "value": words}]}]
    with pytest.raises(UserError, match="limit 320"):
        make_tokenizer(entries, tmp_path / "t", image_size=64, patch_size=8)
    assert not (tmp_path / "t").exists()


def messages(record: Record) -> Iterator[dict[str, Any]]:
    for speaker, text in record.turns:
        content: list[dict[str, Any]] = [{"type": "text", "text": text.removeprefix("<image>\n")}]
        if text.startswith("<image>"):
            content.insert(0, {"type": "image", "image": Image.open(record.images[0])})
        yield {"role": "user" if speaker == "human" else "assistant", "content": content}


@pytest.mark.parametrize("name", ["train", "train_captions", "train_multi_turn"])
def test_llava_processor_gives_our_ids(paths: dict[str, Path], folder: Path, tokenizer: Any, name: str) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    options = {"image_token_id": processor.image_token_id, "tokens_per_image": 64}
    for record in read_records(paths[name], paths["images"])[:3]:
        whole = processor.apply_chat_template(list(messages(record)), tokenize=True, return_dict=True)
        ids, _ = tokenize_training(record, tokenizer, BARE, **options, cut_text_at=None)
        assert whole["input_ids"][0] == ids.tolist()
        prompt = processor.apply_chat_template(
            list(messages(record))[:-1], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        assert prompt["input_ids"][0] == tokenize_prompt(record, tokenizer, BARE, **options).tolist()
        assert np.shape(prompt["pixel_values"][0]) == (3, 64, 64)


def test_records_carry_their_split() -> None:
    assert single_turn_records((["q?"], ["yes"], [5]), "test") == [
        {
            "id": "test-000000",
            "image": "test/5.png",
            "conversations": [{"from": "human", "value": "<image>\nq?"}, {"from": "gpt", "value": "yes"}],
        }
    ]
