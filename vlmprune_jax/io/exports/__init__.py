"""Export formats: writing a model, checking the result, and its model card."""
