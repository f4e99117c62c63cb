"""Chips and slices by name."""

from __future__ import annotations

import pytest

from vlmprune_jax.base.chips import CHIPS, peak_flops, slice_of
from vlmprune_jax.base.errors import UserError


def test_a_chip_of_tpu7x_is_two_devices():
    chip, devices = slice_of("tpu7x:2x2x2")
    assert (devices, chip.slices[1]) == (16, "2x2x2")
    assert chip.seconds(2307e12, 0, 0)["compute"] == 2  # a chip's second of arithmetic on one of its halves
    assert peak_flops("TPU7x") == 2307e12 / 2
    assert slice_of("v5p:2x2x2") == (CHIPS["v5p"], 8)
    assert slice_of("v5e:8x8:2") == (CHIPS["v5e"], 128)  # two slices


def test_unknown_slices_are_refused():
    with pytest.raises(UserError, match=r"unknown TPU \(known: v5e, v5p, v6e, tpu7x\): use for example v5e:8x8"):
        slice_of("v7x:2x2x1")
    long = "v5e:" + "x".join(["9999"] * 5000)  # its product has no float
    for name in (
        "tpu7x:8",
        long,
        "v5e:\N{ARABIC-INDIC DIGIT EIGHT}x8",
        "v5e:8x\N{ARABIC-INDIC DIGIT EIGHT}",
        long[:15] + "9" * 99,
    ):
        with pytest.raises(UserError, match="is not GENERATION:SIZES") as error:
            slice_of(name)
        assert len(str(error.value)) < 250
