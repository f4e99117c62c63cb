"""What a run needs on a TPU slice, compiled ahead of time: memory, time, the search for what fits."""
