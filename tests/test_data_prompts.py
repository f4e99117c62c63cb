"""Prompts, ids and labels equal the reference's, on its stored outputs and on random conversations."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmprune_jax.data.prompts import (
    IGNORE,
    TEMPLATES,
    Template,
    load_tokenizer,
    move_images_first,
    render,
    tokenize_prompt,
    tokenize_training,
)
from vlmprune_jax.data.records import Record, read_records
from vlmprune_jax.errors import UserError

LLAVA = TEMPLATES["llava_v1"]


@pytest.fixture(scope="module")
def samples(goldens: Path) -> list[Record]:
    return read_records(goldens / "data/samples.json", goldens / "data/images")


@pytest.fixture(scope="module")
def tokenizer(goldens: Path) -> Any:
    return load_tokenizer(goldens / "tokenizers/llava")


@pytest.mark.parametrize(
    ("name", "key"),
    [("llava_v1", "llava_v1"), ("bunny", "bunny"), ("phi3-chat", "internvl_phi3_chat_before_image_expansion")],
)
def test_prompt_text_equals_the_reference(goldens: Path, samples: list[Record], name: str, key: str) -> None:
    stored = json.loads((goldens / "data/prompts.json").read_text())
    for record in samples:
        assert render(record.turns, TEMPLATES[name], has_image=bool(record.images)) == stored[record.id][key]


@pytest.mark.parametrize(
    ("file", "key", "folder", "template"),
    [
        ("llava", "llava", "llava", "llava_v1"),
        ("llava", "llava_legacy_tokenizer", "llava_legacy", "llava_v1"),
        ("llava", "llava_maxlen160", "llava", "llava_v1"),
        ("bunny", "bunny", "bunny", "bunny"),
        ("bunny", "bunny_maxlen160", "bunny", "bunny"),
    ],
)
def test_ids_and_labels_equal_the_reference(
    goldens: Path, samples: list[Record], file: str, key: str, folder: str, template: str
) -> None:
    stored = json.loads((goldens / f"data/{file}_tokenized.json").read_text())[key]
    tokenizer = load_tokenizer(goldens / "tokenizers" / folder)
    assert len(stored["samples"]) == len(samples)
    for record, expected in zip(samples, stored["samples"], strict=True):
        ids, labels = tokenize_training(
            record,
            tokenizer,
            TEMPLATES[template],
            image_token_id=-200,
            tokens_per_image=1,
            cut_text_at=stored["model_max_length"],
        )
        assert ids.tolist() == expected["input_ids"], record.id
        assert labels.tolist() == expected["labels"], record.id
        assert bool((labels == IGNORE).all()) == expected["all_ignored"], record.id
        assert ids.dtype == labels.dtype == np.int32


def test_internvl_ids_and_labels_equal_the_reference(goldens: Path, samples: list[Record]) -> None:
    stored = json.loads((goldens / "data/internvl_tokenized.json").read_text())["internvl"]
    tokenizer = load_tokenizer(goldens / "tokenizers/internvl")
    assert len(stored["samples"]) == len(samples)
    for record, expected in zip(samples, stored["samples"], strict=True):
        ids, labels = tokenize_training(
            record,
            tokenizer,
            TEMPLATES["phi3-chat"],
            image_token_id=393,
            tokens_per_image=stored["num_image_token_per_tile"],
            tiles=[expected["num_tiles"]] if record.images else [],
            cut_text_at=stored["model_max_length"],
        )
        assert ids.tolist() == expected["input_ids"], record.id
        assert labels.tolist() == expected["labels"], record.id
        assert bool((labels == IGNORE).all()) == expected["all_ignored"], record.id


def test_image_expands_to_its_tokens(samples: list[Record], tokenizer: Any) -> None:
    options = {"tokenizer": tokenizer, "template": LLAVA, "cut_text_at": None}
    short, short_labels = tokenize_training(samples[0], **options, image_token_id=-200, tokens_per_image=1)
    ids, labels = tokenize_training(samples[0], **options, image_token_id=77, tokens_per_image=16)
    place = short.tolist().index(-200)
    assert ids.tolist() == [*short[:place], *[77] * 16, *short[place + 1 :]]
    assert labels.tolist() == [*short_labels[:place], *[IGNORE] * 16, *short_labels[place + 1 :]]


def test_generation_prompt_is_the_training_row_up_to_its_answer(samples: list[Record], tokenizer: Any) -> None:
    options = {"image_token_id": -200, "tokens_per_image": 1}
    for record in (samples[0], samples[4]):
        ids, labels = tokenize_training(record, tokenizer, LLAVA, **options, cut_text_at=None)
        prompt = tokenize_prompt(record, tokenizer, LLAVA, **options)
        assert prompt.tolist() == ids[: len(prompt)].tolist()
        assert (labels[: len(prompt)] == IGNORE).all()
        assert (labels[len(prompt) :] != IGNORE).all()
    question = dataclasses.replace(samples[0], turns=samples[0].turns[:1])
    assert tokenize_prompt(question, tokenizer, LLAVA, **options).tolist() == prompt_ids(samples[0], tokenizer)


def prompt_ids(record: Record, tokenizer: Any) -> list[int]:
    return tokenize_prompt(record, tokenizer, LLAVA, image_token_id=-200, tokens_per_image=1).tolist()


def test_empty_system_text_leaves_no_space() -> None:
    bare = dataclasses.replace(LLAVA, system="")
    turns = (("human", "a"), ("gpt", "b"), ("human", "c"))
    assert render(turns[:1], bare, has_image=False, generation=True) == "USER: a ASSISTANT:"
    assert render(turns, bare, has_image=False, generation=True) == "USER: a ASSISTANT: b</s>USER: c ASSISTANT:"


def test_images_move_to_the_front_of_their_turn() -> None:
    assert move_images_first("Look at <image> now. ") == "<image>\nLook at  now."
    assert move_images_first("a <image> b <image>") == "<image>\n<image>\na  b"
    assert move_images_first("  none ") == "  none "


def reference_labels(record: Record, tokenizer: Any, template: Template) -> list[int]:
    """LLaVA's `preprocess_v1` by its counting rule: lengths of rounds, instruction minus 2, later rounds minus 1."""

    def count(text: str) -> int:
        pieces = [tokenizer(piece)["input_ids"] for piece in text.split("<image>")] if record.images else None
        if pieces is None:
            return len(tokenizer(text)["input_ids"])
        return len(pieces[0]) + sum(len(piece) for piece in pieces[1:])

    prompt = render(record.turns, template, has_image=bool(record.images))
    ids, _ = tokenize_training(record, tokenizer, template, image_token_id=-200, tokens_per_image=1, cut_text_at=None)
    labels = ids.tolist()
    separator = " ASSISTANT: "
    done = 1
    labels[:done] = [IGNORE]
    for number, text in enumerate(prompt.split("</s>")):
        parts = text.split(separator)
        if len(parts) != 2:
            break
        length, instruction = count(text), count(parts[0] + separator) - 2
        if number:
            length, instruction = length - 1, instruction - 1
        labels[done : done + instruction] = [IGNORE] * instruction
        done += length
    labels[done:] = [IGNORE] * len(labels[done:])
    return labels if done == len(ids) else [IGNORE] * len(ids)


texts = st.lists(
    st.sampled_from(
        ["dog", "The", " ", "12", ".", "\n", "USER:", " ASSISTANT: ", "naïve", "☕", "is", "</s>", "?", ""]
    ),
    max_size=6,
).map(" ".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(rounds=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), image=st.booleans())
def test_labels_equal_the_counting_rule(tokenizer: Any, rounds: list[tuple[str, str]], image: bool) -> None:
    turns = [turn for question, answer in rounds for turn in (("human", question), ("gpt", answer))]
    if image:
        turns[0] = ("human", "<image>\n" + turns[0][1])
    record = Record("r", tuple(turns), (Path("x"),) if image else ())
    _, labels = tokenize_training(record, tokenizer, LLAVA, image_token_id=-200, tokens_per_image=1, cut_text_at=None)
    assert labels.tolist() == reference_labels(record, tokenizer, LLAVA)


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no loadable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="no loadable tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
