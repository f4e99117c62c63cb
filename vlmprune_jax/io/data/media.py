"""Images and videos of records: files below one folder, parts of data sets, bytes in data URIs; decoding of images."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import functools
import hashlib
import logging
import math
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from vlmprune_jax.base.errors import UserError, error_context, reason
from vlmprune_jax.base.files import IMAGE_FORMATS, open_image
from vlmprune_jax.base.links import real_path

SHOWN = 200  # maximum characters of a value in a message
_MAX_SECONDS = 1e9  # of the start and end of a video's part
# Decoders warn of metadata, which is not used, and of sizes, which `max_pixels` limits; real problems raise errors.
# Silenced for the whole process, because warning filters are not per thread.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError, OSError):  # libtiff prints to stderr; not every build has it
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


class _Store(Protocol):
    def read(self, number: int) -> bytes:
        """Return an image's encoded bytes (such as a JPEG file)."""

    @property
    def identity(self) -> str:
        """Text that identifies the data set's content, used in cache keys."""


@dataclass(frozen=True)
class StoredImage:
    """Image stored inside a data set instead of a file; `name` appears in error messages."""

    name: str
    number: int
    store: _Store

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        """Return the image's encoded bytes; raise OSError if they cannot be read."""
        return self.store.read(self.number)


@dataclass(frozen=True)
class InlineStore:
    """Store of one encoded image or video whose bytes are part of a record or were passed by a caller."""

    content: bytes

    def read(self, number: int) -> bytes:
        return self.content

    @functools.cached_property
    def identity(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


# A video file, its bytes, or the images that are its frames.
Video = Path | StoredImage | tuple[Path | StoredImage, ...]
Part = tuple[float, float] | None  # seconds between which a video is used; None for the whole video


def image_key(image: Path | StoredImage) -> str:
    """Return an image's cache key: path and file size, or the identity of its data set and its number."""
    if isinstance(image, StoredImage):
        return f"{image.store.identity}/{image.number}"
    return f"{image.absolute()}:{image.stat().st_size if image.exists() else 'missing'}"


class Images(Protocol):
    """Interface that finds a record's images by their names."""

    def find(self, name: str, location: str) -> Path | StoredImage:
        """Return the image or video called `name`; raise UserError, prefixed with `location`, if there is none."""


def shown(value: Any) -> str:
    """Return a JSON value as text for an error message, shortened if it is long."""
    try:
        return repr(value)[:SHOWN]
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        return f"a {type(value).__name__}"


def media_names(entry: Mapping[str, Any], key: str, location: str) -> list[Any]:
    """Return the names of an entry's images (`key` "image"), or of its videos, which may be lists of names of frames.

    A name is that of a file, a folder of frames, or a data URI.
    """
    values = [entry[name] for name in (key, f"{key}s") if entry.get(name) is not None]
    if len(values) > 1:
        raise UserError(f"{location}: has both '{key}' and '{key}s': keep one")
    names = values[0] if values else []
    names = [names] if isinstance(names, str) else names
    several = key == "video"
    listed = names if isinstance(names, list) else [[]]
    lists = [name if several and isinstance(name, list) else [name] for name in listed]
    if not all(each and all(isinstance(name, str) and name for name in each) for each in lists):
        items = "a list whose items are paths or lists of frames" if several else "a list of paths"
        raise UserError(f"{location}: '{key}' must be a path or {items}, got {shown(values[0])}")
    return names


def video_part(entry: Mapping[str, Any], videos: Sequence[Video], location: str) -> Part:
    """Return the seconds between which an entry uses its video, `start` and `end`; None for the whole video."""
    start, end = entry.get("start"), entry.get("end")
    if not videos or start is end is None:
        return None
    part = (0.0 if start is None else start, math.inf if end is None else end)
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in part)
    inside = numbers and 0 <= part[0] < part[1] and part[0] <= _MAX_SECONDS and (end or 0) <= _MAX_SECONDS
    if len(videos) > 1 or isinstance(videos[0], tuple) or not inside:
        raise UserError(
            f"{location}: 'start' and 'end' must be seconds of the record's only video file, in this order, got "
            f"{shown(start)} and {shown(end)}: correct or remove them"
        )
    return part


