"""Damaged and hostile tokenizers: one line that names the file, in seconds, and nothing of the libraries on stderr."""

import json
import os
import shutil

import pytest

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.tokenizer_files import added_tokens


@pytest.fixture
def folder(goldens, tmp_path):
    return shutil.copytree(goldens / "tokenizers/bunny", tmp_path / "folder")


def edit(folder, name="tokenizer.json", **changes):
    content = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(content))


def refused(capfd, folder, *parts):
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    said = str(error.value)
    assert said.startswith(str(folder)), said
    for part in parts:
        assert part in said, said
    assert len(said) < 600
    assert capfd.readouterr() == ("", "")


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(content, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    "rules",
    [
        {"pre_tokenizer": split(r"(a+)+$")},
        {"pre_tokenizer": split(r"((ab)+)+$")},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(r"(\d+)+z")]}},
        {"normalizer": replace("", Regex=r"(\w+\s?)*$")},
        {"decoder": replace("", Regex=r"(.*)*x$")},
        {"normalizer": {"type": "Sequence", "normalizers": [replace("a" * 1000, String="a")] * 4}},
    ],
    ids=["runs", "words", "nested", "normalizer", "decoder", "memory"],
)
def test_rules_that_run_away(capfd, folder, rules):
    edit(folder, **rules)
    refused(capfd, folder, "tokenizer.json: its rules for splitting and replacing text need more than")


@pytest.mark.parametrize(
    "pattern",
    [
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
    ],
    ids=["gpt2", "llama3"],
)
def test_rules_of_known_models(folder, pattern):
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


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": ' * 2000, "\0", '{"a": "\\ud800"}', "\xff"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_no_json(capfd, folder, name, text):
    (folder / name).write_bytes(text.encode("latin-1"))
    refused(capfd, folder, name)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json"],
)
def test_no_files(capfd, folder, name):
    """The library would wait for a writer."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(capfd, folder, f"{name}: is a FIFO")
    (folder / name).unlink()
    (folder / name).symlink_to("gone")
    refused(capfd, folder, f"{name}: is a link to gone, which does not exist")


def test_too_large(capfd, folder):
    with (folder / "tokenizer.json").open("ab") as file:
        file.truncate(200_000_000)
    refused(capfd, folder, "tokenizer.json: has 200,000,000 bytes")


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, b"\n\x05\n\x01a\x15"])
def test_sentencepiece_files(capfd, goldens, tmp_path, content):
    folder = shutil.copytree(goldens / "tokenizers/llava", tmp_path / "folder")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    if content:
        refused(capfd, folder, "its tokenizer: cannot be read")
    else:
        load_tokenizer(folder)
    assert capfd.readouterr() == ("", "")


def test_a_text_longer_than_the_file_says(folder, capfd, caplog):
    edit(folder, "tokenizer_config.json", model_max_length=4)
    assert len(load_tokenizer(folder)("a word " * 10)["input_ids"]) > 4
    edit(folder, "tokenizer_config.json", model_max_length="many")
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
    with pytest.raises(UserError, match=r"tokenizer_config\.json: .*added_tokens_decoder"):
        added_tokens(folder)
