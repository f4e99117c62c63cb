"""Self-contained pages: one layout, style and script for every template; nothing on them comes from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vlmprune_jax.core.files import replacing


@dataclass(frozen=True)
class Table:
    """A table of text whose first column names the rows. Pages sort columns, so a column has one unit."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """An `<svg>` with its text alternative and its caption."""

    svg: Markup
    alt: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading: sentences, figures, tables, (title, (name, value) pairs), samples of a set.

    `missing` says what is not there yet, and `command` makes it.
    """

    title: str
    notes: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    facts: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    samples: tuple[Any, ...] = ()
    missing: str = ""
    command: str = ""


def write_page(template: str, path: Path, **values: Any) -> Path:
    """Fill a template that extends `page.html`, write the page and return its path.

    `values` are escaped unless they are `Markup`; `title` is one of them. The page's content policy forbids browsers to
    fetch anything and to run any script but ours.
    """
    loader = jinja2.PackageLoader("vlmprune_jax.report", ".")
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = loader.get_source(made, "page.js")[0]
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'; base-uri 'none'; "
        "form-action 'none'"
    )
    text = made.get_template(template).render(script=Markup(script), policy=policy, **values)
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))
    return path
