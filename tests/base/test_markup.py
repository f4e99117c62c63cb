"""Names of folders and texts of files in Markdown, YAML and CSV."""

import json

import pytest

from vlmprune_jax.base.markup import cell, code, markdown, yaml

EVIL = "a\n# b <img src=x onerror=y> [c](http://d) `e` | *f* _g_ www.h.i \x1b[2J"


def test_markdown_is_one_plain_line():
    line = markdown(EVIL)
    assert "\n" not in line
    for mark in ("# ", "<", "[", "](", "`", "|", "*", " _", "//", "www."):
        assert mark not in line.replace("\\" + mark[0], "").replace("www\\.", ""), mark
    assert markdown("llava_1.5-7b, depth 30 %") == "llava_1.5-7b, depth 30 %"


def test_code_is_one_span():
    assert code("a`b\n|c") == r"`a'b \|c`"


@pytest.mark.parametrize("name", ["a/b\nlicense: mit", "a: b", "null", "[x]", "- a", "{a}", "#", ""])
def test_yaml_is_a_string(name):
    assert json.loads(yaml(name)) == " ".join(name.split())


def test_plain_names_are_plain_yaml():
    assert [yaml(name) for name in ("org/model-1.5", "transformers", "llama.cpp")] == [
        "org/model-1.5", "transformers", "llama.cpp"
    ]  # fmt: skip


def test_cells_are_no_formulas():
    values = ["=1+1", "+1", "-1", "@x", "\tx", "a=1", -1.5, None, 0]
    assert [cell(value) for value in values] == ["'=1+1", "'+1", "'-1", "'@x", "'\tx", "a=1", -1.5, "", 0]
