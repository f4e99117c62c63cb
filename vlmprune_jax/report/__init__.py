"""A finished workdir as one self-contained HTML page."""
