"""What a prune plan keeps of each layer, and its file plan.json; no jax."""
