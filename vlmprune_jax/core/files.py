"""The ways in for files that anybody may have written: opened, decoded and copied here, or in `hf/disk` (weights).

Whatever is wrong with a file is one line that names it. Nothing waits for a FIFO, runs a program, follows a link out of
a folder that is copied, or takes memory that a file only claims to need. tests/test_readers.py keeps every other
module from opening files by itself.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from vlmprune_jax.core.errors import UserError, reason

if TYPE_CHECKING:
    from PIL.Image import Image

# Larger than any real one (the tokenizer of a 260,000 word vocabulary: 33 MB); a list of them takes 25 times its text.
MAX_JSON_BYTES = 100_000_000
MAX_JSON_DEPTH = 100
MAX_ARRAYS_BYTES = 2**26  # the scores of a 70B model: 18 MB
MAX_COPY_BYTES = 2**30
# Numbers in schemas: what a float64 still counts, and neither NaN nor infinite.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
# What Pillow decodes by itself. Others start programs (EPS: Ghostscript) or read what a file only points to.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device",
          stat.S_IFBLK: "device"}  # fmt: skip


@contextlib.contextmanager
def reading(what: object, todo: str = "restore it from its source", done: str = "read") -> Iterator[None]:
    """Whatever code makes of a file's content raises, as one line that names the file, which "cannot be `done`".

    Also `RecursionError`, `MemoryError` and the panics of libraries in Rust, which are no `Exception`.

    Raises:
      UserError: in the place of any other error.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(f"{what}: cannot be {done} ({_told(error)}): {todo}") from error


