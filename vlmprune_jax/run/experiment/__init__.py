"""Experiments: the sections of a config, their recipes and variants."""
