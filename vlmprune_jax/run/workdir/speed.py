"""`speed.json` (pruned shapes beside the unpruned model) and `bench.json` (`vlmprune bench --json`): measured speed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
from msgspec import Meta

from vlmprune_jax.base.files import Count, Finite, Positive
from vlmprune_jax.run.workdir.artefact import Artefact, Part

SPEED, BENCH = "speed.json", "bench.json"
STEADY = 0.05  # spread of repeated measurements that a quiet machine does not exceed
_MOST_SPREAD = 0.2  # maximum spread of a measurable speed-up, as a share of its distance from 1
_DRAWS = 1000
_Rounds = Annotated[tuple[Annotated[float, Meta(gt=0, lt=1e30)], ...], Meta(min_length=1, max_length=1000)]


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """Speed of one model, with one value per repetition of the measurement (`rounds`).

    `prefill`: prompt tokens per second, image tokens included. `decode`: new tokens per second of all rows together,
    without the prefill. `first_token`: seconds from the prompts to the first token of every row. `peak_bytes`: memory
    of the compiled program on one device (weights and cache included), or of an engine's process; None if unknown.
    """

    prefill: _Rounds
    decode: _Rounds
    first_token: _Rounds
    peak_bytes: Count | None

    def __post_init__(self) -> None:
        if len({len(self.prefill), len(self.decode), len(self.first_token)}) > 1:
            raise ValueError("prefill, decode and first_token have different numbers of rounds")


class BenchSide(Measurement, frozen=True, kw_only=True):
    """Measured speed of one model in one engine, with data type and size (`bytes`) of the weights on disk."""

    model: str
    backend: str
    versions: dict[str, str]
    weights: str
    bytes: Count
    parameters: Count
    image: bool
    prompt_tokens: Count


class SpeedUp(msgspec.Struct, frozen=True, array_like=True):
    """Speed of a model as a multiple of the unpruned model's.

    `ratio` is the ratio of the two models' median speeds over repeated measurements in turns. `low` to `high` is a 95 %
    interval by a paired bootstrap over the repetitions; with less than 6 repetitions, it is about their range. `spread`
    is the relative range of the repetitions, of the model with the larger range (None if unknown). `limit` is the
    largest ratio that the FLOPs of a prompt or the bytes of a decoded token allow (None if unknown).
    """

    ratio: Finite
    low: Finite
    high: Finite
    spread: Finite | None = None
    limit: Finite | None = None

    @property
    def measurable(self) -> bool:
        """True if the spread is at most 20 % of the effect, and FLOPs or bytes allow the ratio."""
        return self._steady and (self.limit is None or self.low <= self.limit)

    @property
    def _steady(self) -> bool:
        return self.spread is not None and self.spread <= _MOST_SPREAD * abs(self.ratio - 1)

    def show(self, *, interval: bool = True) -> str:
        """Return the ratio as text, such as "1.50 (1.48 to 1.53)", or "not measurable"."""
        if not self.measurable:
            return "not measurable"
        return f"{self.ratio:.2f}" + (f" ({self.low:.2f} to {self.high:.2f})" if interval else "")

    def __str__(self) -> str:
        """Return the ratio with its interval as text, or why the ratio is not measurable."""
        if self.measurable:
            return self.show()
        if self.spread is None:
            return f"{self.show()} (the spread of repeats is unknown)"
        busy = " on this busy machine" if self.spread > STEADY else ""
        limit = f"; FLOPs or bytes allow {self.limit:.2f}" if self._steady else ""
        return f"{self.show()}{busy} (repeats differ by {100 * self.spread:.3g} %{limit})"


def speedup(before: Sequence[float], after: Sequence[float], limit: float | None = None) -> SpeedUp:
    """Return the `SpeedUp` of a pruned model from its speeds and the unpruned model's, one per repetition."""
    rounds = np.array(list(zip(before, after, strict=False)))
    draws = np.random.Generator(np.random.PCG64(0)).integers(len(rounds), size=(_DRAWS, len(rounds)))
    ours, theirs = np.median(rounds[draws], axis=1).T[::-1]
    low, high = np.quantile(ours / theirs, [0.025, 0.975])
    ratio = statistics.median(after) / statistics.median(before)
    spread = max((max(speeds) - min(speeds)) / statistics.median(speeds) for speeds in (before, after))
    return SpeedUp(ratio, float(low), float(high), spread if len(rounds) > 1 else None, limit)


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


def medians(*measured: Measurement, **speedups: SpeedUp) -> MedianSpeed:
    """Return the medians of a model's speeds over all repeated measurements, with its speed-ups if it is pruned."""
    speeds: dict[str, Any] = {"peak_bytes": measured[0].peak_bytes, **speedups}
    for name in ("prefill", "decode", "first_token"):
        speeds[name] = statistics.median([value for one in measured for value in getattr(one, name)])
    return MedianSpeed(**speeds)


class Pair(Part, frozen=True, kw_only=True):
    """Speed of one pruned layer shape, measured in turns with the unpruned model, and upper bounds on its speed-ups."""

    models: Annotated[list[str], Meta(min_length=1)]
    unpruned: Measurement
    pruned: Measurement
    prefill_limit: Finite | None = None
    decode_limit: Finite | None = None

    @property
    def medians(self) -> MedianSpeed:
        """Median speeds of the pruned model, with its speed-ups over the unpruned model."""
        before, after = self.unpruned, self.pruned
        return medians(
            after,
            prefill_speedup=speedup(before.prefill, after.prefill, self.prefill_limit),
            decode_speedup=speedup(before.decode, after.decode, self.decode_limit),
        )


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
