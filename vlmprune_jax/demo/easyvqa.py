"""The easy-VQA data set (PyPI `easy-vqa`, MIT) as LLaVA records: one coloured shape per 64x64 image, 13 answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import copy_file, read_json

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
CAPTION_PROMPT = "<image>\nDescribe the image."
QUESTION_COUNTS = {"train": 38_575, "test": 9_673}
IMAGE_COUNTS = {"train": 4_000, "test": 1_000}
_FILES = ("train", "test", "train_multi_turn", "train_balanced", "train_captions")
_MANIFEST = "manifest.json"
_SEED = 0  # part of the data set's identity; another seed gives other files


class _Manifest(TypedDict):
    """Fields of a folder's `manifest.json`, used to check that the data set is complete."""

    bytes: dict[str, int]


Questions = tuple[list[str], list[str], list[int]]
JsonRecord = dict[str, Any]


def write_dataset(out_dir: Path) -> dict[str, Path]:
    """Write easy-VQA as LLaVA JSON files and images into `out_dir`; return {name: path of the file}.

    Names: `train`, `test` (one question per record), `train_multi_turn` (one record per image), `train_balanced` (one
    question per record, none answered by its wording) and `train_captions`, both for pretraining, and `images`, the
    image root of all files. The folder is written atomically; a complete one is kept. Raises UserError if `out_dir` has
    other content.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        if not _is_complete(out_dir):
            raise UserError(f"{out_dir}: exists but is not a complete easy-VQA folder: remove it or use another path")
        return _paths(out_dir)
    package = _load_package()
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        _build(building, package)
        building.chmod(0o755)  # mkdtemp makes private folders
        os.replace(building, out_dir)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        if _is_complete(out_dir):  # another process was faster
            return _paths(out_dir)
        raise
    return _paths(out_dir)


def single_turn_records(questions: Questions, split: str) -> list[JsonRecord]:
    """Return one LLaVA record per question, with ids `{split}-000123`, in the package's order."""
    return [
        _record(f"{split}-{number:06d}", split, image, [(f"<image>\n{question}", answer)])
        for number, (question, answer, image) in enumerate(zip(*questions, strict=True))
    ]


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
        records.append(_record(f"{split}-image-{image:05d}", split, image, turns))
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
        _record(f"{split}-caption-{image:05d}", split, image, [(CAPTION_PROMPT, f"{color} {shape}")])
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


def _record(name: str, split: str, image: int, turns: list[tuple[str, str]]) -> JsonRecord:
    conversations = []
    for question, answer in turns:
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": f"{split}/{image}.png", "conversations": conversations}


def _load_package() -> dict[str, tuple[Questions, Mapping[int, str]]]:
    try:
        import easy_vqa
    except ImportError as error:
        raise UserError("easy-VQA: the data set is not installed: pip install 'vlmprune-jax[demo]'") from error
    readers: dict[str, tuple[Callable[[], Questions], Callable[[], Mapping[int, str]]]] = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }
    loaded = {}
    for split, (read_questions, read_paths) in readers.items():
        questions, paths = read_questions(), read_paths()
        counts = (len(questions[0]), len(paths))
        expected = (QUESTION_COUNTS[split], IMAGE_COUNTS[split])
        if counts != expected:
            raise UserError(
                f"easy-VQA {split}: found {counts} questions and images, expected {expected}: install easy-vqa 1.0"
            )
        loaded[split] = (questions, paths)
    return loaded


def _build(folder: Path, package: dict[str, tuple[Questions, Mapping[int, str]]]) -> None:
    train = package["train"][0]
    files = {
        "train": single_turn_records(train, "train"),
        "test": single_turn_records(package["test"][0], "test"),
        "train_multi_turn": multi_turn_records(train, "train", _SEED),
        "train_balanced": single_turn_records(balanced(train, _SEED), "train"),
        "train_captions": caption_records(train, "train"),
    }
    for split, (_, paths) in package.items():
        target = folder / "images" / split
        target.mkdir(parents=True)
        for image, source in paths.items():
            copy_file(Path(source), target / f"{image}.png", Path(source).parent)
    sizes = {}
    for name, records in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(records, indent=0) + "\n", encoding="utf-8")
        sizes[path.name] = path.stat().st_size
    manifest = {"source": "PyPI easy-vqa 1.0 (MIT)", "images": IMAGE_COUNTS, "bytes": sizes}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _is_complete(folder: Path) -> bool:
    try:
        sizes = read_json(folder / _MANIFEST, _Manifest)["bytes"]
        return (
            {f"{name}.json" for name in _FILES} == set(sizes)  # otherwise of another version
            and all((folder / name).stat().st_size == size for name, size in sizes.items())
            and all(len(os.listdir(folder / "images" / split)) == count for split, count in IMAGE_COUNTS.items())
        )
    except (UserError, OSError, ValueError):
        return False


def _paths(folder: Path) -> dict[str, Path]:
    return {**{name: folder / f"{name}.json" for name in _FILES}, "images": folder / "images"}
