"""LLaVA-format data files (a JSON list, or JSON Lines) as validated records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import open_file, read_text
from vlmprune_jax.io.data.forms import IMAGE_TOKEN, SPEAKERS, VIDEO_TOKEN, from_messages, from_question
from vlmprune_jax.io.data.media import (
    Images,
    MediaRoot,
    Part,
    StoredImage,
    Video,
    find_video,
    media_names,
    shown,
    video_part,
)

_SPEAKERS = ("human", "gpt")
TFDS, DATASETS = "tfds:", "datasets:"  # prefixes of folders in data.train and data.eval
# All other fields are `Record.fields`.
_OWN_FIELDS = ("id", "image", "images", "conversations", "messages", "answers", "video", "videos")
MAX_REPEATS = 1000  # maximum repeat_time of a data set, since its records are copied


@dataclass(frozen=True)
class VideoSource:
    """Video among the images of a record, or a part of one."""

    source: Video
    part: Part = None

    def __str__(self) -> str:
        return ", ".join(map(str, self.source)) if isinstance(self.source, tuple) else str(self.source)


Visual = Path | StoredImage | VideoSource


@dataclass(frozen=True)
class Record:
    """One conversation: (role, text) turns alternating between "human" and "gpt", and its images and videos in order.

    `problem`: why the entry could not be read; the record then has no turns. `answers`: right answers of an evaluation
    record. `fields`: all other JSON fields of the entry (choices, category, question_id, ...), which metrics may read;
    they are not part of the record's identity. `part`: see `VideoSource`.
    """

    id: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[Path | StoredImage, ...]
    problem: str | None = None
    answers: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)
    videos: tuple[Video, ...] = ()
    part: Part = None

    @property
    def visuals(self) -> tuple[Visual, ...]:
        """Images and videos in the order of their placeholders in the text."""
        if not self.videos:
            return self.images
        images, videos = iter(self.images), iter(self.videos)
        marks = re.findall(f"{IMAGE_TOKEN}|{VIDEO_TOKEN}", "".join(text for _, text in self.turns))
        ordered = [
            VideoSource(next(videos), self.part) if mark == VIDEO_TOKEN else next(images, None) for mark in marks
        ]
        return tuple(visual for visual in ordered if visual is not None)

    @property
    def references(self) -> tuple[str, ...]:
        """Reference answers to the last question: the field `answers`, or else the last "gpt" turn."""
        if self.answers:
            return self.answers
        return tuple(text for speaker, text in self.turns[-1:] if speaker == "gpt")


class Source(NamedTuple):
    """Records of a setting: their files or folder, a text that changes whenever the data change, and the reader."""

    files: Sequence[Path | str]
    state: str
    read: Callable[..., list[Record]]  # with `image_lead` and `on_error`


def read_records(
    path: Path, image_root: Path | None, *, image_lead: bool = False, on_error: str = "stop"
) -> list[Record]:
    """Return the records of a `.json` list, a `.jsonl` file, or all sets in InternVL's `.json` object (as "set/id").

    Entries are `{id, image? | images?, conversations: [{from, value}], answers?}`, or have one of the forms in
    data/forms.py. `image` is a path or a list of paths below `image_root`. `video` has the same form; an inner list is
    one video as a list of frames. `start` and `end` are the seconds between which a video is used. A missing id becomes
    the entry's index. A first turn of gpt is dropped (reference: `preprocess_v1`). `answers` lists the right answers of
    a question, as texts (TextVQA, DocVQA) or as VQA's `{"answer": text}`. With `image_lead`, the text may omit the
    `<image>` placeholder of a record's only image; the template then adds the placeholder at the front (as in InternVL
    data files).

    Raises UserError with file and record for malformed entries: turns that do not alternate, `<image>` placeholders
    that do not match the images, an image that is missing or outside the root. With `on_error` "skip" such an entry
    becomes a record with only a `problem`, so that the other records keep their positions.
    """
    path = Path(path)
    records: list[Record] = []
    for name, (annotation, folder, repeat) in _sets(path, image_root).items():
        root, entries = MediaRoot(folder), read_entries(annotation, on_error)
        none = f"{annotation}: contains no records: check that it is a list of conversations"
        read = records_of(entries, annotation, root, image_lead, on_error, none=none)
        if name is not None:
            read = [replace(record, id=f"{name}/{record.id}") for record in read]
        records += read[: int(len(read) * repeat)] if repeat < 1 else read * int(repeat)
    if not records:
        raise UserError(f"{path}: the data sets in this file have no records: add data sets, or raise repeat_time")
    return records


def make_records(entries: Sequence[Any], image_root: Path | None, *, image_lead: bool = False) -> list[Record]:
    """Return the records of parsed entries; raise UserError if there are none, or one is malformed."""
    root, none = MediaRoot(image_root), "no records were passed: pass at least one"
    return records_of(entries, PurePath("records"), root, image_lead, "stop", none=none)


def records_of(
    entries: Iterable[Any], path: PurePath, root: Images, image_lead: bool, on_error: str, *, none: str
) -> list[Record]:
    """Return the records of a data set's entries (see `read_records`); raise UserError, saying `none`, if it has none.

    With `on_error` "skip", the message about a malformed entry becomes its record's `problem`.
    """
    records = list[Record]()
    for index, entry in enumerate(entries):
        try:
            records.append(make_record(entry, index, path, root, image_lead))
        except UserError as error:
            if on_error == "stop":
                raise
            name = entry.get("id", index) if isinstance(entry, dict) else index
            records.append(Record(str(name) if is_name(name) else str(index), (), (), str(error)))
    if not records:
        raise UserError(none)
    return records


def data_files(path: Path, image_root: Path | None) -> list[Path]:
    """Return the files that `read_records` reads: `path`, and the annotation files listed in InternVL's object."""
    return [*dict.fromkeys([path, *(annotation for annotation, *_ in _sets(path, image_root).values())])]


