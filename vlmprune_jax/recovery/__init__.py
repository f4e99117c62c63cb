"""Training what pruning lost: settings, losses, what trains, the step, checkpoints and the loop."""
