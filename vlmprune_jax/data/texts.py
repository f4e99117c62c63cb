"""Texts of records, text files and JSON lists, by which a vocabulary is chosen and measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import read_text
from vlmprune_jax.data.datasets import PREFIX as DATASETS
from vlmprune_jax.data.inputs import read_set
from vlmprune_jax.data.prompts import render
from vlmprune_jax.data.records import IMAGE_TOKEN, data_files, read_entries
from vlmprune_jax.data.tfds import PREFIX as TFDS
from vlmprune_jax.families.templates import Template

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_PART = 2000  # characters of a text file per text, cut at the end of a line


class Texts(NamedTuple):
    """Texts, and token ids that were listed instead."""

    texts: list[str]
    ids: list[int]


def read_texts(source: str, template: Template) -> Texts:
    """Return the texts in a file.

    Args:
      source: records as `data.train` takes them (rendered with the template; images are not opened), a JSON list of
        texts or of token ids, or else a text file, in parts of a few paragraphs.
      template: the model's prompt template.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    if source.startswith((TFDS, DATASETS)):
        records = read_set(source, None, "prune.vocabulary.sources", True, "skip")
        return Texts([text for record in records for text in _rendered(record.turns, template)], [])
    path = Path(source)
    if path.suffix not in (".json", ".jsonl"):
        return Texts(list(_parts(read_text(path, missing="no such file: prune.vocabulary names it"))), [])
    texts: list[str] = []
    ids: list[int] = []
    first, *listed = data_files(path, None)
    for file in listed or [first]:
        for entry in read_entries(file, "stop"):
            if isinstance(entry, str):
                texts.append(entry)
            elif isinstance(entry, int) and not isinstance(entry, bool):
                ids.append(entry)
            else:
                texts += _texts_of(entry, template, file)
    return Texts(texts, ids)


def _parts(text: str) -> Iterator[str]:
    part = ""
    for line in text.replace("\r\n", "\n").splitlines(keepends=True):
        part += line
        if len(part) >= _PART:
            yield part
            part = ""
    if part:
        yield part


def _texts_of(entry: Any, template: Template, where: Path) -> Iterator[str]:
    """Yield the rendered conversation of a record, and the texts in its lists (answers, choices, labels)."""
    if not isinstance(entry, dict):
        raise UserError(
            f"{where}: holds a {type(entry).__name__}, expected records, or a list of texts or of token ids"
        )
    turns = entry.get("conversations")
    if isinstance(turns, list):
        pairs = [(turn.get("from"), turn.get("value")) for turn in turns if isinstance(turn, dict)]
        yield from _rendered([(_SPEAKERS.get(str(of), "human"), str(text)) for of, text in pairs], template)
    for name, value in entry.items():
        if name not in ("conversations", "images", "image") and isinstance(value, list):
            yield from (text for text in value if isinstance(text, str))


def _rendered(turns: Any, template: Template) -> Iterator[str]:
    has_image = any(IMAGE_TOKEN in text for _, text in turns)
    yield from (piece for piece in render(turns, template, has_image=has_image).split(IMAGE_TOKEN) if piece)
