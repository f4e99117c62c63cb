"""Measurement of speed, memory and energy of text generation, in JAX and in other engines."""
