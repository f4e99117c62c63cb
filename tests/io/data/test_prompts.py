"""Prompts, ids and labels equal the reference's, on its stored outputs and on random conversations."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusal import refused

from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.io.data.chat_template import choose_template
from vlmprune_jax.io.data.prompts import (
    load_tokenizer,
    move_images_first,
    render,
    tokenize_prompt,
    tokenize_training,
)
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.io.families import FAMILIES, templates
from vlmprune_jax.io.families.templates import Template
from vlmprune_jax.io.families.tiles import ImageShape

LLAVA = templates()["llava_v1"]


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
        assert render(record.turns, templates()[name], has_image=bool(record.images)).text == stored[record.id][key]


@pytest.mark.parametrize(
    ("file", "key", "folder", "template"),
    [
        ("llava", "llava", "llava", "llava_v1"),
        ("llava", "llava_legacy_tokenizer", "llava_legacy", "llava_v1"),
        ("llava", "llava_maxlen160", "llava", "llava_v1"),
        ("bunny", "bunny", "bunny", "bunny"),
        ("bunny", "bunny_maxlen160", "bunny", "bunny"),
        ("internvl", "internvl", "internvl", "phi3-chat"),
    ],
)
def test_ids_and_labels_equal_the_reference(
    goldens: Path, samples: list[Record], file: str, key: str, folder: str, template: str
) -> None:
    stored = json.loads((goldens / f"data/{file}_tokenized.json").read_text())[key]
    options = {
        "tokenizer": load_tokenizer(goldens / "tokenizers" / folder),
        "template": templates()[template],
        "image_token_id": 393 if file == "internvl" else -200,
        "tokens_per_image": stored.get("num_image_token_per_tile", 1),
        "cut_text_at": stored["model_max_length"],
    }
    assert len(stored["samples"]) == len(samples)
    for record, expected in zip(samples, stored["samples"], strict=True):
        images = {"images": shapes([expected["num_tiles"]] if record.images else [])} if file == "internvl" else {}
        ids, labels = tokenize_training(record, **options, **images)
        assert ids.tolist() == expected["input_ids"], record.id
        assert labels.tolist() == expected["labels"], record.id
        assert bool((labels == IGNORED).all()) == expected["all_ignored"], record.id
        assert ids.dtype == labels.dtype == np.int32


@pytest.fixture(scope="module")
def phi3(goldens: Path) -> Any:
    return load_tokenizer(goldens / "tokenizers/internvl")


def shapes(tiles: Sequence[int]) -> list[ImageShape]:
    return [ImageShape(1, count, count) for count in tiles]


PHI3 = {"template": templates()["phi3-chat"], "image_token_id": 393, "tokens_per_image": 2}


def test_a_prompt_is_the_training_row_up_to_its_answer(samples: list[Record], tokenizer: Any, phi3: Any) -> None:
    llava = {"tokenizer": tokenizer, "template": LLAVA, "image_token_id": -200, "tokens_per_image": 2}
    for number, options in ((0, llava), (4, llava), (1, PHI3), (4, PHI3), (11, PHI3)):
        record, given = samples[number], {"tokenizer": phi3, **options}
        images = shapes([1] * len(record.images))
        ids, labels = tokenize_training(record, **given, images=images, cut_text_at=None)
        prompt = tokenize_prompt(record, **given, images=images)
        assert prompt.tolist() == ids[: len(prompt)].tolist()
        assert (labels[: len(prompt)] == IGNORED).all() or len(record.turns) > 2
        assert (labels[len(prompt) :] != IGNORED).all()
        assert (prompt == given["image_token_id"]).sum() == 2 * len(record.images)
        if len(record.turns) == 2:
            question = dataclasses.replace(record, turns=record.turns[:1])
            assert np.array_equal(tokenize_prompt(question, **given, images=images), prompt)


def test_several_images_are_expanded_in_order(phi3: Any) -> None:
    turns = (("human", "Is <image> like <image>?"), ("gpt", "No."), ("human", "And <image>?"), ("gpt", "Yes."))
    record = Record("r", turns, (Path("a"), Path("b"), Path("c")))
    ids, _ = tokenize_training(record, phi3, **PHI3, images=shapes([3, 1, 2]), cut_text_at=None)
    runs = "".join("i" if token == 393 else "." for token in ids).split(".")
    assert [len(run) for run in runs if run] == [6, 2, 4]
    assert ids.tolist().count(391) == ids.tolist().count(392) == 3  # <img>, </img>


def test_lone_image_without_a_mark_leads(phi3: Any) -> None:
    image = (Path("a"),)
    bare = Record("r", (("human", "What is it?"), ("gpt", "A dog.")), image)
    marked = dataclasses.replace(bare, turns=(("human", "<image>\nWhat is it?"), bare.turns[1]))
    for one, other in zip(*(tokenize_training(r, phi3, **PHI3, cut_text_at=None) for r in (bare, marked)), strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(tokenize_prompt(bare, phi3, **PHI3), tokenize_prompt(marked, phi3, **PHI3))
    text = dataclasses.replace(bare, images=())
    assert 393 not in tokenize_prompt(text, phi3, **PHI3)


def test_text_cannot_pose_as_an_image(phi3: Any) -> None:
    for images in ((), (Path("a"),)):
        record = Record("r9", (("human", "<IMG_CONTEXT> hi"), ("gpt", "x")), images)
        for tokenize, options in ((tokenize_training, {"cut_text_at": None}), (tokenize_prompt, {})):
            refused("record r9: its text contains <IMG_CONTEXT>", tokenize, record, phi3, **PHI3, **options)


def test_internvl_text_is_cut_where_the_reference_cuts(samples: list[Record], phi3: Any) -> None:
    """Positions of an image count; the second has an empty answer, and the third a broken second round: mismatched."""
    turns = (("human", "<image>\nA?"), ("gpt", "Yes."), ("human", "B?"), ("gpt", ""))
    third = Record("r", turns, (Path("x"),))
    for record, tiles, limits in ((samples[6], [], (100, 150)), (samples[12], [4], (100, 150)), (third, [60], (260,))):
        whole, labels = tokenize_training(record, phi3, **PHI3, images=shapes(tiles), cut_text_at=None)
        for limit in (*limits, len(whole) - 3, len(whole), 400):
            ids, cut = tokenize_training(record, phi3, **PHI3, images=shapes(tiles), cut_text_at=limit)
            if not record.images:
                assert ids.tolist() == whole[:limit].tolist()
                assert cut.tolist() == labels[:limit].tolist()
            assert cut.tolist()[:limit] == reference_phi3_labels(record, phi3, limit, tiles).tolist()


def reference_phi3_labels(record: Record, tokenizer: Any, limit: int, tiles: Sequence[int]) -> np.ndarray:
    """InternVL's `preprocess_phi3` by its counting rule, written anew from its description."""
    prompt = render(record.turns, templates()["phi3-chat"], has_image=bool(record.images)).text
    for count in tiles:
        prompt = prompt.replace("<image>", "<img>" + "<IMG_CONTEXT>" * 2 * count + "</img>", 1)

    def count_of(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    labels = np.array(tokenizer(prompt)["input_ids"])[:limit]
    total = int((labels != tokenizer.pad_token_id).sum())
    labels[labels == tokenizer.convert_tokens_to_ids("<|endoftext|>")] = IGNORED
    turns = prompt.split("<|end|>")
    rounds = ["<|end|>".join(turns[:3])] + ["<|end|>".join(turns[i : i + 2]) for i in range(3, len(turns), 2)]
    done = 1
    labels[:done] = IGNORED
    role = "<|end|><|assistant|>\n"
    for text in rounds:
        parts = text.split(role)
        if not text or len(parts) != 2:
            break
        # BOS counts in the first round, the end mark that the split took away in all.
        instruction = count_of(parts[0] + role) - 1
        length = count_of(text) - 1 + 1
        labels[done : done + instruction] = IGNORED
        done += length
    labels[done:] = IGNORED
    if done < limit and done != total:
        labels[:] = IGNORED
    return labels


phi3_texts = st.lists(
    st.sampled_from(
        ["dog", "The", " ", "12", "\n", "naïve", "☕", "<|end|>", "<|user|>", "<|assistant|>\n", "<|endoftext|>", "?"]
    ),
    max_size=5,
).map(" ".join)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    rounds=st.lists(st.tuples(phi3_texts, phi3_texts), min_size=1, max_size=3),
    image=st.booleans(),
    limit=st.integers(165, 260),
)
def test_internvl_labels_equal_the_counting_rule(
    phi3: Any, rounds: list[tuple[str, str]], image: bool, limit: int
) -> None:
    turns = tuple(turn for question, answer in rounds for turn in (("human", question), ("gpt", answer)))
    record = Record("r", turns, (Path("x"),) if image else ())
    tiles = [3] if image else []
    _, labels = tokenize_training(record, phi3, **PHI3, images=shapes(tiles), cut_text_at=limit)
    assert labels[:limit].tolist() == reference_phi3_labels(record, phi3, limit, tiles).tolist()


