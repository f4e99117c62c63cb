"""Tokenizers of folders without tokenizer.json: the same ids as the file that such a folder should have."""

import json
import shutil

import pytest
from refusal import refused
from tokenizers import Tokenizer

from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.exports.vocabulary import read_tokenizer

MODELS = {"bunny": "bunny", "llava": "llava_orig", "llava_legacy": "llava_orig", "internvl": "internvl"}
# Space marks: at the start, behind special tokens, and where a piece begins with a space itself.
TEXTS = ["a  b", " leading", "  two", " ", "x</s> y", "<img> z", "</img>\nand", "<|end|> x", "naïve ☕\n\n1", "12.", ""]


@pytest.mark.parametrize("name", MODELS)
def test_the_ids_of_the_missing_file(goldens, tmp_path, name):
    """The folder names remote code, as the hub's do: it is neither run nor asked about."""
    for path in (goldens / "tokenizers" / name).iterdir():
        if path.name != "tokenizer.json":
            shutil.copy(path, tmp_path)
    config = json.loads((goldens / "ckpt" / MODELS[name] / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_hub.Config", "AutoModel": "modeling_hub.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    expected = Tokenizer.from_file(str(goldens / "tokenizers" / name / "tokenizer.json"))
    written = Tokenizer.from_str(json.dumps(read_tokenizer(tmp_path)))
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert written.encode(text).ids == expected.encode(text).ids, text
        assert loaded(text)["input_ids"] == expected.encode(text).ids, text


def test_a_folder_with_neither(tmp_path):
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    refused(r"its tokenizer: cannot be read .*use a folder with tokenizer.json", read_tokenizer, tmp_path)
