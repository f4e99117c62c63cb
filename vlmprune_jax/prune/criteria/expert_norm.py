"""Expert activation norm (EAN, compared in arXiv 2510.13999): the sum of the norms of an expert's outputs."""

from __future__ import annotations

from vlmprune_jax.prune.criteria.routed import expert_criterion

EXPERT_NORM = expert_criterion(lambda sums: sums["f"])
