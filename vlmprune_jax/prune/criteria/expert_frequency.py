"""Frequency of experts: the number of tokens that a router sends to an expert."""

from __future__ import annotations

from vlmprune_jax.prune.criteria.routed import expert_criterion

EXPERT_FREQUENCY = expert_criterion(lambda sums: sums["tokens"])
