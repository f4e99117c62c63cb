"""`speed.json` (pruned shapes beside the unpruned model) and `bench.json` (`vlmprune bench --json`): measured speed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from vlmprune_jax.core.files import Count, Finite
from vlmprune_jax.distributed.machine import cpu
from vlmprune_jax.evaluation.speed.clock import BenchSide, Measurement, SpeedConfig
from vlmprune_jax.workdir.artefact import Artefact, Part

SPEED, BENCH = "speed.json", "bench.json"


SpeedUp = tuple[Finite, Finite, Finite]  # median, least and most over the rounds, as a multiple of the unpruned speed


class MedianSpeed(Part, frozen=True, kw_only=True):
    """Median speeds over rounds: prefill and decoding in tokens/s, first token in seconds, speed-ups."""

    prefill: Finite
    decode: Finite
    first_token: Finite
    peak_bytes: Count | None
    prefill_speedup: SpeedUp | None = None
    decode_speedup: SpeedUp | None = None


def medians(measured: Measurement, unpruned: Measurement | None = None) -> MedianSpeed:
    """Return the medians over rounds, with speed-ups if the unpruned model's measurement is passed."""
    speeds = {name: statistics.median(getattr(measured, name)) for name in ("prefill", "decode", "first_token")}
    speedups: dict[str, Any] = {
        f"{name}_speedup": speedup(getattr(unpruned, name), getattr(measured, name))
        for name in ("prefill", "decode")
        if unpruned is not None
    }
    return MedianSpeed(**speeds, **speedups, peak_bytes=measured.peak_bytes)


def speedup(before: Sequence[float], after: Sequence[float]) -> SpeedUp:
    """Return the median, smallest and largest speed-up over rounds."""
    rounds = [new / old for old, new in zip(before, after, strict=False)]
    return statistics.median(rounds), min(rounds), max(rounds)


def spread(speeds: Sequence[float]) -> float:
    """Return the relative spread of speeds over rounds: (largest - smallest) / median."""
    return (max(speeds) - min(speeds)) / statistics.median(speeds)


class Pair(Part, frozen=True, kw_only=True):
    """Speed of one pruned layer shape, measured in turns with the unpruned model."""

    models: Annotated[list[str], Meta(min_length=1)]
    unpruned: Measurement
    pruned: Measurement


class BenchWorkload(Part, frozen=True, kw_only=True):
    """Prompt that all models receive in a benchmark, and number of rounds."""

    rounds: Count
    prompt_tokens: Count
    new_tokens: Count
    image: bool
    dtype: str


class SpeedWorkload(BenchWorkload, frozen=True, kw_only=True):
    """Workload of the speed stage: prompt, rounds, and rows per batch."""

    batch_size: Count


class Speed(Artefact, frozen=True, kw_only=True, tag=1):
    """File `speed.json`; `load` is the machine's load average before the measurement."""

    HINT: ClassVar[str] = "run `vlmprune run` again, or remove the file"
    processor: str
    load: float
    workload: SpeedWorkload
    pairs: list[Pair]

    def medians(self) -> dict[str, MedianSpeed]:
        """Return {run: median speeds}, with "" for the unpruned model."""
        if not self.pairs:
            return {}
        unpruned = [pair.unpruned for pair in self.pairs]
        every = Measurement(
            prefill=tuple(value for one in unpruned for value in one.prefill),
            decode=tuple(value for one in unpruned for value in one.decode),
            first_token=tuple(value for one in unpruned for value in one.first_token),
            peak_bytes=unpruned[0].peak_bytes,
        )
        return {
            "": medians(every),
            **{name: medians(of.pruned, of.unpruned) for of in self.pairs for name in of.models},
        }


class Bench(Artefact, frozen=True, kw_only=True, tag=1):
    """File `bench.json`: speeds of models, measured in turns in all engines that can load them."""

    HINT: ClassVar[str] = "measure again with `vlmprune bench --json`, or remove the file"
    processor: str
    threads: Count
    load: float
    workload: BenchWorkload
    sides: Annotated[list[BenchSide], Meta(min_length=1, max_length=1000)]

    def decode_rates(self) -> dict[int, float]:
        """Return {number of parameters: decoding speed in tokens/s}, in the first engine and weight type."""
        first, rates = self.sides[0], dict[int, list[float]]()
        for side in self.sides:
            if (side.backend, side.weights) == (first.backend, first.weights):
                rates.setdefault(side.parameters, []).extend(side.decode)
        return {size: statistics.median(rates[size]) for size in sorted(rates)}


def make_bench(load: float, sides: Sequence[BenchSide], config: SpeedConfig, *, dtype: str, threads: int) -> Bench:
    """Convert benchmark measurements to the content of `bench.json`."""
    given = {name: getattr(config, name) for name in ("rounds", "prompt_tokens", "new_tokens", "image")}
    workload = BenchWorkload(**given, dtype=dtype)
    return Bench(processor=cpu(), threads=threads, load=load, workload=workload, sides=list(sides))
