"""Safe access to files from any source: opened, decoded and copied here; weights in `weight_files`, `hf/disk`.

Every problem with a file is one line that names the file. No function waits for a FIFO, runs a program, follows a link
out of a copied folder, or allocates memory that a file only claims to need. tests/test_readers.py keeps other modules
from opening files by themselves.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
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

from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.base.links import check_inside

if TYPE_CHECKING:
    from PIL.Image import Image

# Above any real file (tokenizer with a vocabulary of 260,000: 33 MB); parsed lists take 25 times the size of the text.
MAX_JSON_BYTES = 100_000_000
MAX_JSON_DEPTH = 100
MAX_ARRAYS_BYTES = 2**26  # the scores of a 70B model: 18 MB
MAX_COPY_BYTES = 2**30
_SMALL = 2**26
# Numbers in schemas: integers that a float64 represents exactly, and finite floats.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
# Formats that Pillow decodes by itself; others start programs (EPS: Ghostscript) or open files that they refer to.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device",
          stat.S_IFBLK: "device"}  # fmt: skip


@contextlib.contextmanager
def reading(what: object, todo: str = "restore it from its source", done: str = "read") -> Iterator[None]:
    """Context that converts any exception while reading a file to a UserError naming the file.

    This includes `RecursionError`, `MemoryError` and panics of Rust libraries, which are not subclasses of `Exception`.

    Args:
      what: the file, and perhaps the position in the file.
      todo: what the user should do.
      done: the participle in the message "cannot be read".

    Raises UserError in place of any other error.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(f"{what}: cannot be {done} ({_error_text(error)}): {todo}") from error


