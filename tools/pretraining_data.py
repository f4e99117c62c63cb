"""easy-VQA for pretraining a small teacher: conversations, balanced questions, and captions made from questions."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import easy_vqa
import numpy as np

from vlmprune_jax.base.files import replacing
from vlmprune_jax.run.demo.easyvqa import JsonRecord, Questions, single_turn_records, to_record, write_dataset

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
CAPTION_PROMPT = "<image>\nDescribe the image."
SEED = 0  # part of the data set's identity; another seed gives other files


def write_pretraining_data(out_dir: Path) -> dict[str, Path]:
    """Write easy-VQA and further training files into `out_dir`; return {name: path of the file}.

    Names, beside those of `write_dataset`: `train_multi_turn` (one record per image), `train_balanced` (one question
    per record, none answered by its wording) and `train_captions`.
    """
    paths, train = write_dataset(out_dir), easy_vqa.get_train_questions()
    files = {
        "train_multi_turn": multi_turn_records(train, "train", SEED),
        "train_balanced": single_turn_records(balanced(train, SEED), "train"),
        "train_captions": caption_records(train, "train"),
    }
    for name, records in files.items():
        paths[name] = out_dir / f"{name}.json"
        with replacing(paths[name]) as file:
            file.write((json.dumps(records, indent=0) + "\n").encode())
    return paths


def multi_turn_records(questions: Questions, split: str, seed: int) -> list[JsonRecord]:
    """Return one record per image with all its questions as turns, shuffled by `seed` and image."""
    by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in zip(*questions, strict=True):
        by_image[image].append((question, answer))
    records = []
    for image in sorted(by_image):
        order = np.random.default_rng([seed, image]).permutation(len(by_image[image]))
        turns = [by_image[image][int(place)] for place in order]
        turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        records.append(to_record(f"{split}-image-{image:05d}", split, image, turns))
    return records


def balanced(questions: Questions, seed: int) -> Questions:
    """Return questions without negation, with as many "yes" as "no" answers.

    In easy-VQA, five in six questions "is there a red shape?" are answered with no, and with negation with yes, so that
    a model may learn the wording and ignore the image (as in VQA: Goyal et al. 2017, arXiv 1612.00837). With negations
    included, neither wording nor image alone predicts the answer, and training does not start to improve. Questions are
    dropped at random by `seed`; the order is kept.
    """
    places: dict[str, list[int]] = {"yes": [], "no": []}
    negated = [place for place, question in enumerate(questions[0]) if _is_negated(question)]
    for place in sorted({*range(len(questions[0]))} - {*negated}):
        if questions[1][place] in places:
            places[questions[1][place]].append(place)
    few, many = sorted(places.values(), key=len)
    dropped = {*negated, *np.random.default_rng(seed).permutation(many)[len(few) :].tolist()}
    rows = [row for place, row in enumerate(zip(*questions, strict=True)) if place not in dropped]
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _is_negated(question: str) -> bool:
    return not {"not", "no"}.isdisjoint(re.findall(r"[a-z]+", question))


def caption_records(questions: Questions, split: str) -> list[JsonRecord]:
    """Return a caption record ("red circle") per image whose colour and shape its questions determine."""
    return [
        to_record(f"{split}-caption-{image:05d}", split, image, [(CAPTION_PROMPT, f"{color} {shape}")])
        for image, (color, shape) in sorted(image_facts(questions).items())
        if color is not None and shape is not None
    ]


def image_facts(questions: Questions) -> dict[int, tuple[str | None, str | None]]:
    """Return (colour, shape) of each image, as far as its questions and answers determine them (else None).

    The answer to a yes/no question selects or excludes a word; an open question and its answer name facts directly
    ("what color is the circle?" -> red: a red circle). The last remaining candidate is the fact.
    """
    candidates: dict[int, tuple[set[str], set[str]]] = defaultdict(lambda: (set(COLORS), set(SHAPES)))
    for question, answer, image in zip(*questions, strict=True):
        words, negated = re.findall(r"[a-z]+", question), _is_negated(question)
        for group in candidates[image]:
            if answer in ("yes", "no"):
                named = group.intersection(words)
                present = (answer == "yes") != negated
                if present and named:
                    group.intersection_update(named)
                elif not present:
                    group.difference_update(words)
            else:
                named = group.intersection([*words, answer])
                if named:
                    group.intersection_update(named)
    return {image: (_only(colors), _only(shapes)) for image, (colors, shapes) in candidates.items()}


def _only(candidates: set[str]) -> str | None:
    return next(iter(candidates)) if len(candidates) == 1 else None
