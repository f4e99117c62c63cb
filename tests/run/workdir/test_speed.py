"""Medians of measured speed."""

import pytest
from msgspec.structs import replace
from report_cases import BENCH, NOISY, SPEED

from vlmprune_jax.run.workdir.speed import MedianSpeed


def test_medians_over_rounds():
    found = SPEED.medians()
    assert found["depth"] == found["depth-sft"]
    assert found[""] == MedianSpeed(prefill=100.0, decode=20.0, first_token=0.2, peak_bytes=1 << 20)
    assert replace(SPEED, pairs=[]).medians() == {}


def test_decode_rates_are_of_the_first_engine_and_type_of_weights():
    assert BENCH.decode_rates() == {800: 20.0, 1000: 20.0}
    other = replace(BENCH.sides[1], weights="Q4_0")
    assert replace(BENCH, sides=[BENCH.sides[0], other]).decode_rates() == {1000: 20.0}


def test_speedups_have_the_limits_of_their_pair():
    speedups = NOISY.medians()["depth"]
    assert (speedups.decode_speedup.ratio, speedups.prefill_speedup.ratio) == pytest.approx((5.1, 7.22))
    assert speedups.decode_speedup.limit == speedups.prefill_speedup.limit == 10 / 6
    assert SPEED.medians()[""].prefill_speedup is None
