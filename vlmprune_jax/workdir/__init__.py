"""What a workdir holds and who made it: the contract between stages, sweeps and reports."""