def find_video(name: str | list[str], root: Images, location: str) -> Video:
    """Return a record's video; raise UserError if there is no such video, or a data URI is malformed."""
    if isinstance(name, list):
        return tuple(root.find(frame, location) for frame in name)
    start, _, content = name.partition(";base64,")
    if not start.startswith("data:video/"):
        return root.find_video(name, location) if isinstance(root, MediaRoot) else root.find(name, location)
    try:
        # A list of JPEG images is joined by commas, as in vLLM's requests.
        parts = [base64.b64decode(part, validate=True) for part in content.split(",")]
    except ValueError as error:
        raise UserError(f"{location}: video {name[:40]!r}... is not valid base64: encode it again") from error
    stored = tuple(StoredImage(f"{location}, video", 0, InlineStore(part)) for part in parts)
    return stored if start == "data:video/jpeg" else stored[0]


class MediaRoot:
    """Image lookup in one folder, with cached results because many records share an image."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else Path(folder)
        with error_context("image root"):
            self._real = None if folder is None else str(real_path(folder))
        self._paths: dict[str, Path] = {}

    def find(self, name: str, location: str, what: str = "image") -> Path:
        """Return the path of an image (or video); raise UserError if it is missing or outside the image folder."""
        if name in self._paths:
            return self._paths[name]
        if self._folder is None or self._real is None:
            raise UserError(f"{location}: has {what} {shown(name)}, but there is no image folder: set the image root")
        short, pure = name if len(name) <= SHOWN else f"{name[:SHOWN]}...", PurePosixPath(name)
        if name.startswith("data:") or "://" in name:
            raise UserError(f"{location}: {what} {short!r} is not a file: save it below the image root {self._folder}")
        if pure.is_absolute() or ".." in pure.parts or "\0" in name:
            raise UserError(f"{location}: {what} {short!r} must be a path below the image root {self._folder}")
        path = self._folder / name
        if not os.path.isfile(path):  # unlike Path.is_file, false for a name that is too long
            problem = "is not a file" if os.path.lexists(path) else "does not exist"
            raise UserError(f"{location}: {what} {self._folder / short} {problem}: check the image root and the path")
        if not os.path.realpath(path).startswith(self._real.rstrip(os.sep) + os.sep):
            raise UserError(
                f"{location}: {what} {path} is a link to a file outside the image root {self._folder}: replace it "
                "by a copy"
            )
        self._paths[name] = path
        return path

    def find_video(self, name: str, location: str) -> Video:
        """Return the path of a video, or the paths of the frames in a folder, in the order of their numbers."""
        pure = PurePosixPath(name)
        inside = not pure.is_absolute() and ".." not in pure.parts and "\0" not in name
        if self._folder is None or not inside or not os.path.isdir(self._folder / name):
            return self.find(name, location, "video")
        files = [file for file in os.listdir(self._folder / name) if not file.startswith(".")]
        files.sort(key=lambda file: ([int(number) for number in re.findall(r"\d+", file)], file))
        return tuple(self.find(f"{name}/{file}", location) for file in files)


class MemoryBudget:
    """Bytes that several threads share; a thread waits until enough of them are free, and no later one overtakes it.

    A request above the whole budget waits until nothing else is in use, and then proceeds alone. A thread that holds
    bytes must not request more, which could wait forever.
    """

    def __init__(self, total: int) -> None:
        self._total, self._used = total, 0
        self._turn, self._changed = threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Context that holds `size` bytes of the budget."""
        with self._turn, self._changed:  # one thread waits for bytes, all others for their turn
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._total)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


DECODING = MemoryBudget(2**31)  # one image or clip at the default limits, or many usual ones


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB."""
    if image.mode == "P" and "transparency" in image.info:
        # same colours as a direct conversion, without PIL's warning about transparent palettes
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def opened_image(path: Path | StoredImage, record: str, max_pixels: int | None = None) -> Iterator[Image.Image]:
    """Context that opens an image and reads its header; errors inside it name the file and the record."""
    try:
        with open_image(path if isinstance(path, Path) else path.read_bytes()) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise UserError(
                    f"{path}: image of {image.width}x{image.height} pixels exceeds the limit of {max_pixels} pixels: "
                    "shrink it or raise data.max_image_pixels"
                )
            yield image
    except UserError as error:
        raise UserError(f"{path} (record {record}): {str(error).removeprefix(f'{path}: ')}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} (record {record}): image is far too large ({error}): shrink it") from error
    except Exception as error:  # PIL decoders raise OSError, ValueError, SyntaxError, struct.error, ... by format
        problem = f"none of {', '.join(IMAGE_FORMATS)}" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise UserError(f"{path} (record {record}): not a readable image ({problem}): replace the file") from error