def _sets(path: Path, image_root: Path | None) -> dict[str | None, tuple[Path, Path | None, float]]:
    """Return {name: (annotation file, image folder, repeat_time)} of InternVL's list of data sets, or None for a file.

    `repeat_time` below 1 keeps the first int(n * repeat_time) records, a whole number repeats all (reference: InternVL
    `LazySupervisedDataset`). Sets cannot be nested.
    """
    alone: dict[str | None, tuple[Path, Path | None, float]] = {None: (path, image_root, 1)}
    try:
        with open_file(path) as file:
            if path.suffix != ".json" or file.read(4096).decode("utf-8-sig", "replace").lstrip()[:1] != "{":
                return alone
    except (UserError, OSError):
        return alone  # reported when the file is read
    base, sets = Path(image_root or ""), dict[str | None, tuple[Path, Path | None, float]]()
    for name, entry in next(read_entries(path, "stop", kind=dict)).items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("annotation", "root")):
            raise UserError(
                f"{path}: {name!r} is not a data set, expected an object with 'root' and 'annotation' (InternVL), or a "
                "file with a list of conversations"
            )
        if has_lone_surrogate(name):
            raise UserError(f"{path}: the name of set {name!r} contains a lone surrogate: rename it")
        repeat = entry.get("repeat_time", 1)
        fits = isinstance(repeat, int | float) and (0 < repeat < 1 or repeat in range(1, MAX_REPEATS + 1))
        if isinstance(repeat, bool) or not fits:
            raise UserError(
                f"{path}, set {name}: repeat_time {shown(repeat)} must be an integer up to {MAX_REPEATS}, or "
                "a number between 0 and 1"
            )
        if entry.get("data_augment") or entry.get("max_dynamic_patch") is not None:
            raise UserError(
                f"{path}, set {name}: data_augment and max_dynamic_patch are not supported per set: remove them and "
                "set data.max_tiles for all"
            )
        sets[name] = (base / entry["annotation"], base / entry["root"], repeat)
    return sets


def take_fraction(records: Sequence[Record], fraction: float, seed: int) -> list[Record]:
    """Return int(fraction * n) random records, at least one, in file order and without duplicates.

    The subset depends only on the number n of records, `fraction` and `seed` (a separate numpy PCG64 generator), so
    that all processes of a run agree; the reference draws an unseeded subset per rank.
    """
    count = max(1, int(len(records) * fraction))
    chosen = np.random.Generator(np.random.PCG64(seed)).permutation(len(records))[:count]
    return [records[index] for index in sorted(chosen.tolist())]


def read_entries(path: Path, on_error: str, kind: type = list) -> Iterator[Any]:
    """Yield the JSON entries of a data file; with `on_error` "skip", a malformed line yields its error instead."""
    text = read_text(path, missing="no such file: check the data path")
    text = text.removeprefix("\ufeff")  # byte order mark of some editors
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n")):
            if line.strip():
                try:
                    yield _parse(line, path, number, "one JSON object per line")
                except UserError as error:
                    if on_error == "stop":
                        raise
                    yield error
        return
    entries = _parse(text, path, 0, "one JSON list (JSON Lines need the suffix .jsonl)")
    if not isinstance(entries, kind):
        raise UserError(f"{path}: contains a JSON {type(entries).__name__}, expected a list of conversations")
    yield from entries if isinstance(entries, list) else [entries]


