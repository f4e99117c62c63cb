"""`speed.json` (pruned shapes beside the unpruned model) and `bench.json` (`vlmprune bench --json`): measured speed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Annotated, ClassVar

from msgspec import Meta
from msgspec.structs import replace

from vlmprune_jax.base.files import Count, Finite, Positive
from vlmprune_jax.core.mesh.machine import cpu
from vlmprune_jax.run.evaluation.speed.clock import BenchSide, Measurement, SpeedConfig
from vlmprune_jax.run.evaluation.speed.ratio import SpeedUp, speedup
from vlmprune_jax.run.workdir.artefact import Artefact, Part

SPEED, BENCH = "speed.json", "bench.json"


class MedianSpeed(Part, frozen=True, kw_only=True):
    """Medians over repeated measurements: prefill and decoding in tokens/s, first token in seconds, and speed-ups.

    A speed-up is [ratio, low, high, spread, limit], see `SpeedUp`.
    """

    prefill: Finite
    decode: Finite
    first_token: Finite
    peak_bytes: Count | None
    prefill_speedup: SpeedUp | None = None
    decode_speedup: SpeedUp | None = None


def medians(*measured: Measurement) -> MedianSpeed:
    """Return the medians of a model's speeds over all repeated measurements."""
    names = ("prefill", "decode", "first_token")
    speeds = {name: statistics.median([value for one in measured for value in getattr(one, name)]) for name in names}
    return MedianSpeed(**speeds, peak_bytes=measured[0].peak_bytes)


class Pair(Part, frozen=True, kw_only=True):
    """Speed of one pruned layer shape, measured in turns with the unpruned model, and upper bounds on its speed-ups."""

    models: Annotated[list[str], Meta(min_length=1)]
    unpruned: Measurement
    pruned: Measurement
    prefill_limit: Finite | None = None
    decode_limit: Finite | None = None

    @property
    def prefill_speedup(self) -> SpeedUp:
        """Speed-up of prefill (reading the prompt) over the unpruned model."""
        return speedup(self.unpruned.prefill, self.pruned.prefill, self.prefill_limit)

    @property
    def decode_speedup(self) -> SpeedUp:
        """Speed-up of decoding (generating tokens) over the unpruned model."""
        return speedup(self.unpruned.decode, self.pruned.decode, self.decode_limit)

    @property
    def medians(self) -> MedianSpeed:
        """Median speeds of the pruned model, with its speed-ups."""
        speedups = {"prefill_speedup": self.prefill_speedup, "decode_speedup": self.decode_speedup}
        return replace(medians(self.pruned), **speedups)


class SpeedWorkload(Part, frozen=True, kw_only=True):
    """Prompt that all models receive, prompts per batch, and number of repetitions (`rounds`)."""

    rounds: Count
    prompt_tokens: Count
    new_tokens: Count
    batch_size: Positive = 1
    image: bool
    dtype: str


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
        of_pairs = {name: speeds for pair in self.pairs for speeds in [pair.medians] for name in pair.models}
        return {"": medians(*(pair.unpruned for pair in self.pairs)), **of_pairs}


class Bench(Artefact, frozen=True, kw_only=True, tag=1):
    """File `bench.json`: speeds of models, measured in turns in all engines that can load the models."""

    HINT: ClassVar[str] = "measure again with `vlmprune bench --json`, or remove the file"
    processor: str
    threads: Count
    load: float
    workload: SpeedWorkload
    sides: Annotated[list[BenchSide], Meta(min_length=1, max_length=1000)]

    def decode_rates(self) -> dict[int, float]:
        """Return {number of parameters: decoding speed in tokens/s of a row}, in the first engine and weight type."""
        first, rates = self.sides[0], dict[int, list[float]]()
        for side in self.sides:
            if (side.backend, side.weights) == (first.backend, first.weights):
                rates.setdefault(side.parameters, []).extend(side.decode)
        return {size: statistics.median(rates[size]) / self.workload.batch_size for size in sorted(rates)}


def make_bench(load: float, sides: Sequence[BenchSide], config: SpeedConfig, *, dtype: str, threads: int) -> Bench:
    """Convert benchmark measurements to the content of `bench.json`."""
    workload = SpeedWorkload(**vars(config), dtype=dtype)
    return Bench(processor=cpu(), threads=threads, load=load, workload=workload, sides=list(sides))
