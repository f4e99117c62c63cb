"""Many runs of an experiment: their list, workers, and comparison data."""
