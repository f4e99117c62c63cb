"""What everything else stands on: errors, checked options and files, configurations, budgets; no jax."""
