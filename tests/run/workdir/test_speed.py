"""Medians of measured speed; which speed-ups are shown, and with which interval."""

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from report_cases import BENCH, NOISY, SPEED

from vlmprune_jax.run.workdir.speed import MedianSpeed, SpeedUp, speedup

STEADY = (100.0, 98.0, 103.0)


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


def test_ratio_of_medians_with_its_interval():
    """In pairs of rounds 1.5, 1.52 and 1.5 times; a machine that slows down for both models widens no interval."""
    found = speedup(STEADY, (150.0, 149.0, 155.0))
    assert found.measurable
    assert (found.ratio, found.spread) == (1.5, pytest.approx(0.05))
    assert 1.49 < found.low <= 1.5 <= found.high < 1.53
    assert (str(found), found.show(interval=False)) == (f"1.50 ({found.low:.2f} to {found.high:.2f})", "1.50")
    slower = np.linspace(1.0, 0.9, 9)
    drifting = speedup(100 * slower, 200 * slower)
    assert (drifting.low, drifting.high) == pytest.approx((2.0, 2.0))


def test_the_interval_covers_the_ratio():
    random = np.random.default_rng(0)
    rounds = np.exp(0.1 * random.normal(size=(300, 2, 15)))
    found = [speedup(before, 2 * after) for before, after in rounds]
    assert np.mean([one.low <= 2 <= one.high for one in found]) > 0.9


@pytest.mark.parametrize(
    ("before", "after", "limit", "reason"),
    [
        # 6 of 10 layers on a busy machine: "decodes 5.10 times as fast".
        ((10.0, 4.0, 18.6), (51.0, 50.0, 51.5), 10 / 6, " on this busy machine (repeats differ by 146 %)"),
        (STEADY, (120.0, 119.0, 120.5), None, " (repeats differ by 5 %)"),
        (STEADY, STEADY, None, " (repeats differ by 5 %)"),
        ((100.0, 101.0, 99.0), (510.0, 509.0, 511.0), 10 / 6, " (repeats differ by 2 %; FLOPs or bytes allow 1.67)"),
        ((100.0,), (150.0,), None, " (the spread of repeats is unknown)"),
    ],
)  # fmt: skip
def test_what_is_not_measurable(before, after, limit, reason):
    found = speedup(before, after, limit)
    assert not found.measurable
    assert (str(found), found.show()) == (f"not measurable{reason}", "not measurable")


def test_a_ratio_just_above_the_limit_is_measurable():
    """Its interval reaches the limit."""
    assert speedup(STEADY, (168.0, 163.0, 172.0), 10 / 6).measurable


def test_files_written_before_the_spread_was_recorded():
    found = msgspec.json.decode(b"[5.1, 2.0, 9.0]", type=SpeedUp)
    assert str(found) == "not measurable (the spread of repeats is unknown)"