@pytest.mark.parametrize(
    ("name", "family", "folder", "expected"),
    [
        ("auto", "llava", "llava", "llava_v1"),
        ("auto", "llava", "bunny", "bunny"),  # a Bunny exported as LlavaForConditionalGeneration
        ("auto", "bunny", "bunny", "bunny"),
        ("auto", "internvl-original", "internvl", "phi3-chat"),
        ("auto", "llama", "bunny", "llava_v1"),
        ("phi3-chat", "phi3", "internvl", "phi3-chat"),
        ("bunny", "internvl", "internvl", "bunny"),
    ],
)
def test_template_of_a_family(goldens: Path, name: str, family: str, folder: str, expected: str) -> None:
    tokenizer = load_tokenizer(goldens / "tokenizers" / folder)
    assert choose_template(name, FAMILIES[family], tokenizer, config={}, has_vision=True).name == expected


def test_template_that_the_tokenizer_cannot_write(tokenizer: Any) -> None:
    for name, advice in ("auto", "one of llava_v1, bunny"), ("internvl3", "auto or one of llava_v1, bunny"):
        message = rf"lacks <\|im_start\|>, .*<img>, .*: set data.template to {advice}"
        refused(message, choose_template, name, FAMILIES["internvl"], tokenizer, config={}, has_vision=True)


