"""Data: records, prompts, images and fixed-shape batches."""
