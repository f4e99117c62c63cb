"""Text from any source, such as the name of a folder, as part of a Markdown, YAML or CSV file that a command writes."""

from __future__ import annotations

import json
import re

from vlmprune_jax.base.errors import printable

_MARKUP = re.compile(r"[\\`*\[\]<>|&~$!#]|(?<!\w)_|_(?!\w)|(?<=www)\.|(?<=:)//")
_CONSTANTS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def markdown(text: str) -> str:
    """Escape text to one line for a paragraph, heading or table cell of Markdown."""
    return _MARKUP.sub(lambda match: "".join(f"\\{c}" for c in match[0]), printable(text))


def code(text: str) -> str:
    """Return text as a one-line Markdown code span that is also safe in a table cell."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def yaml(text: str) -> str:
    """Return text as a YAML string: unquoted if it is a plain name, else quoted as in JSON."""
    plain = re.fullmatch(r"[A-Za-z][\w.-]*(/[\w.-]+)?", text, re.ASCII) and text.casefold() not in _CONSTANTS
    return text if plain else json.dumps(printable(text))


def cell(value: object) -> object:
    """Return text as a CSV cell; a leading quote disarms text that a spreadsheet would run as a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else "" if value is None else value
