"""`vocabulary.json`: what trimming the vocabulary does to texts that chose no token."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from vlmprune_jax.core.files import Count, Finite
from vlmprune_jax.workdir.artefact import Artefact, Part

VOCABULARY = "vocabulary.json"


class TextSample(Part, frozen=True, kw_only=True):
    """Held-out texts of one writing system, or of all ("all"), tokenised before and after trimming.

    `equal`: number of texts that both tokenizers split alike. `kept`: number of texts made of kept tokens; `broken` of
    these are split differently. Bits per byte are those of the unpruned model with the original and the trimmed
    vocabulary, on the first `measured_bytes`.
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
