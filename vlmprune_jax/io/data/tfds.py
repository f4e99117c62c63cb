"""Records as a tensorflow-datasets data set in ArrayRecord files, written and read without TensorFlow.

A folder has two data sets that `tfds.builder_from_directory` can open: `records` (id, turns, image numbers, other
fields of the entry) and `images` (encoded bytes, once per image even if records share it). Records are read at once, an
image's bytes when it is decoded. Network disks prefer few large files to many small ones.

The folder's metadata is compared with what `write_tfds` writes and never decides what code runs: tfds would import the
classes named in features.json, so examples are read directly from the files that our own specification describes.

The folder may be in a bucket, gs://BUCKET/DIR: records are copied to this machine while they are read, images are read
in place (array_record reads Google Cloud Storage itself; the small metadata files need gcsfs).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from etils import epath
from msgspec import Meta

from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.base.files import (
    MAX_COPY_BYTES,
    MAX_JSON_BYTES,
    checked,
    open_file,
    parse_json,
    read_bytes,
    read_text,
    reading,
)
from vlmprune_jax.io.data.media import StoredImage
from vlmprune_jax.io.data.records import TFDS, Record, Source, records_of

BUCKET = "gs://"
RECORDS, IMAGES, SPLIT, VERSION = "records", "images", "train", "1.0.0"
FILE_FORMAT = "array_record"
_INFO, _FEATURES = "dataset_info.json", "features.json"
_TODO = "write it again with `vlmprune tfds`"
_MAX_EXAMPLE = 2**28  # maximum bytes of an example; no image file is larger


class _Split(TypedDict):
    name: str
    shardLengths: list[Annotated[str, Meta(pattern=r"^[0-9]{1,12}$")]]


class _Info(TypedDict):
    fileFormat: str
    splits: list[_Split]


def tfds_source(text: str) -> Source:
    """Return the data set in the folder, or the folder of a cloud bucket, that `tfds:FOLDER` names.

    Raises UserError for other types of addresses.
    """
    name = text.removeprefix(TFDS)
    in_bucket = name.startswith(BUCKET)
    if not in_bucket and (not name or "://" in name):
        raise UserError(f"{text}: is not a folder: use {TFDS}DIR, or {TFDS}{BUCKET}BUCKET/DIR for a bucket")
    folder = epath.Path(name) if in_bucket else Path(name)
    info = folder / RECORDS / VERSION / _INFO
    with _readable(info):
        saved = "" if not info.is_file() else _text(info) if in_bucket else str(info.stat().st_mtime_ns)
    return Source([folder if isinstance(folder, Path) else saved], saved, functools.partial(read_tfds, folder))


def write_tfds(
    records: Sequence[Record], out_dir: Path, *, image_root: Path | None, progress: Callable[[int], None] | None = None
) -> None:
    """Write records and their images to a new TFDS folder, atomically.

    Args:
      records: records from `read_records` (with `image_lead` if the template may add the image placeholder).
      out_dir: the new folder.
      image_root: folder to which image names are relative (None: names are full paths).
      progress: called with the number of examples written: first records, then images.

    Raises UserError if the folder exists, there are no records, or an image cannot be read.
    """
    out_dir = Path(out_dir)
    if os.path.lexists(out_dir):
        raise UserError(f"{out_dir}: exists already: remove it or choose another folder")
    if not records:
        raise UserError(f"{out_dir}: the data file has no records to write as a TFDS data set: check --data")
    video = next((record.id for record in records if record.videos), None)
    if video is not None:
        raise UserError(f"record {video}: has a video, which TFDS folders do not hold: train on the JSON file itself")
    names = {image: str(image) for record in records for image in record.images}
    for image in names:
        if isinstance(image, Path) and image_root is not None and image.is_relative_to(image_root):
            names[image] = str(image.relative_to(image_root))
    numbers = {image: number for number, image in enumerate(names)}
    building = out_dir.parent / f".{out_dir.name}.partial-{os.getpid()}"
    try:
        with reading(out_dir, "free disk space or use another folder", "written"):
            done = itertools.count(1)

            def counted(examples: Iterable[Any]) -> Iterator[tuple[int, Any]]:
                for number, example in enumerate(examples):
                    yield number, example
                    if progress is not None:
                        progress(next(done))

            _write(RECORDS, building, counted(_example(record, names, numbers) for record in records))
            if names:
                _write(IMAGES, building, counted(_picture(image, name) for image, name in names.items()))
            os.replace(building, out_dir)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _features(name: str) -> Any:
    features = _load_tfds().features
    text, sequence = features.Text(), features.Sequence
    if name == IMAGES:
        return features.FeaturesDict({"name": text, "image": features.Image()})
    return features.FeaturesDict(
        {
            "id": text,
            "conversations": sequence({"from": text, "value": text}),
            "images": sequence({"name": text, "number": np.int64}),
            "others": text,
        }
    )


def _example(record: Record, names: Mapping[Any, str], numbers: Mapping[Any, int]) -> dict[str, Any]:
    return {
        "id": record.id,
        "conversations": [{"from": speaker, "value": value} for speaker, value in record.turns],
        "images": [{"name": names[image], "number": numbers[image]} for image in record.images],
        "others": json.dumps({**record.fields, **({"answers": record.answers} if record.answers else {})}),
    }


def _picture(image: Path | StoredImage, name: str) -> dict[str, Any]:
    with reading(image, "check the image root"):
        content = read_bytes(image, MAX_COPY_BYTES) if isinstance(image, Path) else image.read_bytes()
    return {"name": name, "image": io.BytesIO(content)}  # encoded bytes: arrays would go through TensorFlow


def _write(name: str, data_dir: Path, examples: Iterator[tuple[int, Any]]) -> None:
    tfds, features = _load_tfds(), _features(name)
    base: Any = tfds.core.GeneratorBasedBuilder

    class Builder(base, skip_registration=True):  # type: ignore[call-arg]
        """TFDS builder that writes one data set (records or images); examples keep their order."""

        code_path = None  # no checksums to look up, which would need another package
        VERSION = tfds.core.Version(VERSION)

        def _info(self) -> Any:
            described = f"vlmprune {self.name}: conversations in LLaVA's format, images encoded as they came"
            return tfds.core.DatasetInfo(builder=self, features=features, description=described, disable_shuffling=True)

        def _split_generators(self, manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
            return {SPLIT: examples}

        def _generate_examples(self) -> Any:
            return examples

    Builder.name = name
    builder = Builder(data_dir=str(data_dir), file_format=FILE_FORMAT)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):  # suppresses messages about downloads
        builder.download_and_prepare(download_dir=str(data_dir / "downloads"), download_config=config)
    shutil.rmtree(data_dir / "downloads", ignore_errors=True)


class ImageStore:
    """Reader of the images in a TFDS folder; opened at the first read and thread-safe."""

    def __init__(self, folder: Path | epath.Path) -> None:
        self.folder = folder
        self.numbers: dict[str, int] = {}  # name of an image -> its number

    @functools.cached_property
    def _images(self) -> _Examples:
        return _Examples(self.folder, IMAGES)

    @functools.cached_property
    def identity(self) -> str:
        """Digest of the data set's metadata, which has the number of images and their total size."""
        return hashlib.sha256(_text(self.folder / IMAGES / VERSION / _INFO).encode()).hexdigest()[:16]

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield every record of the folder as an entry of a JSON data file."""
        with _on_this_machine(self.folder) as near:
            examples = _Examples(near, RECORDS)
            for index in range(len(examples)):
                location = f"{self.folder / RECORDS}, example {index}"
                with reading(location, _TODO):
                    entry, images = _entry(examples[index], location)
                self.numbers |= images
                yield entry

    def find(self, name: str, location: str) -> StoredImage:
        return StoredImage(name, self.numbers[name], self)

    def read(self, number: int) -> bytes:
        """Return an image's encoded bytes; raise OSError if it is missing, UserError if the folder is damaged."""
        if not 0 <= number < len(self._images):
            raise OSError(f"image {number} is not in {self.folder / IMAGES}")
        with reading(f"{self.folder / IMAGES}, image {number}", _TODO):
            return self._images[number]["image"]