def _told(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or reason(error)
    if isinstance(error, KeyError):
        return f"{reason(error)} is missing"
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    return "too deeply nested" if isinstance(error, RecursionError) else reason(error)


_LAST: list[Path] = []


def last_read() -> Path | None:
    """The file that was opened last: what an unforeseen error is most likely about."""
    return _LAST[0] if _LAST else None


def open_file(path: Path, missing: str = "no such file") -> io.BufferedReader:
    """A regular file, opened for reading in binary.

    Args:
      path: perhaps a link to one.
      missing: what to say where nothing is there.

    Raises:
      UserError: it is missing, a dangling or looping link, a folder, FIFO, device or socket, or may not be read.
    """
    try:
        mode = os.stat(path).st_mode  # before it is opened: opening a device may do something
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: is a {_KINDS.get(stat.S_IFMT(mode), 'special file')}, expected a file")
        _LAST[:] = [path]
        # Not to wait for a writer, should it have become a FIFO meanwhile.
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {_unopened(path, error, missing)}") from None


def _unopened(path: Path, error: OSError | ValueError, missing: str) -> str:
    if isinstance(error, ValueError):
        return "holds a character that no path can have"
    if error.errno == errno.ENOENT and os.path.islink(path):
        return f"is a link to {os.readlink(path)}, where nothing is"
    if error.errno == errno.ELOOP:
        return "is a link that leads back to itself"
    return missing if error.errno == errno.ENOENT else f"cannot be opened ({error.strerror})"


def read_bytes(path: Path, most: int | None = None, missing: str = "no such file") -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
      UserError: see `open_file`; it is larger; or the disk fails.
    """
    with open_file(path, missing) as file, reading(path, "mend the disk"):
        size = os.fstat(file.fileno()).st_size
        content = b"" if most is not None and size > most else file.read(size)
        if file.peek(1):  # files of /proc have more than they say
            content += file.read() if most is None else file.read(most + 1)
        if most is not None and max(size, len(content)) > most:
            raise UserError(f"{path}: has {size:,} bytes, more than the {most:,} that such a file may have")
        return content


def read_text(path: Path, most: int | None = None, missing: str = "no such file") -> str:
    """The content of a file of UTF-8 text.

    Raises:
      UserError: see `read_bytes`; or it is not UTF-8.
    """
    try:
        return read_bytes(path, most, missing).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}): is it the file you meant?") from None


def read_json(
    path: Path,
    kind: Any = dict[str, Any],
    *,
    missing: str | None = None,
    todo: str = "restore it from its source",
    most: int = MAX_JSON_BYTES,
    unicode: bool = True,
) -> Any:
    """The JSON value in a file, as it stands there, if it is of a kind.

    Args:
      path: what to read.
      kind: a type of msgspec's, as a `TypedDict` beside the code that writes the file. Fields that it does not name
        may be there.
      missing: what to say where nothing is there; by default, that a folder of a model has such a file.
      todo: what to do about a file that is damaged.
      most: bytes that it may have.
      unicode: whether its texts must be Unicode, as what is written on in UTF-8; names of files need not be.

    Raises:
      UserError: see `read_text`; or it is not JSON, or something else than `kind`.
    """
    said = f"is missing (is {path.parent} a Hugging Face model folder?)" if missing is None else missing
    return checked(parse_json(read_text(path, most, said), str(path), todo, unicode=unicode), kind, str(path), todo)


def read_parts(path: Path, kind: Any, todo: str = "restore it from its source") -> Any:
    """What a kind names of the JSON value in a file; the rest is passed over, ten times as fast as `read_json`.

    Raises:
      UserError: see `read_json`.
    """
    try:
        value = msgspec.json.decode(read_bytes(path, MAX_JSON_BYTES), type=kind)
        if _depth(value) > MAX_JSON_DEPTH:
            raise RecursionError("too deeply nested")
        return value
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: holds something else than it should ({reason(error)}): {todo}") from None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid JSON ({reason(error)}): {todo}") from None


def parse_json(text: str | bytes, where: str, todo: str, *, unicode: bool = True) -> Any:
    """The value of a JSON text, one that can be gone through and written again (`unicode`: see `read_json`).

    Raises:
      UserError: it is none, is too deeply nested, or holds half of a character.
    """
    try:
        value = json.loads(text)
        if _depth(value) > MAX_JSON_DEPTH:
            raise RecursionError
        if unicode and re.search(r"\\u[dD]", text if isinstance(text, str) else text.decode("latin-1")):
            json.dumps(value, ensure_ascii=False).encode()  # a surrogate alone is no UTF-8
        return value
    except (ValueError, RecursionError) as error:
        told = "too deeply nested" if isinstance(error, RecursionError) else reason(error)
        raise UserError(f"{where}: is not valid JSON ({told}): {todo}") from None


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_JSON_DEPTH:
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        depth, level = depth + 1, [one for part in inside for one in part]
    return depth


def checked(value: Any, kind: Any, where: str, todo: str) -> Any:
    """The value, if it is of a kind (see `read_json`).

    Raises:
      UserError: it is not; the place in it is named.
    """
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError, UnicodeEncodeError) as error:
        raise UserError(f"{where}: holds something else than it should ({reason(error)}): {todo}") from None
    return value


def read_json_lines(path: Path, kind: Any, *, cut: bool = False, missing: str = "no such file") -> list[Any]:
    """The JSON values in a file of one a line, all of a kind (see `read_json`).

    Args:
      path: what to read.
      kind: of each value.
      cut: the writer may have been killed in the middle of a line: what is no JSON ends the file.
      missing: what to say where nothing is there.

    Raises:
      UserError: see `read_text`; or a line is no JSON or something else.
    """
    values, todo = [], "remove it, and run the same command"
    for number, line in enumerate(read_text(path, MAX_JSON_BYTES, missing).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = parse_json(line, where, todo, unicode=False)
        except UserError:
            if cut:
                break
            raise
        values.append(checked(value, kind, where, todo))
    return values


def read_arrays(path: Path, *, missing: str, todo: str) -> dict[str, np.ndarray]:
    """The arrays in an `.npz`, at most 64 MiB of them; no pickles.

    Raises:
      UserError: see `open_file`; not such a file, damaged, or an array that is not as large as it claims to be.
    """
    arrays = {}
    content = io.BytesIO(read_bytes(path, MAX_ARRAYS_BYTES, missing))
    with reading(path, todo), zipfile.ZipFile(content) as archive:
        members = archive.infolist()
        claimed = sum(member.file_size for member in members)
        if claimed > MAX_ARRAYS_BYTES:
            raise UserError(f"{path}: unpacks to {claimed:,} bytes, more than {MAX_ARRAYS_BYTES:,}: {todo}")
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise UserError(f"{path}: {name} comes twice: {todo}")
            arrays[name] = _array(archive.read(member), f"{path}: {name}", todo)
    return arrays


def _array(content: bytes, where: str, todo: str) -> np.ndarray:
    """An array in the format of numpy, its size checked against the bytes that are there before it is made."""
    file = io.BytesIO(content)
    major, _ = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, order, dtype = header(file)
    size, there = math.prod(shape) * dtype.itemsize, len(content) - file.tell()
    if dtype.hasobject or dtype.names is not None or size != there or min(shape, default=0) < 0:
        raise UserError(f"{where} is {dtype}{list(shape)} in {there:,} bytes, which it cannot be: {todo}")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if order else "C")


@contextlib.contextmanager
def open_image(source: Path | bytes) -> Iterator[Image]:
    """An image file, or the bytes of one, its header read: JPEG, PNG, WebP, GIF (first frame), BMP or TIFF.

    Raises:
      UserError: see `open_file`.
      Exception: Pillow's own, of many types, for what is no such image.
    """
    from PIL import Image

    content = open_file(source) if isinstance(source, Path) else io.BytesIO(source)
    with content, Image.open(content, formats=IMAGE_FORMATS) as image:
        yield image


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """A file to write, which is at `path` when the block succeeds, whole and also after a power cut, or not at all.

    Nothing is written through a link that lies there.

    Raises:
      OSError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # as of writing to a full disk
            error.filename = str(path)
        raise


def copy_file(source: Path, target: Path, folder: Path) -> None:
    """Copy a file of `folder`'s: a regular one, or a link to one that lies there or in the hub cache's `blobs`.

    Raises:
      UserError: see `open_file`; it is a link out of the folder, or larger than any file beside weights.
      OSError: `target` cannot be written.
    """
    with open_file(source) as file:
        _check_inside(source, folder)
        size = os.fstat(file.fileno()).st_size
        if size > MAX_COPY_BYTES:
            raise UserError(f"{source}: has {size:,} bytes, more than the {MAX_COPY_BYTES:,} of a file beside weights")
        with target.open("wb") as copy, reading(source, "mend the disk, or make room"):
            shutil.copyfileobj(file, copy)


def copy_folder(source: Path, target: Path, folder: Path) -> None:
    """Copy a folder in `folder` with all that is in it, each file as `copy_file` does; a link to a folder is none.

    Raises:
      UserError: see `copy_file`.
      OSError: `target` cannot be written.
    """
    if not os.path.isdir(source):
        open_file(source).close()  # says what else it is
        raise UserError(f"{source}: is a file, expected a folder")
    _check_inside(source, folder)
    todo = [(source, target)]
    while todo:
        here, there = todo.pop()
        there.mkdir(exist_ok=True)
        for name in sorted(os.listdir(here)):
            if os.path.isdir(here / name) and not os.path.islink(here / name):
                todo.append((here / name, there / name))
            else:
                copy_file(here / name, there / name, folder)


def _check_inside(source: Path, folder: Path) -> None:
    real, home = Path(os.path.realpath(source)), Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not real.is_relative_to(home) and real.parent != blobs:
        raise UserError(f"{source}: is a link out of the folder, to {real}: put a copy in its place, or remove it")
