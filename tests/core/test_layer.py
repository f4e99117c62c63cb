"""Grouping of layers into scans."""

import itertools

import pytest

from vlmprune_jax.core.layer import layer_runs, scan_groups


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ("AAAA", ["A*4"]),
        ("ABC", ["A*1", "B*1", "C*1"]),
        ("LLLF" * 8, ["LLLF*8"]),
        ("LLLF" * 3 + "LLF" + "LLLF" * 4, ["LLLF*3", "L*2", "F*1", "LLLF*4"]),
        ("SSSSSF" * 5 + "SSSS", ["SSSSSF*5", "S*4"]),
        ("SSSSSF" * 2, ["SSSSSF*2"]),
        ("AABAAB" + "B", ["AAB*2", "B*1"]),
        ("", []),
    ],
)
def test_the_fewest_blocks_are_compiled(layers, groups):
    """Equal neighbours are one run, alone and in every repetition of a pattern."""
    scans = scan_groups(tuple(layers))
    texts = ["".join(run.layer * (len(run.numbers) // scan.repetitions) for run in scan.runs) for scan in scans]
    assert [f"{text}*{scan.repetitions}" for text, scan in zip(texts, scans, strict=True)] == groups
    runs = layer_runs(tuple(layers))
    neighbours = sum(a != b for a, b in itertools.pairwise(layers)) + bool(layers)
    assert len(runs) == sum(len(scan.runs) for scan in scans) <= neighbours
    assert sorted(number for run in runs for number in run.numbers) == [*range(len(layers))]
    assert all(layers[number] == run.layer for run in runs for number in run.numbers)
