"""MAN (arXiv 2606.15716): the mean norm of the output, over the tokens that an expert computes."""

from __future__ import annotations

from vlmprune_jax.prune.criteria.routed import expert_criterion

MAN = expert_criterion(lambda sums: sums["f"] / sums["tokens"])
