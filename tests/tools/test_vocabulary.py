"""The tokenizer of the demo's teacher agrees with LlavaProcessor and has one token for every word of the data set."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pretraining_data import write_pretraining_data
from vocabulary import make_tokenizer

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.io.data.prompts import load_tokenizer, tokenize_prompt, tokenize_training
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.io.families import templates

BARE = dataclasses.replace(templates()["llava_v1"], system="")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pretraining_data(tmp_path_factory.mktemp("data") / "easyvqa")


@pytest.fixture(scope="module")
def folder(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    entries = [entry for name in ("train", "train_captions") for entry in json.loads(paths[name].read_text())]
    assert make_tokenizer(entries, out, image_size=64, patch_size=8) <= 320
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


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
    words = " ".join(f"{chr(97 + a)}{chr(97 + b)}" for a in range(20) for b in range(20))
    entries = [{"conversations": [{"from": "human", "value": words}]}]
    with pytest.raises(UserError, match="limit 512"):
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
