"""Experiments, folders, results and commands."""
