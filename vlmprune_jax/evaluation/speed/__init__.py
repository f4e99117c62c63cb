"""The one place that measures speed."""
