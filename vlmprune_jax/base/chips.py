"""Peak performance of TPU chips, for rooflines and MFU, and of some GPUs, for MFU."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from vlmprune_jax.base.errors import UserError

GIGA, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Chip:
    """Peak rates and memory of one TPU device in jax: a chip, or one of the two halves of a TPU7x chip.

    Attributes:
      kinds: names of these devices in jax.
      flops: bfloat16 FLOP/s.
      hbm: bytes of HBM that a program may use.
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s received from other chips, all links together.
      int8: int8 operations per second; 0 if none are published.
      slices: common topologies (numbers of chips), smallest first.
      halves: number of jax devices per chip.
    """

    kinds: tuple[str, ...]
    flops: float
    hbm: float
    hbm_bandwidth: float
    ici_bandwidth: float
    slices: tuple[str, ...]
    int8: float = 0
    halves: int = 1

    def seconds(self, flops: float, traffic: float, received: float) -> dict[str, float]:
        """Return the seconds that compute, memory traffic and interconnect traffic would each take alone (roofline).

        `flops`, `traffic` (bytes of HBM read and written) and `received` (bytes from other devices) are per device. The
        roofline is the maximum of the three times, since the three activities overlap.
        """
        return {
            "compute": flops / self.flops,
            "memory": traffic / self.hbm_bandwidth,
            "interconnect": received / self.ici_bandwidth,
        }


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

# Google's "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" pages (docs.cloud.google.com/tpu/docs): peak compute per chip
# (bf16, int8), HBM bandwidth, and inter-chip interconnect bandwidth in Gbps (1600, 4800, 3200), which is one direction
# of all links. TPU7x: 2,307 TFLOP/s, 192 GiB, 7,380 GB/s and 1,200 GB/s in both directions per chip, split over its
# halves.
CHIPS = {
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819 * GIGA, 1600 * GIGA / 8, _FLAT, 394e12),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2765 * GIGA, 4800 * GIGA / 8, _CUBES, 918e12),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1640 * GIGA, 3200 * GIGA / 8, _FLAT, 1836e12),
    "tpu7x": Chip(("TPU7x",), 2307e12 / 2, 94.75 * GIB, 3690 * GIGA, 600 * GIGA / 2, _CUBES, halves=2),
}


# Dense bfloat16 FLOP/s by jax device name, from NVIDIA's data sheets (SXM); for H100 and H200 the sheets print the rate
# with sparsity, which is twice as high.
GPU_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H200": 989.5e12,
}


def chip_of(device_kind: str) -> Chip | None:
    """Return the `Chip` with this jax device name, such as "TPU v5 lite"; None for devices other than TPUs."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


def peak_flops(device_kind: str) -> float | None:
    """Return the peak bfloat16 FLOP/s of a device, given its name in jax; None for an unknown device."""
    chip = chip_of(device_kind)
    return GPU_FLOPS.get(device_kind) if chip is None else chip.flops


def slice_of(name: str) -> tuple[Chip, int]:
    """Return the chip type and number of jax devices of one or several TPU slices, named like "v5e:8x8" or "v5e:8x8:2".

    "v5e:8x8" has 64 devices, "v5e:8x8:2" (two slices) 128, "tpu7x:2x2x1" 8.

    Raises UserError if the generation is unknown, or the sizes are not numbers.
    """
    generation, _, grid = name.partition(":")
    examples = ", ".join(f"{key}:{chip.slices[-3]}" for key, chip in CHIPS.items())
    if generation not in CHIPS:
        raise UserError(f"topology {name[:40]!r}: unknown TPU (known: {', '.join(CHIPS)}): use for example {examples}")
    if not re.fullmatch(r"[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}(:[1-9][0-9]?)?", grid):  # a torus of 2 or 3 dimensions
        raise UserError(
            f"topology {name[:40]!r} is not GENERATION:SIZES or GENERATION:SIZES:SLICES: use for example {examples}"
        )
    chip = CHIPS[generation]
    return chip, chip.halves * math.prod(map(int, re.findall(r"\d+", grid)))
