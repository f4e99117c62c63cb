"""`eval/samples.json`: questions worth looking at, their images made small, and what every model said.

Written where the evaluation data is at hand, so that the report needs it no more. Version 1:

    sets   {set: {questions, counts, samples}}: how many questions there are, how many of each kind, and those shown,
           each with kind, id, question, references, images ({uri, width, height}, or {problem}) and answers
           ({model, said, score}, the unpruned model's first)

The kinds, in this order: "repaired" (the unpruned model is right, some pruned one is not, and one recovered from that
one is again), "broken" (some pruned one is not right, and none recovered from it either), "other". Right is a score of
at least a half.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import numpy as np
from msgspec import Meta

from vlmprune_jax.core.errors import UserError, printable
from vlmprune_jax.core.files import Count, read_json
from vlmprune_jax.data.images import thumbnail
from vlmprune_jax.data.records import IMAGE_TOKEN, Record
from vlmprune_jax.report.answers import UNPRUNED

Json = dict[str, Any]
SAMPLES = "eval/samples.json"
VERSION = 1
KINDS = {"repaired": 6, "broken": 3, "other": 3}  # and how many are shown of each
SIDE = 224  # pixels of an image's longer side
MOST_IMAGES, MOST_IMAGE_BYTES = 4, 4 << 20  # of a sample, of a set
MOST_ANSWERS = 24  # of a sample
LONGEST = 600  # letters of a question or an answer
MAX_BYTES = 2**26
_TODO = "evaluate again"
_URI = r"^data:image/(jpeg|png);base64,[A-Za-z0-9+/]+={0,2}$"
_Pixels = Annotated[int, Meta(ge=1, le=SIDE)]


class _Image(TypedDict):
    """A picture (uri, width, height), or why there is none."""

    uri: NotRequired[Annotated[str, Meta(pattern=_URI)]]
    width: NotRequired[_Pixels]
    height: NotRequired[_Pixels]
    problem: NotRequired[str]


class _Answer(TypedDict):
    model: str
    said: str
    score: float | None


class _Sample(TypedDict):
    kind: Literal["repaired", "broken", "other"]
    id: str
    question: str
    references: list[str]
    images: Annotated[list[_Image], Meta(max_length=MOST_IMAGES)]
    answers: list[_Answer]


class _Set(TypedDict):
    questions: Count
    counts: dict[str, Count]
    samples: Annotated[list[_Sample], Meta(max_length=sum(KINDS.values()))]


class _File(TypedDict):
    version: Literal[1]
    sets: dict[str, _Set]


def read_samples(workdir: Path) -> dict[str, Json]:
    """Set -> its samples; of no set where none were chosen.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / SAMPLES
    if not path.is_file():
        return {}
    found: dict[str, Json] = read_json(path, _File, todo=_TODO, most=MAX_BYTES, unicode=False)["sets"]
    return found


def make_samples(
    records: Sequence[Record],
    runs: Sequence[Mapping[str, Any]],
    said: Mapping[str, Sequence[str]],
    scores: Mapping[str, Sequence[float | None]],
    *,
    max_pixels: int,
) -> Json:
    """The samples of one set.

    Args:
      records: its questions.
      runs: name, plan and recovery of every model but the unpruned one.
      said, scores: {model: of every question}, of "unpruned" and of those runs that were asked.
      max_pixels: larger images are not shown.
    """
    right = {name: np.array([(score or 0) >= 0.5 for score in of], bool) for name, of in scores.items()}
    kinds, ranks = _kinds(right, runs)
    counts = {kind: int(np.count_nonzero(kinds == kind)) for kind in KINDS}
    order = [place for kind, most in KINDS.items() for place in _spread(records, kinds == kind, ranks, most)]
    models, room, samples = list(said)[:MOST_ANSWERS], MOST_IMAGE_BYTES, []
    for place in order:
        record = records[place]
        images = [_image(image, record.id, room, max_pixels) for image in record.images[:MOST_IMAGES]]
        room -= sum(len(image.get("uri", "")) for image in images)
        answers = [{"model": n, "said": said[n][place][:LONGEST], "score": scores[n][place]} for n in models]
        samples.append(
            {
                "kind": str(kinds[place]),
                "id": record.id,
                "question": _question(record),
                "references": [text[:LONGEST] for text in record.references[:MOST_IMAGES]],
                "images": images,
                "answers": answers,
            }
        )
    return {"questions": len(records), "counts": counts, "samples": samples}


