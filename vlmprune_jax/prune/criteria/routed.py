"""Sums over the tokens that a router sends to each expert, of which all criteria for experts are functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.models.context import BlockValues
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune.criteria.activations import Blocks, Tokens
from vlmprune_jax.prune.criteria.criterion import Criterion, Parts

Sums = Mapping[str, np.ndarray]  # of one layer: "tokens", "g", "f", "ff" and "gf" -> float64[experts]


def routed_sums(blocks: Blocks, tokens: Tokens) -> list[dict[str, jax.Array]]:
    """Return weighted sums per layer and expert, float32[experts], over the tokens that the expert computes.

    "tokens": number; "g": gates as used; "f", "ff": norm and squared norm of the output before the gate; "gf": gate
    times norm.
    """

    def hook(block: BlockValues) -> dict[str, jax.Array]:
        experts, gates, norms = block.inputs["routed"]
        weight = jnp.broadcast_to(tokens.weight[..., None], experts.shape)
        g, f = (jnp.where(weight > 0, x.astype(jnp.float32), 0) for x in (gates, norms))  # padding may hold anything
        values = {"tokens": jnp.ones_like(f), "g": g, "f": f, "ff": f * f, "gf": g * f}
        zeros = jnp.zeros(len(block.params["mlp"]["router"]["weight"]), jnp.float32)
        return {name: zeros.at[experts].add(weight * value) for name, value in values.items()}

    return blocks(hook, inputs=("routed",))


def expert_criterion(score_of: Callable[[Sums], np.ndarray]) -> Criterion:
    """Return a criterion whose scores of a layer's experts are a function of their sums.

    An expert that fewer than `fewest_tokens` tokens reach gets the largest score of its layer: what it does is not
    known, so it is not removed.
    """

    def finish(sums: Sequence[Sums], model: Model, *, fewest_tokens: float) -> Parts:
        del model
        units = {}
        for i, layer in enumerate(sums):
            seen = layer["tokens"] >= max(fewest_tokens, 1e-9)
            scores = np.asarray(score_of({name: np.where(seen, x, 1) for name, x in layer.items()}), np.float64)
            units[i, "experts"] = np.where(seen, scores, scores[seen].max() if seen.any() else 0.0)
        return {"units": units}

    return Criterion(
        scores=("experts",),
        needs="activations",
        function=routed_sums,
        finish=finish,
        options={"fewest_tokens": 1.0},
        splits=True,
    )
