"""Where this checkout lies, and the scripts that tests start as processes of their own."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKERS = Path(__file__).parent