def _error_text(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or reason(error)
    if isinstance(error, KeyError):
        return f"{reason(error)} is missing"
    if isinstance(error, MemoryError):
        return "not enough memory"
    return "too deeply nested" if isinstance(error, RecursionError) else reason(error)


_LAST: list[Path] = []


def last_read() -> Path | None:
    """Return the path of the file opened last, to name it in an unforeseen error; None if no file was opened."""
    return _LAST[0] if _LAST else None


def open_file(path: Path, missing: str = "no such file") -> io.BufferedReader:
    """Open a regular file for reading bytes; raise UserError for folders, pipes and devices.

    Args:
      path: a file or a link to one.
      missing: message if the file does not exist.

    Raises:
      UserError: the file is missing, a dangling or looping link, a folder, FIFO, device or socket, or not readable.
    """
    try:
        mode = os.stat(path).st_mode  # before opening, which can have effects on a device
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: is a {_KINDS.get(stat.S_IFMT(mode), 'special file')}, expected a file")
        _LAST[:] = [path]
        # O_NONBLOCK: do not wait for a writer if the file has become a FIFO meanwhile.
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {_open_problem(path, error, missing)}") from None


def _open_problem(path: Path, error: OSError | ValueError, missing: str) -> str:
    if isinstance(error, ValueError):
        return "path contains an invalid character"
    if error.errno == errno.ENOENT and os.path.islink(path):
        return f"is a link to {os.readlink(path)}, which does not exist"
    if error.errno == errno.ELOOP:
        return "is a link to itself"
    return missing if error.errno == errno.ENOENT else f"cannot be opened ({error.strerror})"


def read_bytes(path: Path, most: int | None = None, missing: str = "no such file") -> bytes:
    """Return the content of a regular file; raise UserError if it is larger than `most` bytes.

    Raises UserError if the file cannot be opened (see `open_file`), is too large, or if the disk fails.
    """
    with open_file(path, missing) as file, reading(path, "check the disk"):
        size = os.fstat(file.fileno()).st_size
        if (
            _SMALL < size <= (most or size)
            and sum(end - start for start, end in written(file.fileno(), size)) < size / 2
        ):
            raise UserError(
                f"{path}: is a sparse file (most of its {size:,} bytes were never written): restore it from its source"
            )
        content = b"" if most is not None and size > most else file.read(size)
        if file.peek(1):  # files in /proc are longer than their reported size
            content += file.read() if most is None else file.read(most + 1)
        if most is not None and max(size, len(content)) > most:
            raise UserError(f"{path}: has {size:,} bytes, more than the maximum of {most:,} for such a file")
        return content


def written(file: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges (start, end) of an open sparse file that hold data, so that holes are not read."""
    end = 0
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # the file system does not report holes
                yield end, size
            return
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end


def read_text(path: Path, most: int | None = None, missing: str = "no such file") -> str:
    """Return the content of a UTF-8 text file.

    Raises UserError if the file cannot be read (see `read_bytes`), or the content is not UTF-8.
    """
    try:
        return read_bytes(path, most, missing).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (at byte {error.start}): check that it is the right file") from None


def read_json(
    path: Path,
    kind: Any = dict[str, Any],
    *,
    missing: str | None = None,
    todo: str = "restore it from its source",
    most: int = MAX_JSON_BYTES,
    unicode: bool = True,
) -> Any:
    """Read a JSON file and check it against a Python type (strictly: no value is converted).

    Args:
      path: the file.
      kind: a type that msgspec checks, such as a `TypedDict`; undeclared fields are allowed.
      missing: message if the file does not exist; by default, that a model folder has such a file.
      todo: what the user should do about a damaged file.
      most: maximum size (bytes).
      unicode: require strings that UTF-8 can encode, because they are written again; otherwise strings may also be file
        names of arbitrary bytes.

    Raises UserError if the file cannot be read (see `read_text`), or the content is not JSON or not of type `kind`.
    """
    if missing is None:
        missing = f"is missing (is {path.parent} a Hugging Face model folder?)"
    return checked(parse_json(read_text(path, most, missing), str(path), todo, unicode=unicode), kind, str(path), todo)


def read_parts(path: Path, kind: Any, todo: str = "restore it from its source") -> Any:
    """Read only those fields of a JSON file that the struct `kind` declares; ten times as fast as `read_json`.

    Raises UserError under the conditions of `read_json`.
    """
    try:
        value = msgspec.json.decode(read_bytes(path, MAX_JSON_BYTES), type=kind)
        if _nesting_depth(value) > MAX_JSON_DEPTH:
            raise RecursionError("too deeply nested")
        return value
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: does not have the expected content ({reason(error)}): {todo}") from None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid JSON ({reason(error)}): {todo}") from None


def parse_json(text: str | bytes, location: str, todo: str, *, unicode: bool = True) -> Any:
    """Parse JSON text to dictionaries, lists, strings and numbers.

    Raises UserError if the text is not JSON, is too deeply nested, or contains a lone surrogate.
    """
    try:
        value = json.loads(text)
        if _nesting_depth(value) > MAX_JSON_DEPTH:
            raise RecursionError
        if re.search(r"\\u[dD]", text if isinstance(text, str) else text.decode("latin-1")):
            # raises for a lone surrogate, unless that encodes a byte of a file name
            json.dumps(value, ensure_ascii=False).encode(errors="strict" if unicode else "surrogateescape")
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: is not valid JSON ({_error_text(error)}): {todo}") from None


def _nesting_depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_JSON_DEPTH:
        children = [
            item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)
        ]
        depth, level = depth + 1, list(itertools.chain.from_iterable(children))
    return depth


def checked(value: Any, kind: Any, location: str, todo: str) -> Any:
    """Return `value`; raise UserError unless it has the type `kind`."""
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError, UnicodeEncodeError) as error:
        raise UserError(f"{location}: does not have the expected content ({reason(error)}): {todo}") from None
    return value


def read_json_lines(path: Path, kind: Any, *, cut: bool = False, missing: str = "no such file") -> list[Any]:
    """Read a JSON Lines file and check each line against a Python type.

    Args:
      path: the file.
      kind: type of each value.
      cut: ignore everything from the first line that is not JSON, as the writer may have been killed there.
      missing: message if the file does not exist.

    Raises UserError if the file cannot be read (see `read_text`), or a line is not JSON or not of type `kind`.
    """
    values, todo = [], "remove the file and run the same command"
    for number, line in enumerate(read_text(path, MAX_JSON_BYTES, missing).split("\n"), start=1):
        if not line.strip():
            continue
        location = f"{path}, line {number}"
        try:
            value = parse_json(line, location, todo, unicode=False)
        except UserError:
            if cut:
                break
            raise
        values.append(checked(value, kind, location, todo))
    return values


def read_arrays(path: Path, *, missing: str, todo: str) -> dict[str, np.ndarray]:
    """Return {name: array} of an `.npz` file of at most 64 MiB, read without pickle.

    Raises UserError if the file cannot be opened (see `open_file`), is not an `.npz` file or is damaged, or the size of
    an array differs from its header.
    """
    arrays = {}
    content = io.BytesIO(read_bytes(path, MAX_ARRAYS_BYTES, missing))
    with reading(path, todo), zipfile.ZipFile(content) as archive:
        members = archive.infolist()
        claimed = sum(member.file_size for member in members)
        if claimed > MAX_ARRAYS_BYTES:
            raise UserError(
                f"{path}: unpacks to {claimed:,} bytes, more than the maximum of {MAX_ARRAYS_BYTES:,}: {todo}"
            )
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise UserError(f"{path}: contains array {name} twice: {todo}")
            arrays[name] = _array(archive.read(member), f"{path}: {name}", todo)
    return arrays


def _array(content: bytes, location: str, todo: str) -> np.ndarray:
    """Parse one array in NumPy's .npy format, after comparing the size in its header with the size of the file."""
    file = io.BytesIO(content)
    major, _ = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, order, dtype = header(file)
    size, there = math.prod(shape) * dtype.itemsize, len(content) - file.tell()
    if dtype.hasobject or dtype.names is not None or size != there or min(shape, default=0) < 0:
        raise UserError(
            f"{location}: an array {dtype}{list(shape)} does not have the {there:,} bytes that are stored: {todo}"
        )
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if order else "C")


@contextlib.contextmanager
def open_image(source: Path | bytes) -> Iterator[Image]:
    """Open an image (file or bytes) and read its header; formats: JPEG, PNG, WebP, GIF (first frame), BMP, TIFF.

    Raises:
      UserError: see `open_file`.
      Exception: of many types, from Pillow, if the content is not an image of these formats.
    """
    from PIL import Image

    content = open_file(source) if isinstance(source, Path) else io.BytesIO(source)
    with content, Image.open(content, formats=IMAGE_FORMATS) as image:
        yield image


@contextlib.contextmanager
def replacing(path: Path, *, writer: str = "") -> Iterator[io.BufferedWriter]:
    """Context that opens a temporary file for writing, and atomically renames it to `path` if the block succeeds.

    After a power failure, the file is either complete or absent. A link at `path` is replaced; its target is not
    written. `writer` distinguishes processes that may write one file at once. Raises OSError if the file cannot be
    written.
    """
    partial = path.with_name(f".{path.name}{writer}.partial")
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
        if isinstance(error, OSError) and error.errno and error.filename is None:  # such as a full disk
            error.filename = str(path)
        raise


def copy_file(source: Path, target: Path, folder: Path) -> None:
    """Copy a regular file of `folder`; links may only lead into the folder or the hub cache's `blobs`.

    Raises:
      UserError: the file cannot be opened (see `open_file`), links out of the folder, or is too large for a file that
        is not a weight file.
      OSError: `target` cannot be written.
    """
    with open_file(source) as file:
        check_inside(source, folder)
        size = os.fstat(file.fileno()).st_size
        if size > MAX_COPY_BYTES:
            raise UserError(
                f"{source}: has {size:,} bytes, more than the maximum of {MAX_COPY_BYTES:,} for files other than "
                "weights"
            )
        with target.open("wb") as copy, reading(source, "check the disk and its free space"):
            shutil.copyfileobj(file, copy)


def copy_folder(source: Path, target: Path, folder: Path) -> None:
    """Copy a subfolder of `folder` with its files; raise UserError for links to folders.

    Raises:
      UserError: see `copy_file`.
      OSError: `target` cannot be written.
    """
    if not os.path.isdir(source):
        open_file(source).close()  # raises for special files
        raise UserError(f"{source}: is a file, expected a folder")
    check_inside(source, folder)
    folders = [(source, target)]
    while folders:
        here, there = folders.pop()
        there.mkdir(exist_ok=True)
        for name in sorted(os.listdir(here)):
            if os.path.isdir(here / name) and not os.path.islink(here / name):
                folders.append((here / name, there / name))
            else:
                copy_file(here / name, there / name, folder)
