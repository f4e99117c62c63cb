"""Sweeps, many runs of one experiment: list of runs, worker processes and comparison data."""
