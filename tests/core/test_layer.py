"""Grouping of layers into scans."""

import pytest

from vlmprune_jax.core.layer import layer_runs, scan_groups


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ("AAAA", ["A*4"]),
        ("ABC", ["A*1", "B*1", "C*1"]),
        ("LLLF" * 8, ["LLLF*8"]),
        ("LLLF" * 3 + "LLF" + "LLLF" * 4, ["L*2", "LFLL*3", "F*1", "LLLF*4"]),
        ("SSSSSF" * 5 + "SSSS", ["S*4", "SFSSSS*5"]),
        ("SSSSSF" * 2, ["S*5", "F*1", "S*5", "F*1"]),  # four blocks to compile, a pattern has six
        ("", []),
    ],
)
def test_the_fewest_blocks_are_compiled(layers, groups):
    """Equal neighbours are one run, and so are the layers at a position of a repeated pattern."""
    scans = scan_groups(tuple(layers))
    assert ["".join(run.layer for run in scan) + f"*{len(scan[0].numbers)}" for scan in scans] == groups
    runs = layer_runs(tuple(layers))
    assert sorted(number for run in runs for number in run.numbers) == [*range(len(layers))]
    assert all(layers[number] == run.layer for run in runs for number in run.numbers)
