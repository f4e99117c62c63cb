"""Names in what stages print and in Markdown, YAML and CSV: inert whatever stands in them."""

import io
import json

from rich.console import Console

from vlmprune_jax.base import console
from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.markup import cell, code, markdown, yaml

NAME = "[/red][bold]x :smile: \x1b[2J\x1b]0;t\x07\u202e\udcff\nnext"
INERT = "[/red][bold]x :smile: \\x1b[2J\\x1b]0;t\\x07\\u202e\\udcff next"


def said(do, *, terminal=False):
    out = io.StringIO()
    do(Reporter(Console(file=out, width=120, force_terminal=terminal, color_system=None)))
    return out.getvalue()


def test_lines_and_bars(monkeypatch):
    assert said(lambda reporter: reporter.say(f"  {NAME}")) == f"  {INERT}\n"
    assert len(said(lambda reporter: reporter.say("a" * 10**6))) < 1000

    def draw(reporter):
        with reporter.bar(NAME, 3) as update:
            update(2)

    assert INERT in said(draw, terminal=True)
    monkeypatch.setattr(console, "PAUSE_SECONDS", 0)
    assert said(draw) == f"  {INERT}: 2 of 3\n"


def test_tables_keep_their_columns():
    """Wide letters take two columns each, long names fold and end in an ellipsis, and numbers stay in line."""
    rows = [(NAME, "1.0"), ("深度剪枝", "22.0"), ("long" * 10**5, "333.0"), ("a", "4.0")]
    lines = said(lambda reporter: reporter.table(NAME, ("model", NAME[:8]), rows)).splitlines()
    assert all(line.isprintable() for line in lines)
    assert lines[0].strip() == INERT
    ends = {
        console.Text(line[: line.index(number) + len(number)]).cell_len
        for (_, number), line in zip(rows, [line for line in lines if "." in line], strict=True)
    }
    assert len(ends) == 1
    assert max(map(len, lines)) <= 120


def test_narrow_terminals_lose_columns_and_no_digits(monkeypatch):
    """At 80 columns names fold, then the last columns go, which a line names; large tables are cut."""
    out = io.StringIO()
    header = ("model", "retained, %", "95 % interval", "size, %", "decoding, x", "prompt, x", "parameters", "seconds")
    row = ("width 30.5 %, reconstructed + SFT + L2", "99.02", "98.8 to 99.3", "69.5", "1.14", "1.34", "734,016", "38.0")
    Reporter(Console(file=out, width=80, color_system=None)).table("t", header, [row, row])
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    shown = [name for name, number in zip(header, row, strict=True) if any(number in line for line in lines)]
    assert shown == list(header[1:6])
    assert "reconstructed" in out.getvalue()
    assert lines[-1] == "  (no room for: parameters; seconds)"
    monkeypatch.setattr(console, "MOST_ROWS", 2)
    out = said(lambda reporter: reporter.table("t", ["a"] * 30, [["b"] * 30] * 3))
    assert out.count("b") == 2 * console.MOST_COLUMNS
    assert out.endswith("  (shortened from 3 rows and 30 columns)\n")


EVIL = "a\n# b <img src=x onerror=y> [c](http://d) `e` | *f* _g_ www.h.i \x1b[2J"


def test_markdown_is_one_plain_line():
    line = markdown(EVIL)
    assert "\n" not in line
    for mark in ("# ", "<", "[", "](", "`", "|", "*", " _", "//", "www."):
        assert mark not in line.replace("\\" + mark[0], "").replace("www\\.", ""), mark
    assert markdown("llava_1.5-7b, depth 30 %") == "llava_1.5-7b, depth 30 %"
    assert code("a`b\n|c") == r"`a'b \|c`"


def test_yaml_is_a_string():
    for name in ("a/b\nlicense: mit", "a: b", "null", "[x]", "- a", "{a}", "#", ""):
        assert json.loads(yaml(name)) == " ".join(name.split())
    assert [*map(yaml, ("org/model-1.5", "llama.cpp"))] == ["org/model-1.5", "llama.cpp"]


def test_cells_are_no_formulas():
    values = ["=1+1", "+1", "-1", "@x", "\tx", "a=1", -1.5, None, 0]
    assert [cell(value) for value in values] == ["'=1+1", "'+1", "'-1", "'@x", "'\tx", "a=1", -1.5, "", 0]
