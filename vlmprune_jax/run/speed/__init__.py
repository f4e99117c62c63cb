"""Measurement of the speed and memory of text generation, in JAX and in other engines."""