class _Examples:
    """Random access to the examples of a TFDS data set (records or images), without decoding images.

    Raises UserError if the data set was not written by `write_tfds`.
    """

    def __init__(self, folder: Path | epath.Path, name: str) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
        from google.protobuf.json_format import MessageToDict

        place = folder / name / VERSION
        with _readable(place):
            if not (place / _INFO).exists():
                raise UserError(f"{folder}: was not written by `vlmprune tfds` (no {name}/{VERSION}/{_INFO}): {_TODO}")
            self._features = _features(name)
            file = place / _FEATURES
            # the form that tfds writes; no class is looked up by a name in the file
            if parse_json(_text(file), str(file), _TODO) != MessageToDict(self._features.to_proto()):
                raise UserError(f"{file}: describes features that `vlmprune tfds` does not write: {_TODO}")
            file = place / _INFO
            info = checked(parse_json(_text(file), str(file), _TODO), _Info, str(file), _TODO)
            splits = [split["shardLengths"] for split in info["splits"] if split["name"] == SPLIT]
            if info["fileFormat"] != FILE_FORMAT or len(splits) != 1:
                raise UserError(f"{file}: must describe {name} as one split {SPLIT!r} in {FILE_FORMAT} files: {_TODO}")
            lengths = [*map(int, splits[0])]
            shards = [f"{place}/{name}-{SPLIT}.{FILE_FORMAT}-{i:05}-of-{len(lengths):05}" for i in range(len(lengths))]
            if isinstance(place, Path):
                for shard in shards:
                    open_file(Path(shard)).close()
            # shards named with their range of examples are opened only when they are read
            ranges = [f"{shard}[0:{length}]" for shard, length in zip(shards, lengths, strict=True) if length]
            self._examples = ArrayRecordDataSource(ranges) if ranges else []
        self._decoders = {"image": _load_tfds().decode.SkipDecoding()} if name == IMAGES else None

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        content = self._examples[number]
        if not 0 < len(content) <= _MAX_EXAMPLE:
            raise ValueError(f"example {number} has {len(content):,} bytes")
        return self._features.deserialize_example_np(content, decoders=self._decoders)


