"""Prune plans: the units that each layer keeps, and the file plan.json; no jax."""
