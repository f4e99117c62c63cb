"""Recovery training of pruned models: settings, losses, trainable parameters, step, checkpoints and loop."""
