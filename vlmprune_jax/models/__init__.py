"""Flax NNX modules over `(params, cfg)`."""
