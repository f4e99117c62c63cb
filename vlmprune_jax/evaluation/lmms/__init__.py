"""Benchmarks by lmms-eval: its tasks, our model in it, its scores."""