def _text(file: Path | epath.Path) -> str:
    if isinstance(file, Path):
        return read_text(file, MAX_JSON_BYTES)
    with _readable(file):
        return file.read_text()


def read_tfds(folder: Path | epath.Path, *, image_lead: bool = False, on_error: str = "stop") -> list[Record]:
    """Return the records in a folder that `write_tfds` wrote; see `read_records` for malformed entries."""
    store, none = ImageStore(folder), f"{folder / RECORDS}: contains no records: {_TODO}"
    return records_of(store.entries(), folder, store, image_lead, on_error, none=none)


def _entry(example: Mapping[str, Any], location: str) -> tuple[dict[str, Any], dict[str, int]]:
    names = [name.decode() for name in example["images"]["name"]]
    turns = zip(example["conversations"]["from"], example["conversations"]["value"], strict=True)
    entry = {
        **checked(parse_json(example["others"], location, _TODO), dict[str, Any], location, _TODO),
        "id": example["id"].decode(),
        "conversations": [{"from": speaker.decode(), "value": text.decode()} for speaker, text in turns],
        "images": names,
    }
    return entry, dict(zip(names, map(int, example["images"]["number"]), strict=True))


@contextlib.contextmanager
def _on_this_machine(folder: Path | epath.Path) -> Iterator[Path]:
    """Context that yields the folder, or for a cloud bucket a local copy of the records (remote reads are slow)."""
    if isinstance(folder, Path):
        yield folder
        return
    _Examples(folder, RECORDS)
    with tempfile.TemporaryDirectory() as copy:
        near = Path(copy) / RECORDS / VERSION
        near.mkdir(parents=True)
        with _readable(folder / RECORDS):
            for file in (folder / RECORDS / VERSION).iterdir():
                with file.open("rb") as theirs, (near / file.name).open("wb") as ours:
                    shutil.copyfileobj(theirs, ours)
        yield Path(copy)


@contextlib.contextmanager
def _readable(place: Path | epath.Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f"{place}: reading a bucket needs gcsfs: pip install 'vlmprune-jax[gcs]'") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{place}: cannot be read ({reason(error)}): {_TODO}") from error


def _load_tfds() -> Any:
    """Import tensorflow_datasets on first use (half a second) and switch off its progress bars."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    return tfds
