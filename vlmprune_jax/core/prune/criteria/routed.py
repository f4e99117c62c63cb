"""Criteria for experts: functions of the sums over the tokens that routers send to each expert (`prune.routing`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.part import Key
from vlmprune_jax.core.prune.calibration import TOKEN_TYPES
from vlmprune_jax.core.prune.criteria.criterion import Criterion, Values, declared
from vlmprune_jax.core.prune.routing import SUMS, Routing

Sums = Mapping[str, np.ndarray]  # of one layer, {name in `routing.SUMS`: float64[experts]}
FEW_TOKENS = ("protect", "refuse")


def expert_criterion(score_of: Callable[[Sums], np.ndarray]) -> Criterion:
    """Return a criterion that computes a layer's expert scores by `score_of` from the experts' sums over tokens."""

    def scores_of(sums: np.ndarray) -> np.ndarray:
        """Return the scores of the experts that compute a token, and 0 for the others."""
        seen = sums[0] > 0
        values = score_of({name: np.where(seen, row, 1.0) for name, row in zip(SUMS, sums, strict=True)})
        return np.where(seen, np.asarray(values, np.float64), 0.0)

    def function(
        routing: Routing,
        *,
        token_types: str,
        fewest_tokens: float,
        few_tokens: str,
        **options: Any,
    ) -> tuple[Values, Mapping[str, Values]]:
        one_of("few_tokens", few_tokens, FEW_TOKENS)
        names = routing.occurring
        weights = {name: options["image_weight" if name == "video" else f"{name}_weight"] for name in names}
        units, of_types = dict[Key, np.ndarray](), dict[str, dict[Key, np.ndarray]]()
        for layer, sums in routing.sums.items():
            rows = {name: sums[TOKEN_TYPES[name] - 1] for name in names}
            pooled = sum(weights[name] * row for name, row in rows.items())
            by_type = {name: scores_of(row) for name, row in rows.items()}
            each = np.stack([weights[name] * (x / (x.sum() or 1.0)) for name, x in by_type.items()])
            scores = scores_of(pooled) if token_types == "pooled" else _COMBINATIONS[token_types](each)
            few = np.flatnonzero(pooled[0] < max(fewest_tokens, 1e-9))
            if few_tokens == "refuse" and len(few):
                raise UserError(
                    f"layer {layer}: experts {', '.join(map(str, few))} compute fewer than {fewest_tokens:g} "
                    'calibration tokens: raise score.samples, or keep these experts with few_tokens="protect"'
                )
            key = Key("text", layer, "experts")
            units[key] = _protected(scores, pooled[0], fewest_tokens)
            for name, row in rows.items() if len(names) > 1 else ():
                of_types.setdefault(name, {})[key] = _protected(by_type[name], row[0], fewest_tokens)
        return units, of_types

    options = {"fewest_tokens": 1.0, "few_tokens": "protect", **declared("token_types")}
    return Criterion(scores=("experts",), needs="routing", function=function, options=options, splits=True)


def _protected(scores: np.ndarray, tokens: np.ndarray, fewest: float) -> np.ndarray:
    """Raise the scores of experts with fewer than `fewest` tokens to the layer's maximum, so that they are kept."""
    return np.where(tokens >= max(fewest, 1e-9), scores, scores.max())


def _in_turns(scores: np.ndarray) -> np.ndarray:
    """Return scores that order experts by their best rank in any token type, and equal ranks by the summed scores.

    The n highest-scoring experts include the n // t best experts of each of the t types.
    """
    count, total = scores.shape[1], scores.sum(axis=0)
    places = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1, kind="stable")
    best: np.ndarray = np.where(scores > 0, places, count).min(axis=0)
    return count - best + total / (1 + total)


# Scores of one layer, float64[token types, experts], each normalised and weighted -> float64[experts].
_COMBINATIONS: dict[str, Callable[[np.ndarray], Any]] = {
    "sum": lambda scores: scores.sum(axis=0),
    "max": lambda scores: scores.max(axis=0),
    "floor": _in_turns,
}

EXPERT_FREQUENCY = expert_criterion(lambda sums: sums["tokens"])
EXPERT_NORM = expert_criterion(lambda sums: sums["f"])  # EAN, compared in arXiv 2510.13999
# Means over the tokens that an expert computes: of gate times norm of the output, of the norm, of the squared norm.
REAP = expert_criterion(lambda sums: sums["gf"] / sums["tokens"])  # arXiv 2510.13999
MAN = expert_criterion(lambda sums: sums["f"] / sums["tokens"])  # arXiv 2606.15716
MSAN = expert_criterion(lambda sums: sums["ff"] / sums["tokens"])  # arXiv 2606.15716