def _parse(text: str, path: Path, lines_before: int, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = lines_before + getattr(error, "lineno", 1)
        reason = getattr(error, "msg", str(error))
        raise UserError(f"{path}, line {line}: not valid JSON ({reason}), expected {expected}") from error


def make_record(entry: Any, index: int, path: PurePath, root: Images, image_lead: bool) -> Record:
    """Return the record of one parsed entry of the data file `path`; raise UserError for a malformed entry."""
    if isinstance(entry, UserError):
        raise entry
    if not isinstance(entry, dict):
        raise UserError(f"{path}, record {index}: is a {type(entry).__name__}, expected an object with 'conversations'")
    name = entry.get("id", index)
    if not is_name(name):
        raise UserError(f"{path}, record {index}: id {shown(name)} must be a non-empty string or a number")
    location = f"{path}, record {name}"
    if "conversations" not in entry and "messages" in entry:
        entry = from_messages(entry, location)
    elif "conversations" not in entry and isinstance(entry.get("question"), str):
        names = media_names(entry, "image", location)
        entry = from_question(entry, names, len(media_names(entry, "video", location)))
    turns, names = _make_turns(entry.get("conversations"), location), media_names(entry, "image", location)
    videos = tuple(find_video(video, root, location) for video in media_names(entry, "video", location))
    if videos and not names and not any(VIDEO_TOKEN in text for _, text in turns):
        # LLaVA-Video's records write <image> for a video
        turns = tuple((speaker, text.replace(IMAGE_TOKEN, VIDEO_TOKEN)) for speaker, text in turns)
    images = tuple(root.find(image, location) for image in names)
    for token, media, what in ((VIDEO_TOKEN, videos, "video"), (IMAGE_TOKEN, images, "image")):
        marks = sum(text.count(token) for _, text in turns)
        added = image_lead and what == "image" and (marks, len(media)) == (0, 1)  # by the template
        if marks != len(media) and not added:
            raise UserError(
                f"{location}: text has {marks} {token} placeholder(s) for {len(media)} {what}(s): write one "
                f"placeholder per {what}"
            )
    answers = _answers(entry.get("answers"), location)
    fields = {name: value for name, value in entry.items() if name not in _OWN_FIELDS}
    return Record(str(name), turns, images, None, answers, fields, videos, video_part(entry, videos, location))


def is_name(name: Any) -> bool:
    """Return True if a JSON value can name a record or a group: a whole number, or a valid text that is not empty."""
    valid = isinstance(name, str | int) and not isinstance(name, bool) and name != ""
    return valid and not has_lone_surrogate(str(name))


def _answers(value: Any, location: str) -> tuple[str, ...]:
    if value is None:
        return ()
    listed = value if isinstance(value, list) else []
    answers = tuple(
        answer["answer"] if isinstance(answer, dict) and "answer" in answer else answer for answer in listed
    )
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{location}: 'answers' must be a non-empty list of strings, got {shown(value)}")
    if any(map(has_lone_surrogate, answers)):
        raise UserError(f"{location}: 'answers' contains a lone surrogate (\\ud800 to \\udfff): remove it")
    return answers


def _make_turns(conversation: Any, location: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(conversation, list) or not conversation:
        raise UserError(
            f"{location}: 'conversations' must be a non-empty list of {{from, value}} turns (or use 'messages' of "
            "{role, content}, or 'question' and 'answer')"
        )
    turns: list[tuple[str, str]] = []
    for turn in conversation:
        name, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        speaker = SPEAKERS.get(name) if isinstance(name, str) else None
        if speaker not in _SPEAKERS or not isinstance(text, str):
            raise UserError(f"{location}: turn {len(turns)} must have 'from' human or gpt and a string 'value'")
        if has_lone_surrogate(text):
            raise UserError(f"{location}: turn {len(turns)} contains a lone surrogate (\\ud800 to \\udfff): remove it")
        turns.append((speaker, text))
    if turns[0][0] == "gpt":
        turns = turns[1:]
    if not turns or any(speaker != _SPEAKERS[place % 2] for place, (speaker, _) in enumerate(turns)):
        raise UserError(f"{location}: turns must alternate human, gpt, human, ...: merge or drop the odd one")
    return tuple(turns)


def has_lone_surrogate(text: str) -> bool:
    """Return True if text contains half of a surrogate pair (a broken emoji), which is invalid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
