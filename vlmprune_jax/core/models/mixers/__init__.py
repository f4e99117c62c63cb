"""Modules of mixers: attention, delta net and short convolution."""
