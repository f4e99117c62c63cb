"""Speed-ups: ratios of median speeds with intervals, and whether the rounds are steady enough to show them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec
import numpy as np

from vlmprune_jax.base.files import Finite

STEADY = 0.05  # spread of repeated measurements that a quiet machine does not exceed
_MOST_SPREAD = 0.2  # maximum spread of a measurable speed-up, as a share of its distance from 1
_DRAWS = 1000


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


def spread(speeds: Sequence[float]) -> float:
    """Return the relative spread of repeated speed measurements: (largest - smallest) / median."""
    return (max(speeds) - min(speeds)) / statistics.median(speeds)


def speedup(before: Sequence[float], after: Sequence[float], limit: float | None = None) -> SpeedUp:
    """Return the ratio of two models' median speeds, with its interval by a paired bootstrap over repetitions.

    Args:
      before: speeds of the unpruned model, one per repetition.
      after: speeds of the pruned model, measured in the same repetitions.
      limit: see `SpeedUp`.
    """
    rounds = np.array(list(zip(before, after, strict=False)))
    draws = np.random.Generator(np.random.PCG64(0)).integers(len(rounds), size=(_DRAWS, len(rounds)))
    ours, theirs = np.median(rounds[draws], axis=1).T[::-1]
    low, high = np.quantile(ours / theirs, [0.025, 0.975])
    ratio = statistics.median(after) / statistics.median(before)
    differ = max(spread(before), spread(after)) if len(rounds) > 1 else None
    return SpeedUp(ratio, float(low), float(high), differ, limit)
