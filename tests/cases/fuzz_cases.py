"""Damage for files, and what their readers may do with it: return something, or raise one line for a terminal.

Examples are drawn with a fixed seed, few enough for every run of the tests. VLMPRUNE_FUZZ=N (`make fuzz`) draws N times
as many, other ones each time.
"""

from __future__ import annotations

import copy
import datetime
import io
import itertools
import json
import os
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from repository import HANG

from vlmprune_jax.base.errors import UserError

TIMES = int(os.environ.get("VLMPRUNE_FUZZ", "1"))
ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202eevil\r\n\x00"
# Values that no field expects, or just not there.
ODD = [
    None, True, False, -1, 0, 1, 2, 300, 0.5, 1.5, -0.0, 5e-324, 1e20, 1e308, float("inf"), float("nan"), 10**9, 2**31,
    2**32 - 1, 2**53 + 1, 2**63, 10**30, 10**400, "", "x", "0", "1e9", "../../secret", "/dev/zero", ESCAPES, "\ud800",
    "é" * 3000, "[" * 3000, [], [[]], {}, [1], [None], [ESCAPES], [0.5, 1.5], [True, False], [10**9] * 20,
    {"a": {"b": [1]}},
]  # fmt: skip
# What nobody would write there, for every node of a value.
DELETED = object()
_HOSTILE = [
    DELETED, None, True, -1, 0, 1.5, 10**30, 10**400, float("nan"), float("inf"), 1e308, "", "\ud800", "中文" * 300,
    "\x1b[31m\u202e$\\frac{<b>[/red]\0\udcff", "../../etc/passwd", [], [[[]]], {}, {"": None},
]  # fmt: skip
_BYTES = [b"", b"\0" * 400, b"[" * 50_000, b'{"a":' * 10_000, b"\xff\xfe\x00", b"9" * 5000, b"null", b"[]", b"{}"]


def fuzz(examples: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """Call the function below at once with so many examples, times `TIMES`, of which none may hang."""
    told = settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        deadline=datetime.timedelta(seconds=HANG),
        database=None,
        phases=(Phase.generate,),  # one or two edits of a whole file: nothing to shrink
        suppress_health_check=list(HealthCheck),
    )
    return lambda check: told(given(**strategies)(check))()


def reads(read: Callable[[], Any], *names: str) -> Any:
    """What a reader returns, or None where it refuses in a line that says one of these names."""
    try:
        return read()
    except UserError as error:
        line = str(error)
        assert 0 < len(line) < 2100
        assert line.isprintable()
        assert any(name in line for name in names or ("",)), f"names none of {names}: {line}"
        return None


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes of a file with a few flipped, cut off, left out, put in or doubled; or something else altogether."""
    kind = draw(st.sampled_from(("flip", "flip", "cut", "cut", "drop", "put", "double", "other")))
    if kind == "other":
        return draw(st.sampled_from(_BYTES) | st.binary(max_size=200))
    # Headers are where it hurts: half of the places are in the first 400 bytes.
    place = st.integers(0, len(content)) | st.integers(0, min(400, len(content)))
    if kind == "flip":
        changed = bytearray(content)
        for at in draw(st.lists(place.filter(lambda at: at < len(content)), min_size=1, max_size=6)):
            changed[at] = draw(st.integers(0, 255))
        return bytes(changed)
    first, last = sorted((draw(place), draw(place)))
    if kind == "cut":
        return content[:first]
    if kind == "drop":
        return content[:first] + content[last:]
    middle = content[first:last] if kind == "double" else draw(st.binary(min_size=1, max_size=20))
    return content[:first] + middle + content[first:]


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything within a JSON value; of a long list to its ends."""
    found = [at]
    if isinstance(value, dict):
        inner = list(value.items())
    else:
        inner = list(enumerate(value)) if isinstance(value, list) else []
    for key, one in inner if len(inner) <= 40 else [*inner[:3], inner[-1]]:
        found += _places(one, (*at, key))
    return found


