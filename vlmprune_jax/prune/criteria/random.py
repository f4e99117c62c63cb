"""The control: scores that know nothing."""

from __future__ import annotations

import numpy as np

from vlmprune_jax.checks import one_of
from vlmprune_jax.config import ModelConfig
from vlmprune_jax.prune.criteria.groups import GQA, Widths


def random_scores(cfg: ModelConfig, *, seed: int, gqa: str) -> tuple[np.ndarray, Widths]:
    """(importance, (heads, mlp)): a draw from U(0, 1) per layer and per channel; a head is the sum of its channels."""
    one_of("gqa", gqa, GQA)
    draw = np.random.default_rng(seed)
    importance = draw.random(len(cfg.text.layers))
    heads = []
    for shape in cfg.text.layers:
        units = shape.kv_heads if gqa == "groups" else shape.q_heads
        heads.append(draw.random((units, cfg.text.head_dim)).sum(axis=1))
    return importance, (tuple(heads), tuple(draw.random(shape.mlp) for shape in cfg.text.layers))
