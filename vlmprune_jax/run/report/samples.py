"""Example questions with every model's answer, as the page shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vlmprune_jax.base.errors import printable
from vlmprune_jax.run.workdir.samples import Sample, SampleSet

MOST_MODELS = 3  # maximum models named for an answer; further ones are counted
HEADINGS = {
    "repaired": "Broken by pruning, repaired by recovery",
    "broken": "Broken by pruning, and still wrong",
    "other": "Other questions",
}


@dataclass(frozen=True)
class ShownAnswer:
    """One distinct answer to a sample question, and the models that gave it."""

    text: str
    verdict: str
    models: str


def shown_samples(
    samples: SampleSet, labels: Mapping[str, str]
) -> Iterator[tuple[str, list[tuple[Sample, list[ShownAnswer]]]]]:
    """Yield (heading, sample questions with their answers) for each category of samples in an evaluation set."""
    for kind, heading in HEADINGS.items():
        mine = [sample for sample in samples.samples if sample.kind == kind]
        if mine:
            title = f"{heading} ({samples.counts.get(kind, 0):,} of {samples.questions:,})"
            yield title, [(sample, _answers(sample, labels)) for sample in mine]


def _answers(sample: Sample, labels: Mapping[str, str]) -> list[ShownAnswer]:
    """Return the distinct answers to a sample question, with text made safe to print."""
    models = dict[tuple[str, str], list[str]]()
    for answer in sample.answers:
        if answer.model in labels:
            verdict = "" if answer.score is None else "right" if answer.score >= 0.5 else "wrong"
            models.setdefault((printable(answer.said) or "(nothing)", verdict), []).append(labels[answer.model])
    most = max(models.values(), key=len, default=[])
    if len(models) > 1 and len(most) > MOST_MODELS:
        most[:] = [f"the other {len(most)} models"]
    return [ShownAnswer(text, verdict, "; ".join(mine)) for (text, verdict), mine in models.items()]
