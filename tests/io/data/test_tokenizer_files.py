"""Damaged and hostile tokenizers: one line that names the file, in seconds, and nothing of the libraries on stderr."""

import json
import os
import re
import shutil

import pytest
import refusal

from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.tokenizer_files import added_tokens


@pytest.fixture
def folder(goldens, tmp_path):
    return shutil.copytree(goldens / "tokenizers/bunny", tmp_path / "folder")


def edit(folder, name="tokenizer.json", **changes):
    content = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(content))


def refused(capfd, folder, said):
    message = refusal.refused(re.escape(said), load_tokenizer, folder)
    assert message.startswith(str(folder))
    assert len(message) < 600
    assert capfd.readouterr() == ("", "")


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(content, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    "rules",
    [
        {"pre_tokenizer": split(r"(a+)+$")},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(r"(\d+)+z")]}},
        {"normalizer": replace("", Regex=r"(\w+\s?)*$")},
        {"decoder": replace("", Regex=r"(.*)*x$")},
        {"normalizer": {"type": "Sequence", "normalizers": [replace("a" * 1000, String="a")] * 4}},
    ],
)
def test_rules_that_run_away(capfd, folder, rules):
    edit(folder, **rules)
    refused(capfd, folder, "tokenizer.json: its rules for splitting and replacing text need more than")


def test_rules_of_known_models(folder):
    """Those of GPT-2 and of Llama 3."""
    for pattern in (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
    ):
        edit(folder, pre_tokenizer=split(pattern))
        assert len(load_tokenizer(folder)("a word")["input_ids"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 2**31}, "unk_token": "a"}}, "$.model.vocab"),
        ({"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}, "$.model.vocab"),
        ({"model": {"type": "WordLevel", "vocab": {"a": True}, "unk_token": "a"}}, "$.model.vocab"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "$.model.vocab"),
        ({"model": {"type": "BPE"}}, "`vocab`"),
        ({"model": None}, "$.model"),
        ({"added_tokens": [{"id": 2**31, "content": "a"}]}, "$.added_tokens[0].id"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}, "its tokenizer: cannot be read"),
        ({"normalizer": replace("b", String="")}, "its tokenizer: cannot be read"),  # a panic
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "its tokenizer: cannot be read"),
        ({"pre_tokenizer": split("(")}, "unmatched parenthesis"),
    ],
)
def test_contents_that_cannot_be(capfd, folder, changes, said):
    edit(folder, **changes)
    refused(capfd, folder, said)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_no_json(capfd, folder, name):
    for text in ("", "[]", "{", '{"a": ' * 2000, "\0", '{"a": "\\ud800"}', "\xff"):
        (folder / name).write_bytes(text.encode("latin-1"))
        refused(capfd, folder, name)


def test_no_files(capfd, folder, tmp_path):
    """For a FIFO, the library would wait for a writer."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json")
    for name in names:
        copy = shutil.copytree(folder, tmp_path / name)
        (copy / name).unlink(missing_ok=True)
        os.mkfifo(copy / name)
        refused(capfd, copy, f"{name}: is a FIFO")
        (copy / name).unlink()
        (copy / name).symlink_to("gone")
        refused(capfd, copy, f"{name}: is a link to gone, which does not exist")
    (tmp_path / "empty").mkdir()
    refused(capfd, tmp_path / "empty", "its tokenizer: cannot be read")


def test_too_large(capfd, folder):
    with (folder / "tokenizer.json").open("ab") as file:
        file.truncate(200_000_000)
    refused(capfd, folder, "tokenizer.json: has 200,000,000 bytes")


def test_sentencepiece_files(capfd, goldens, tmp_path):
    folder = shutil.copytree(goldens / "tokenizers/llava", tmp_path / "folder")
    (folder / "tokenizer.json").unlink()
    for content in (b"garbage" * 1000, b"\n\x05\n\x01a\x15"):
        (folder / "tokenizer.model").write_bytes(content)
        refused(capfd, folder, "its tokenizer: cannot be read")
    (folder / "tokenizer.model").write_bytes(b"")
    load_tokenizer(folder)
    assert capfd.readouterr() == ("", "")


def test_a_text_longer_than_the_file_says(folder, capfd, caplog):
    for length in (4, "many"):
        edit(folder, "tokenizer_config.json", model_max_length=length)
        assert len(load_tokenizer(folder)("a word " * 10)["input_ids"]) > 4
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_ids_of_added_tokens(folder):
    for path in folder.iterdir():
        path.unlink()
    assert added_tokens(folder) == {}
    (folder / "added_tokens.json").write_text('{"a": 1, "b": 2}')
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"3": {"content": "b"}}}')
    assert added_tokens(folder) == {"a": 1, "b": 3}
    (folder / "tokenizer.json").write_text(
        '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 4, "content": "b"}]}'
    )
    assert added_tokens(folder) == {"a": 1, "b": 4}
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": {"content": "b"}}}')
    refusal.refused(r"tokenizer_config\.json: .*added_tokens_decoder", added_tokens, folder)