def test_empty_system_text_leaves_no_space() -> None:
    bare = dataclasses.replace(LLAVA, system="")
    turns = (("human", "a"), ("gpt", "b"), ("human", "c"))
    assert render(turns[:1], bare, has_image=False, generation=True).text == "USER: a ASSISTANT:"
    assert render(turns, bare, has_image=False, generation=True).text == "USER: a ASSISTANT: b</s>USER: c ASSISTANT:"


def test_images_move_to_the_front_of_their_turn() -> None:
    assert move_images_first("Look at <image> now. ") == "<image>\nLook at  now."
    assert move_images_first("a <image> b <image>") == "<image>\n<image>\na  b"
    assert move_images_first("  none ") == "  none "


def reference_labels(record: Record, tokenizer: Any, template: Template) -> list[int]:
    """LLaVA's `preprocess_v1` by its counting rule: lengths of rounds, instruction minus 2, later rounds minus 1."""

    def count(text: str) -> int:
        pieces = text.split("<image>") if record.images else [text]
        return sum(len(tokenizer(piece)["input_ids"]) for piece in pieces)

    prompt = render(record.turns, template, has_image=bool(record.images)).text
    ids, _ = tokenize_training(record, tokenizer, template, image_token_id=-200, tokens_per_image=1, cut_text_at=None)
    labels = ids.tolist()
    separator = " ASSISTANT: "
    done = 1
    labels[:done] = [IGNORED]
    for number, text in enumerate(prompt.split("</s>")):
        parts = text.split(separator)
        if len(parts) != 2:
            break
        length, instruction = count(text), count(parts[0] + separator) - 2
        if number:
            length, instruction = length - 1, instruction - 1
        labels[done : done + instruction] = [IGNORED] * instruction
        done += length
    labels[done:] = [IGNORED] * len(labels[done:])
    return labels if done == len(ids) else [IGNORED] * len(ids)


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
