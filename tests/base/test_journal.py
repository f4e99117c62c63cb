"""Passes over many batches keep what each one gave: an interrupted pass continues after them, bit for bit."""

from __future__ import annotations

import json
import math
import os

from hostile import mutants

from vlmprune_jax.base.journal import Journal, continued, is_of


def test_a_pass_continues_after_the_last_whole_line(tmp_path):
    path, asked = tmp_path / "eval/a.journal", []

    def third_root(number: int) -> list[float]:
        asked.append(number)
        return [number ** (1 / 3), math.inf]

    entries = continued(third_root, range(5), Journal(path, {"batches": 5}))
    first = [next(entries) for _ in range(3)]
    path.write_text(path.read_text()[:-5])  # cut off by a kill
    again = list(continued(third_root, range(5), Journal(path, {"batches": 5})))
    assert asked == [0, 1, 2, 2, 3, 4]
    assert again == [third_root(number) for number in range(5)]
    assert again[:3] == first
    assert len(Journal(path, {"batches": 5}).entries) == 5
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join([*lines[:3], lines[3][:-5], *lines[4:]])
    )  # damaged in the middle: what follows is of which?
    assert Journal(path, {"batches": 5}).entries == again[:2]


def test_a_journal_of_another_pass_starts_again(tmp_path):
    path = tmp_path / "a.journal"
    Journal(path, {"mesh": [1, 1, 1]}).add(7)
    assert Journal(path, {"mesh": [1, 1, 1]}).entries == [7]
    assert Journal(path, {"mesh": [8, 1, 1]}).entries == []
    assert not path.exists()  # a pass that is refused leaves nothing
    path.write_bytes(b"\x00\xff no journal")
    assert Journal(path, {"mesh": [8, 1, 1]}).entries == []


def test_damaged_entries_are_computed_again(tmp_path):
    """From the first one on that is not what a batch gives."""
    path = tmp_path / "a.journal"
    good = [{"batches": 3}, [1.5, 0.0], [1.5, 1.0], [1.5, 2.0]]

    def fits(batch, entry):
        return is_of(list[float], entry) and len(entry) == 2

    for _, value in mutants(good, 0.4):
        lines = value if isinstance(value, list) else [value]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        pass_ = continued(lambda number: [1.5, float(number)], range(3), Journal(path, {"batches": 3}), fits)
        found = list(pass_)
        assert all(fits(None, entry) for entry in found)
        assert len(found) == 3
        assert Journal(path, {"batches": 3}).entries[:3] == json.loads(json.dumps(found))
    path.unlink()
    os.mkfifo(path)
    assert Journal(path, {"batches": 3}).entries == []


def test_without_a_journal_every_batch_is_computed():
    assert list(continued(lambda x: 2 * x, iter("ab"), None)) == ["aa", "bb"]
