"""Hugging Face folders: configs, weights on the mesh or in their files, and their layout in `params`."""
