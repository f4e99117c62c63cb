"""Foundations without jax: errors, checked options and files, model configurations, budgets, chips."""
