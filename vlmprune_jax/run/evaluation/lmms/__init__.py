"""Benchmarks of lmms-eval: tasks, our model as a backend, and scores."""
