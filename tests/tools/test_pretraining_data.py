"""The data and the tokenizer of the demo's teacher: what a picture shows, balanced questions, a word is a token."""

import dataclasses

import easy_vqa
import pytest
from PIL import Image
from pretraining_data import balanced, caption_records, image_facts
from vocabulary import make_tokenizer

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.prompts import load_tokenizer, tokenize_training
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.families import templates


def entry(*turns):
    speakers = ("human", "gpt") * len(turns)
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in zip(speakers, turns, strict=False)]}


def test_facts_come_from_open_and_negated_questions():
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
    facts = {0: ("red", "circle"), 1: ("blue", "triangle"), 2: (None, "rectangle"), 3: (None, "triangle")}
    assert image_facts((questions, answers, images)) == facts
    captions = caption_records((questions, answers, images), "train")
    assert [record["conversations"][1]["value"] for record in captions] == ["red circle", "blue triangle"]


def test_as_many_questions_have_the_answer_yes_as_no():
    questions, answers, _ = balanced(easy_vqa.get_train_questions(), 0)
    assert not any({"no", "not"} & set(question.split()) for question in questions)
    assert answers.count("yes") == answers.count("no") > 1000


def test_the_processor_gives_our_ids(tmp_path):
    from transformers import AutoProcessor

    turns = ("<image>\nis it a red box?", "no", "what is it?", "triangle")
    make_tokenizer([entry(*turns)], tmp_path / "t", image_size=64, patch_size=8)
    make_tokenizer([entry(*turns[2:]), entry(*turns[:2])], tmp_path / "again", image_size=64, patch_size=8)
    for file in (tmp_path / "t").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>", "<image>"]) == [0, 1, 2, 3, 4]
    text = "naïve ☕ 你好\t42"
    assert tokenizer.decode(tokenizer(text)["input_ids"][1:]) == text
    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png")
    record = Record("r", tuple(zip(("human", "gpt") * 2, turns, strict=True)), (tmp_path / "0.png",))

    bare = dataclasses.replace(templates()["llava_v1"], system="")
    ids, labels = tokenize_training(record, tokenizer, bare, image_token_id=4, tokens_per_image=64, cut_text_at=None)
    assert tokenizer.decode(labels[labels >= 0]) == " no</s> triangle</s>"
    messages = [{"role": role, "content": [{"type": "text", "text": text.removeprefix("<image>\n")}]}
                for role, text in zip(("user", "assistant") * 2, turns, strict=True)]  # fmt: skip
    messages[0]["content"].insert(0, {"type": "image", "image": Image.open(tmp_path / "0.png")})
    processor = AutoProcessor.from_pretrained(tmp_path / "t", local_files_only=True)
    whole = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert whole["input_ids"][0] == ids.tolist()


def test_too_many_words_are_refused(tmp_path):
    words = " ".join(f"{chr(97 + a)}{chr(97 + b)}" for a in range(20) for b in range(20))
    with pytest.raises(UserError, match="limit 512"):
        make_tokenizer([entry(words)], tmp_path / "t", image_size=64, patch_size=8)
    assert not (tmp_path / "t").exists()
