"""Hugging Face folders: read onto the mesh, write atomically, check what was written."""
