"""`eval/samples.json`: example questions with small images and every model's answer, for the report.

The questions are chosen during the evaluation, so that the report does not need the evaluation data.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from msgspec import Meta

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Count
from vlmprune_jax.io.data.media import opened_image, to_rgb
from vlmprune_jax.io.data.records import IMAGE_TOKEN, Record
from vlmprune_jax.run.workdir.artefact import Artefact, Part
from vlmprune_jax.run.workdir.evaluation import UNPRUNED
from vlmprune_jax.run.workdir.result import Run

SAMPLES = "eval/samples.json"
# Category of samples -> number shown. "repaired": the unpruned model is right, a pruned model is wrong, and a model
# recovered from it is right. "broken": the same, but no recovered model is right. Right: a score of at least 0.5.
KINDS = {"repaired": 6, "broken": 3, "other": 3}
SIDE = 224  # pixels of an image's longer side
_CRISP = 96  # pixels per side up to which images are stored without loss
MOST_IMAGES, MOST_IMAGE_BYTES = 4, 4 << 20  # maximum images per sample, and image bytes per set
MOST_ANSWERS = 24  # maximum answers per sample
LONGEST = 600  # maximum characters of a question or an answer
_URI = r"^data:image/(jpeg|png);base64,[A-Za-z0-9+/]+={0,2}$"
_Pixels = Annotated[int, Meta(ge=1, le=SIDE)]


class Picture(Part, frozen=True, kw_only=True):
    """Image of a sample question (data URI and size), or why it is missing."""

    uri: Annotated[str, Meta(pattern=_URI)] | None = None
    width: _Pixels = 1
    height: _Pixels = 1
    problem: str | None = None


class SampleAnswer(Part, frozen=True, kw_only=True):
    """One model's answer to a sample question, with its score."""

    model: str
    said: str
    score: float | None


class Sample(Part, frozen=True, kw_only=True):
    """Sample question with all models' answers, unpruned model first."""

    kind: Literal["repaired", "broken", "other"]
    id: str
    question: str
    references: list[str]
    images: Annotated[list[Picture], Meta(max_length=MOST_IMAGES)] = []
    answers: list[SampleAnswer]


class SampleSet(Part, frozen=True, kw_only=True):
    """Sample questions of an evaluation set, with the number of questions per category."""

    questions: Count
    counts: dict[str, Count]
    samples: Annotated[list[Sample], Meta(max_length=sum(KINDS.values()))]


class Samples(Artefact, frozen=True, kw_only=True, tag=1):
    """File of sample questions and answers that the report shows."""

    HINT: ClassVar[str] = "run `vlmprune evaluate` again"
    MAX_BYTES: ClassVar[int] = 2**26
    sets: dict[str, SampleSet]


def make_samples(
    records: Sequence[Record],
    runs: Sequence[Run],
    predictions: Mapping[str, Sequence[str]],
    scores: Mapping[str, Sequence[float | None]],
    *,
    max_pixels: int,
) -> SampleSet:
    """Choose the sample questions of an evaluation set.

    Args:
      records: questions of the set.
      runs: all models except the unpruned one.
      predictions: {model: answer to every question}, for "unpruned" and the runs that were evaluated on this set.
      scores: {model: score of every question}, for the same models.
      max_pixels: maximum number of pixels of an image that is shown.
    """
    right = {name: np.array([(score or 0) >= 0.5 for score in values], bool) for name, values in scores.items()}
    kinds, ranks = _kinds(right, runs)
    counts = {kind: int(np.count_nonzero(kinds == kind)) for kind in KINDS}
    order = [place for kind, most in KINDS.items() for place in _spread(records, kinds == kind, ranks, most)]
    models, room, samples = list(predictions)[:MOST_ANSWERS], MOST_IMAGE_BYTES, []
    for place in order:
        record = records[place]
        images = [_image(image, record.id, room, max_pixels) for image in record.images[:MOST_IMAGES]]
        room -= sum(len(image.uri or "") for image in images)
        answers = [
            SampleAnswer(model=name, said=predictions[name][place][:LONGEST], score=scores[name][place])
            for name in models
        ]
        samples.append(
            Sample(
                kind=kinds[place].item(),
                id=record.id,
                question=_question(record),
                references=[text[:LONGEST] for text in record.references[:MOST_IMAGES]],
                images=images,
                answers=answers,
            )
        )
    return SampleSet(questions=len(records), counts=counts, samples=samples)


def _kinds(right: Mapping[str, np.ndarray], runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Return each question's category, such as "broken by pruning", and for how many plans it applies."""
    unpruned = right[UNPRUNED]
    repaired, broken = (np.zeros(len(unpruned), int) for _ in range(2))
    for plan in dict.fromkeys(run.plan for run in runs):
        mine = [run for run in runs if run.plan == plan and run.name in right]
        pruned = [right[run.name] for run in mine if run.recovery == "none"]
        recovered = [right[run.name] for run in mine if run.recovery != "none"]
        for correct in pruned:
            lost = unpruned & ~correct
            again = np.any(recovered, axis=0) if recovered else np.zeros_like(lost)
            repaired += lost & again
            broken += lost & ~again
    # Of the other questions, those first on which models differ.
    differ = sum((correct != unpruned for correct in right.values()), np.zeros(len(unpruned), int))
    kinds = np.where(repaired > 0, "repaired", np.where(broken > 0, "broken", "other"))
    return kinds, np.where(repaired > 0, repaired, np.where(broken > 0, broken, differ))


def _spread(records: Sequence[Record], chosen: np.ndarray, ranks: np.ndarray, most: int) -> list[int]:
    """Choose up to `most` sample questions with images and answers that were shown least, the best ranked first."""
    left, picks = set(np.flatnonzero(chosen).tolist()), list[int]()
    images, answers = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()

    def order(place: int) -> tuple[int, int, int, int]:
        record = records[place]
        return images[_images(record)], answers[record.references[:1]], -int(ranks[place]), place

    while left and len(picks) < most:
        picks.append(place := min(left, key=order))
        left.remove(place)
        images[_images(records[place])] += 1
        answers[records[place].references[:1]] += 1
    return picks


def _images(record: Record) -> tuple[str, ...]:
    return tuple(map(str, record.images)) or (record.id,)


def _question(record: Record) -> str:
    """Return a record's last question, and the number of questions before it."""
    asked = [text for speaker, text in record.turns if speaker == "human"]
    text = asked[-1].replace(IMAGE_TOKEN, "").strip() if asked else ""
    before = f" (after {len(asked) - 1} earlier questions)" if len(asked) > 1 else ""
    return text[:LONGEST] + before


def _image(image: Any, record: str, room: int, max_pixels: int) -> Picture:
    if room <= 0:
        return Picture(problem="left out: the page has enough images")
    try:
        with opened_image(image, record, max_pixels) as opened:
            opened.draft("RGB", (SIDE, SIDE))  # decodes a JPEG at reduced size
            small = to_rgb(opened)
            small.thumbnail((SIDE, SIDE))
    except UserError as error:
        return Picture(problem=str(error))
    kind, quality = ("png", {}) if max(small.size) <= _CRISP else ("jpeg", {"quality": 80})
    encoded = io.BytesIO()
    small.save(encoded, kind, **quality)
    uri = f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"
    return Picture(uri=uri, width=small.width, height=small.height)
