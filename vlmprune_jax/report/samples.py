"""Example questions with every model's answer, as the page shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vlmprune_jax.core.errors import printable
from vlmprune_jax.workdir.samples import Picture, Sample, SampleSet

HEADINGS = {
    "repaired": "Broken by pruning, repaired by recovery",
    "broken": "Broken by pruning, and still wrong",
    "other": "Other questions",
}


@dataclass(frozen=True)
class ShownAnswer:
    """A row of a sample's table; `verdict`: "right", "wrong" or ""."""

    model: str
    said: str
    verdict: str


@dataclass(frozen=True)
class ShownSample:
    """A sample whose texts are all printable."""

    id: str
    question: str
    expected: str
    images: Sequence[Picture]
    answers: Sequence[ShownAnswer]


def shown_samples(samples: SampleSet, labels: Mapping[str, str]) -> Iterator[tuple[str, list[ShownSample]]]:
    """(heading, samples) of every kind that a set has; `labels`: names of models for readers."""
    for kind, heading in HEADINGS.items():
        mine = [sample for sample in samples.samples if sample.kind == kind]
        if mine:
            title = f"{heading} ({samples.counts.get(kind, 0):,} of {samples.questions:,})"
            yield title, [_shown(sample, labels) for sample in mine]


def _shown(sample: Sample, labels: Mapping[str, str]) -> ShownSample:
    answers = [
        ShownAnswer(
            printable(labels.get(answer.model, answer.model)),
            printable(answer.said) or "(nothing)",
            "" if answer.score is None else "right" if answer.score >= 0.5 else "wrong",
        )
        for answer in sample.answers
    ]
    question = "\n".join(map(printable, sample.question.splitlines()))
    expected = " / ".join(map(printable, sample.references))
    return ShownSample(printable(sample.id), question, expected, sample.images, answers)
