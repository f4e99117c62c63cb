"""Texts of records, text files and JSON lists, for choosing the tokens of a smaller vocabulary and measuring it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import read_text
from vlmprune_jax.io.data.datasets import PREFIX as DATASETS
from vlmprune_jax.io.data.forms import IMAGE_TOKEN, VIDEO_TOKEN
from vlmprune_jax.io.data.inputs import read_set
from vlmprune_jax.io.data.prompts import render
from vlmprune_jax.io.data.records import Record, data_files, has_lone_surrogate, make_record, read_entries
from vlmprune_jax.io.data.tfds import PREFIX as TFDS
from vlmprune_jax.io.families.templates import Template

_PART = 2000  # characters of a text file per text, cut at the end of a line


class Texts(NamedTuple):
    """Texts whose tokens a trimmed vocabulary keeps, and token ids that a file lists directly."""

    texts: list[str]
    ids: list[int]


def read_texts(source: str, template: Template) -> Texts:
    """Read records in a form for `data.train`, a JSON list of texts or of token ids, or a text file.

    Records are rendered with `template`, and their images are not opened. A text file is split into parts of a few
    paragraphs. Raises UserError if there is no such file, or it has none of these forms.
    """
    if source.startswith((TFDS, DATASETS)):
        records = read_set(source, None, "prune.vocabulary.sources", True, "skip")
        return Texts([text for record in records for text in _texts_of(record, template)], [])
    path = Path(source)
    if path.suffix not in (".json", ".jsonl"):
        return Texts(list(_parts(read_text(path, missing="no such file (set in prune.vocabulary)"))), [])
    texts: list[str] = []
    ids: list[int] = []
    first, *listed = data_files(path, None)
    for file in listed or [first]:
        for number, entry in enumerate(read_entries(file, "stop")):
            if isinstance(entry, str):
                texts.append(entry)
            elif isinstance(entry, int) and not isinstance(entry, bool):
                ids.append(entry)
            else:
                texts += _texts_of(make_record(entry, number, file, _Unopened(), True), template)
    if any(map(has_lone_surrogate, texts)):
        raise UserError(f"{source}: a text contains a lone surrogate (\\ud800 to \\udfff): remove it")
    return Texts(texts, ids)


class _Unopened:
    def find(self, name: str, location: str) -> Path:
        return Path(name)


def _parts(text: str) -> Iterator[str]:
    part = ""
    for line in text.replace("\r\n", "\n").splitlines(keepends=True):
        part += line
        if len(part) >= _PART:
            yield part
            part = ""
    if part:
        yield part


def _texts_of(record: Record, template: Template) -> Iterator[str]:
    prompt = render(record.turns, template, has_image=bool(record.images), has_video=bool(record.videos)).text
    yield from (piece for piece in re.split(f"{IMAGE_TOKEN}|{VIDEO_TOKEN}", prompt) if piece)
    yield from record.answers
    for value in record.fields.values():
        if isinstance(value, list):
            yield from (text for text in value if isinstance(text, str))
