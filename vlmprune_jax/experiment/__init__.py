"""What an experiment is: settings, recipes, overrides, variants."""
