"""The complete files that docs/how-to/extend.md prints, as the tests run them."""

from __future__ import annotations

import re
from pathlib import Path

from repository import ROOT

PAGE = ROOT / "docs" / "how-to" / "extend.md"


def printed_file(heading: str, folder: Path) -> Path:
    """Write the first Python block below a heading of docs/how-to/extend.md into `folder` and return its path.

    Its first line is a comment with the file name, `# my_criterion.py`.
    """
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    found = re.search(r"```python\n# (\w+\.py)\n(.*?)```", section, re.DOTALL)
    assert found, f"{PAGE}: no complete file below {heading!r}"
    name, source = found.groups()
    assert source.count("\n") + 1 <= 40, f"{heading}: more than 40 lines"
    path = folder / name
    path.write_text(f"# {name}\n{source}", encoding="utf-8")
    return path