@st.composite
def edited(draw: st.DrawFn, value: Any, most: int = 2) -> Any:
    """A JSON value in which up to `most` others are replaced, removed, renamed or repeated."""
    value = json.loads(json.dumps(value))  # a copy
    for _ in range(draw(st.integers(1, most))):
        places = [place for place in _places(value) if place]
        if not places:
            return draw(st.sampled_from(ODD))
        *path, key = draw(st.sampled_from(places))
        holder = value
        for step in path:
            holder = holder[step]
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "repeat", "wrap")))
        if kind == "replace":
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif kind == "remove":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(("", "x", "0", ESCAPES, "\ud800", "k" * 3000)))] = holder.pop(key)
        elif kind == "repeat" and isinstance(holder, list):
            holder += [copy.deepcopy(holder[key])] * draw(st.integers(1, 50))
        else:
            holder[key] = draw(st.sampled_from(([holder[key]], {"a": holder[key]}, str(holder[key]))))
    return value


def json_files(value: Any) -> st.SearchStrategy[bytes]:
    """The bytes of a file of one JSON value that was edited, now and then damaged as bytes."""
    whole = json.dumps(value).encode()
    edits = edited(value).map(lambda one: json.dumps(one).encode())
    return st.one_of(edits, edits, edits, damaged(whole))


def json_lines(values: list[Any]) -> st.SearchStrategy[bytes]:
    """The bytes of a file of one JSON value a line."""

    def written(lines: Any) -> bytes:
        return "".join(json.dumps(one) + "\n" for one in (lines if isinstance(lines, list) else [lines])).encode()

    edits = edited(values).map(written)
    return st.one_of(edits, edits, damaged(written(values)))


def fuzz_file(
    examples: int, path: Path, read: Callable[[], Any], *names: str, files: st.SearchStrategy[bytes] | None = None
) -> None:
    """Damage a file, by default one of a JSON value; `read` returns or refuses in a line that says one of the names.

    Without names it is the file's.
    """

    @fuzz(examples, content=json_files(json.loads(path.read_bytes())) if files is None else files)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        reads(read, *(names or [path.name]))


def fuzz_folder(examples: int, folder: Path, read: Callable[[], Any]) -> None:
    """Damage one file of a folder at a time; `read` returns or refuses in a line that says the folder's name."""
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.is_file()}

    def damage(path: Path) -> st.SearchStrategy[tuple[Path, bytes]]:
        content = files[path]
        changed = json_files(json.loads(content)) if path.suffix == ".json" else damaged(content)
        return changed.map(lambda content: (path, content))

    @fuzz(examples, change=st.sampled_from(sorted(files)).flatmap(damage))
    def check(change: tuple[Path, bytes]) -> None:
        for path, content in {**files, change[0]: change[1]}.items():
            path.write_bytes(content)
        reads(read, folder.name)


def with_member(whole: bytes, name: str, content: bytes) -> bytes:
    """Return the bytes of a zip archive in which a member has this content, with a check sum that fits."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(changed, "w", zipfile.ZIP_DEFLATED) as file:
        for member in archive.infolist():
            data = content if member.filename == name else archive.read(member)
            file.writestr(member.filename, data, member.compress_type)
    return changed.getvalue()


def damaged_archives(whole: bytes, *often: str) -> st.SearchStrategy[bytes]:
    """Zip archives of which a member was damaged, those named in `often` more often than others; or as bytes."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    inside = st.sampled_from([*often, *members]).flatmap(
        lambda name: damaged(members[name]).map(lambda content: with_member(whole, name, content))
    )
    return st.one_of(inside, inside, damaged(whole))


def mutants(good: Any, share: float = 1.0) -> Iterator[tuple[str, Any]]:
    """(where and what, a copy with one node deleted or replaced), of all or a seeded share of them."""
    draw, text = random.Random(0), json.dumps(good)
    for place, value in itertools.product(_places(good), _HOSTILE):
        if draw.random() >= share or (value is DELETED and not place):
            continue
        holder = whole = {"": json.loads(text)}
        *path, key = ("", *place)
        for step in path:
            holder = holder[step]
        if value is DELETED:
            del holder[key]
        else:
            holder[key] = value
        yield f"{place} = {value!r:.40}", whole[""]
