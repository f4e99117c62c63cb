"""The easy-VQA data set (PyPI `easy-vqa`, MIT) as LLaVA records: one coloured shape per 64x64 image, 13 answers."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import copy_file, read_json

QUESTION_COUNTS = {"train": 38_575, "test": 9_673}
IMAGE_COUNTS = {"train": 4_000, "test": 1_000}
_FILES = ("train", "test")
_MANIFEST = "manifest.json"


class _Manifest(TypedDict):
    """Fields of the data set's `manifest.json`, used to check that the folder is complete."""

    bytes: dict[str, int]


Questions = tuple[list[str], list[str], list[int]]
JsonRecord = dict[str, Any]


def write_dataset(out_dir: Path) -> dict[str, Path]:
    """Write the easy-VQA data set as LLaVA JSON files and images to `out_dir`; return {name: file path}.

    The names are `train`, `test` (one question per record), and `images` (the image root of both). The folder is
    written atomically; a complete folder is kept. Raises UserError if `out_dir` has other content.
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
    """Return one LLaVA record per easy-VQA question, with ids `{split}-000123`, in the package's order."""
    return [
        to_record(f"{split}-{number:06d}", split, image, [(f"<image>\n{question}", answer)])
        for number, (question, answer, image) in enumerate(zip(*questions, strict=True))
    ]


def to_record(name: str, split: str, image: int, turns: list[tuple[str, str]]) -> JsonRecord:
    """Return a LLaVA record of one image and its (question, answer) turns."""
    conversations = []
    for question, answer in turns:
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": f"{split}/{image}.png", "conversations": conversations}


def _load_package() -> dict[str, tuple[Questions, Mapping[int, str]]]:
    try:
        import easy_vqa
    except ImportError as error:
        raise UserError("easy-VQA: the data set is not installed: pip install 'vlmprune-jax[demo]'") from error
    loaded = {}
    for split in QUESTION_COUNTS:
        questions, paths = (getattr(easy_vqa, f"get_{split}_{what}")() for what in ("questions", "image_paths"))
        counts = (len(questions[0]), len(paths))
        expected = (QUESTION_COUNTS[split], IMAGE_COUNTS[split])
        if counts != expected:
            raise UserError(
                f"easy-VQA {split}: found {counts} questions and images, expected {expected}: install easy-vqa 1.0"
            )
        loaded[split] = (questions, paths)
    return loaded


def _build(folder: Path, package: dict[str, tuple[Questions, Mapping[int, str]]]) -> None:
    files = {split: single_turn_records(questions, split) for split, (questions, _) in package.items()}
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
            {f"{name}.json" for name in _FILES} <= set(sizes)  # otherwise of another version
            and all((folder / name).stat().st_size == size for name, size in sizes.items())
            and all(len(os.listdir(folder / "images" / split)) == count for split, count in IMAGE_COUNTS.items())
        )
    except (UserError, OSError, ValueError):
        return False


def _paths(folder: Path) -> dict[str, Path]:
    return {**{name: folder / f"{name}.json" for name in _FILES}, "images": folder / "images"}
