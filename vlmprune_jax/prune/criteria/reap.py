"""REAP (arXiv 2510.13999): the mean of gate times norm of the output, over the tokens that an expert computes."""

from __future__ import annotations

from vlmprune_jax.prune.criteria.routed import expert_criterion

REAP = expert_criterion(lambda sums: sums["gf"] / sums["tokens"])