def as_json(sets: Mapping[str, Json]) -> str:
    """The text of the file."""
    return json.dumps({"version": VERSION, "sets": sets}, indent=1) + "\n"


def _kinds(right: Mapping[str, np.ndarray], runs: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Of every question its kind, and in how many ways of pruning it is of that kind."""
    unpruned = right[UNPRUNED]
    repaired, broken = (np.zeros(len(unpruned), int) for _ in range(2))
    for plan in dict.fromkeys(run["plan"] for run in runs):
        mine = [run for run in runs if run["plan"] == plan and run["name"] in right]
        pruned = [right[run["name"]] for run in mine if run["recovery"] == "none"]
        recovered = [right[run["name"]] for run in mine if run["recovery"] != "none"]
        for one in pruned:
            lost = unpruned & ~one
            again = np.any(recovered, axis=0) if recovered else np.zeros_like(lost)
            repaired += lost & again
            broken += lost & ~again
    # Of the others those first on which models differ.
    differ = sum((one != unpruned for one in right.values()), np.zeros(len(unpruned), int))
    kinds = np.where(repaired > 0, "repaired", np.where(broken > 0, "broken", "other"))
    return kinds, np.where(repaired > 0, repaired, np.where(broken > 0, broken, differ))


def _spread(records: Sequence[Record], chosen: np.ndarray, ranks: np.ndarray, most: int) -> list[int]:
    """At most so many of the chosen, highest ranks first, equal ones over as many answers and images as there are."""
    places = sorted(np.flatnonzero(chosen).tolist(), key=lambda place: (-int(ranks[place]), place))
    found: list[int] = []
    seen: set[tuple[str, ...]] = set()
    images: set[tuple[str, ...]] = set()
    while places and len(found) < most:
        fresh = (p for p in places if records[p].references[:1] not in seen and _images(records[p]) not in images)
        place = next(fresh, None)
        if place is None and seen:  # every answer has had its turn
            seen = set()
            place = next((p for p in places if _images(records[p]) not in images), None)
        place = places[0] if place is None else place
        places.remove(place)
        found.append(place)
        seen.add(records[place].references[:1])
        images.add(_images(records[place]))
    return found


def _images(record: Record) -> tuple[str, ...]:
    return tuple(map(str, record.images)) or (record.id,)


def _question(record: Record) -> str:
    """The last question, and how many turns went before."""
    asked = [text for speaker, text in record.turns if speaker == "human"]
    text = asked[-1].replace(IMAGE_TOKEN, "").strip() if asked else ""
    before = f" (after {len(asked) - 1} earlier questions)" if len(asked) > 1 else ""
    return text[:LONGEST] + before


def _image(image: Any, record: str, room: int, max_pixels: int) -> Json:
    if room <= 0:
        return {"problem": "left out: the page has enough images"}
    try:
        content, kind, (width, height) = thumbnail(image, record, side=SIDE, max_pixels=max_pixels)
    except UserError as error:
        return {"problem": str(error)}
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"uri": uri, "width": width, "height": height}


def shown_samples(found: Json) -> Iterator[tuple[str, list[Json]]]:
    """(heading, samples) of every kind that a set has, as the page shows them."""
    headings = {
        "repaired": "Broken by pruning, repaired by recovery",
        "broken": "Broken by pruning, and still wrong",
        "other": "Other questions",
    }
    for kind, heading in headings.items():
        mine = [sample for sample in found["samples"] if sample["kind"] == kind]
        if mine:
            yield f"{heading} ({found['counts'].get(kind, 0):,} of {found['questions']:,})", list(map(_shown, mine))


def _shown(sample: Json) -> Json:
    """A sample with nothing in its texts that a page cannot show."""
    answers = [
        {
            "model": printable(answer["model"]),
            "said": printable(answer["said"]) or "(nothing)",
            "verdict": "" if answer["score"] is None else "right" if answer["score"] >= 0.5 else "wrong",
        }
        for answer in sample["answers"]
    ]
    asked = "\n".join(map(printable, sample["question"].splitlines()))
    expected = " / ".join(map(printable, sample["references"]))
    return {**sample, "id": printable(sample["id"]), "question": asked, "expected": expected, "answers": answers}
