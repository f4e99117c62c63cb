"""The outside world into the types of `core` and back: families, checkpoints, exports, data."""
