"""Evaluation of models: metrics of answers or of text, retained percentages, statistics and speed."""
