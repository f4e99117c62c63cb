"""Records in the forms that people have: OpenAI's messages, ShareGPT's turns, columns `question` and `answer`."""

import pytest
from PIL import Image

from vlmprune_jax.base.errors import UserError
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
