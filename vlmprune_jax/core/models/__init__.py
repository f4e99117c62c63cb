"""Models in JAX: Flax NNX modules, and pure functions of parameters and config."""
