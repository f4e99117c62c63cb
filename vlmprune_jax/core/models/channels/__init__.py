"""Modules of channel mixers: dense MLP and experts."""
