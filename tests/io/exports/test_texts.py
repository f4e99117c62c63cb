"""Texts by which a vocabulary is chosen: records of every form, text files, lists of texts and of token ids."""

import json

import pytest

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.exports.token_sources import read_texts
from vlmprune_jax.io.families.templates import QWEN3_VL

TURN = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"


def written(path, value):
    path.write_text(json.dumps(value))
    return str(path)


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]},
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]},
        {"question": "What?", "answer": "A cat."},
    ],
)
def test_records(tmp_path, record):
    found = read_texts(written(tmp_path / "r.json", [{**record, "labels": ["dog", 3]}]), QWEN3_VL)
    assert found == [TURN, "dog"]


def test_images_are_not_opened(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    path = written(tmp_path / "r.json", [{"image": "none.png", "conversations": turns, "answers": ["cat", "a cat"]}])
    texts = read_texts(path, QWEN3_VL)
    assert "".join(texts[:-2]) == TURN
    assert texts[-2:] == ["cat", "a cat"]


def test_lists_and_text_files(tmp_path):
    assert read_texts(written(tmp_path / "l.json", ["a", "b", 7]), QWEN3_VL) == ["a", "b", 7]
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "t.txt").write_text(text)
    parts = read_texts(str(tmp_path / "t.txt"), QWEN3_VL)
    assert "".join(parts) == text
    assert 3 < len(parts) < 6


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"none.txt: no such file \(set in prune.vocabulary\)"):
        read_texts(str(tmp_path / "none.txt"), QWEN3_VL)
    with pytest.raises(UserError, match=r"l.json, record 0: is a list, expected an object with 'conversations'"):
        read_texts(written(tmp_path / "l.json", [[]]), QWEN3_VL)
    with pytest.raises(UserError, match=r"l.json: a text contains a lone surrogate \(.*\): remove it"):
        read_texts(written(tmp_path / "l.json", ["\ud800"]), QWEN3_VL)
