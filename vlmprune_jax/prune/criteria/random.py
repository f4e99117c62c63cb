"""Random scores, as a control."""

from __future__ import annotations

import numpy as np

from vlmprune_jax.core.checks import one_of
from vlmprune_jax.core.config import STACKS, ModelConfig
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune.criteria.criterion import Criterion, Parts, declared
from vlmprune_jax.prune.criteria.groups import GQA


def random(model: Model, *, seed: int, gqa: str, stack: str) -> Parts:
    """Return `random_scores` of a model."""
    return random_scores(model.cfg, seed=seed, gqa=gqa, stack=stack)


def random_scores(cfg: ModelConfig, *, seed: int, gqa: str, stack: str = "text") -> Parts:
    """Return importance, heads and mlp, drawn from U(0, 1) per layer and channel; a head is the sum of its channels."""
    one_of("gqa", gqa, GQA)
    draw = np.random.default_rng(seed)
    layers = cfg.stack(stack).layers
    importance = draw.random(len(layers))
    heads = []
    for shape in layers:
        units = shape.kv_heads if gqa == "groups" else shape.q_heads
        heads.append(draw.random((units, cfg.stack(stack).head_dim)).sum(axis=1))
    mlp = tuple(draw.random(shape.mlp) for shape in layers)
    return {"importance": importance, "heads": tuple(heads), "mlp": mlp}


RANDOM = Criterion(
    scores=("layers", "widths"),
    needs="weights",
    function=random,
    options=declared("seed", "gqa"),
    stacks=STACKS,
)
