"""Self-contained pages: one layout, style and script for every template; nothing on them comes from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vlmprune_jax.base.errors import printable
from vlmprune_jax.base.files import replacing


@dataclass(frozen=True)
class Table:
    """Table of strings; the first column holds row names, and each other column has one unit.

    `first`: number of columns that narrow screens show at first (0 = all; wide screens show 14). `ascending`: names of
    columns in which small values are best, so that the first click sorts them in ascending order.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    first: int = 0
    ascending: tuple[str, ...] = ()

    @property
    def printed(self) -> tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]:
        """Keyword arguments that print the table with `Reporter.table`."""
        return self.title, self.header, self.rows


@dataclass(frozen=True)
class Figure:
    """SVG figure with alternative text and caption."""

    svg: Markup
    alt: str
    caption: str


@dataclass(frozen=True)
class Section:
    """Section of a report page: heading, text, figures, tables, name-value lists and samples.

    `missing`: what does not exist yet; `command`: the command that makes it. `folded`: True if the page shows the
    section only on request.
    """

    title: str
    notes: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    facts: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    samples: tuple[Any, ...] = ()
    missing: str = ""
    command: str = ""
    folded: bool = True


def write_page(path: Path, title: str, sections: Sequence[Section], **values: Any) -> Path:
    """Write report sections as an HTML page and return its path.

    `values` are escaped unless they are `Markup`: `lead` (sentences), `numbers` (pairs of name and value), `missing`
    (pairs of what is missing and a command), `best` (the row that tables mark), `origin`, `result_json`. The page's
    content policy forbids browsers to load anything and to run scripts other than the page's own.
    """
    loader = jinja2.PackageLoader("vlmprune_jax.run.report", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["printable"] = printable
    environment.filters["pieces"] = re.compile(r"[^-_/]*[-_/]+|[^-_/]+").findall
    script = loader.get_source(environment, "page.js")[0]
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'; base-uri 'none'; "
        "form-action 'none'"
    )
    values |= {"title": title, "sections": sections, "script": Markup(script), "policy": policy}
    text = environment.get_template("page.html").render(values)
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))
    return path
