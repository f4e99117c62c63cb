"""Medians of measured speed."""

import pytest
from msgspec.structs import replace
from report_cases import BENCH, SPEED

from vlmprune_jax.workdir.speed import MedianSpeed, speedup


def test_medians_over_rounds():
    found = SPEED.medians()
    assert found["depth"] == found["depth-sft"]
    assert found[""] == MedianSpeed(prefill=100.0, decode=20.0, first_token=0.2, peak_bytes=1 << 20)
    assert replace(SPEED, pairs=[]).medians() == {}


def test_decode_rates_are_of_the_first_engine_and_type_of_weights():
    assert BENCH.decode_rates() == {800: 20.0, 1000: 20.0}
    other = replace(BENCH.sides[1], weights="Q4_0")
    assert replace(BENCH, sides=[BENCH.sides[0], other]).decode_rates() == {1000: 20.0}


def test_speedups_are_compared_round_by_round():
    """A machine that slows down does so for both models of a round: 2.0 and 1.5 times, not 1.67."""
    assert speedup([1.0, 2.0], [2.0, 3.0]) == (1.75, 1.5, 2.0)
    found = SPEED.medians()
    assert found["depth"].prefill_speedup == pytest.approx((1.5, 1.5, 14 / 9))
    assert found[""].prefill_speedup is None
