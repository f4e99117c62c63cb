"""The section of a page about trimmed vocabularies."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlmprune_jax.base.errors import printable
from vlmprune_jax.run.report.page import Section, Table
from vlmprune_jax.run.workdir.artefact import read_artefact
from vlmprune_jax.run.workdir.steps import Variant
from vlmprune_jax.run.workdir.vocabulary import VOCABULARY, TextSample, VocabularyReport

_HEADER = ("held-out texts", "texts", "split as before", "tokens, +%", "broken", "bits/byte before", "bits/byte after")
_NOTE = (
    "Broken: texts made of kept tokens that are tokenised differently (0 for a closed vocabulary). Bits per "
    "byte: of the unpruned model with the whole and with the trimmed vocabulary."
)


def vocabulary_size(folder: Path) -> int | None:
    """Return the number of tokens that the plan in a folder keeps; None for the whole vocabulary."""
    path = folder / VOCABULARY
    return read_artefact(path, VocabularyReport).rows if os.path.lexists(path) else None


def vocabulary_section(workdir: Path, variants: Sequence[Variant]) -> Iterator[Section]:
    """Yield a report section on trimmed vocabularies, with one table per variant."""
    tables = []
    for folder in dict.fromkeys((workdir / variant.plan).parent for variant in variants if variant.plan):
        if not os.path.lexists(folder / VOCABULARY):
            continue
        report = read_artefact(folder / VOCABULARY, VocabularyReport)
        name = "" if folder == workdir else f"{printable(folder.name)}: "
        title = f"{name}{report.rows:,} of {report.rows_before:,} tokens, {report.parameters:,} parameters fewer"
        tables.append(Table(title, _HEADER, tuple(map(_row, report.samples))))
    if tables:
        yield Section("Vocabulary", tables=tuple(tables), notes=(_NOTE,))


def _row(sample: TextSample) -> tuple[str, ...]:
    bits = ["" if value is None else f"{value:.3f}" for value in (sample.bits_before, sample.bits_after)]
    counts = (f"{sample.texts:,}", f"{sample.equal:,}", f"{100 * sample.growth:.2f}", f"{sample.broken:,}")
    return (printable(sample.name), *counts, *bits)
