"""The device mesh and where each named axis lives on it."""
