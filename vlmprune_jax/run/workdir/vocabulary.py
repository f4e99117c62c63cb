"""`vocabulary.json`: effect of vocabulary trimming on held-out texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from msgspec import Meta

from vlmprune_jax.base.files import Count, Finite
from vlmprune_jax.run.workdir.artefact import Artefact, Part, find_artefact

VOCABULARY = "vocabulary.json"


class TextSample(Part, frozen=True, kw_only=True):
    """Comparison of the original and the trimmed tokenizer on held-out texts of one writing system, or of "all".

    `equal`: number of texts that both tokenizers split alike. `kept`: number of texts whose original tokens all remain.
    `broken`: number of `kept` texts that are split differently all the same. Bits per byte are the unpruned model's
    with either vocabulary, on the first `measured_bytes` bytes.
    """

    name: str
    texts: Count
    equal: Count
    kept: Count
    broken: Count
    bytes: Count
    tokens_before: Count
    tokens_after: Count
    measured_bytes: Count = 0
    bits_before: Finite | None = None
    bits_after: Finite | None = None

    @property
    def growth(self) -> float:
        """Additional tokens after trimming the vocabulary, as a share of the tokens before."""
        return self.tokens_after / max(self.tokens_before, 1) - 1


class VocabularyReport(Artefact, frozen=True, kw_only=True, tag=1):
    """Report on a trimmed vocabulary: sizes before and after, and token counts of held-out texts.

    `parameters`: number of parameters in the removed rows.
    """

    HINT: ClassVar[str] = "run `vlmprune prune` again"
    rows_before: Count
    rows: Count
    parameters: Count
    samples: Annotated[list[TextSample], Meta(max_length=100)]


def vocabulary_size(folder: Path) -> int | None:
    """Return the number of tokens that the plan in a folder keeps; None for the whole vocabulary."""
    report = find_artefact(folder / VOCABULARY, VocabularyReport)
    return None if report is None else report.rows
