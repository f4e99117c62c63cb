"""A finished workdir as one self-contained HTML page."""

import contextlib
from pathlib import Path

with contextlib.chdir(Path(__file__).parent):  # matplotlib reads the `matplotlibrc` of the current folder
    import matplotlib as matplotlib
