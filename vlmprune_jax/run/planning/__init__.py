"""Planning of recovery on a TPU slice by ahead-of-time compilation: memory, time, and a search for what fits."""
