"""What the batches of a long pass gave, kept as they finish, so that an interrupted pass continues after them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import checked, read_json_lines, replacing
from vlmprune_jax.distributed.mesh import is_main_process, on_process_zero

T = TypeVar("T")


class Journal:
    """A JSON line for each finished batch, in order; the first line says what pass it is of.

    Process 0 reads and writes it. A journal of another pass (`made_from`) starts again, and a line that a crash cut off
    is dropped. Floats survive: JSON spells a float64 so that it is read back exactly.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]):
        self.path = path
        self._made_from = json.loads(json.dumps(dict(made_from)))
        self.entries: list[Any] = on_process_zero(self._open)

    def _open(self) -> list[Any]:
        """The entries of an interrupted pass; the file then holds them and nothing else, and is not there without."""
        try:
            lines = read_json_lines(self.path, Any, cut=True)
        except UserError:  # not there, or nothing that a pass left
            lines = []
        if lines[:1] != [self._made_from]:
            self.path.unlink(missing_ok=True)
            return []
        self._write(lines)
        return lines[1:]

    def _write(self, lines: Iterable[Any]) -> None:
        with replacing(self.path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())

    def cut(self, number: int) -> None:
        """Keep the first `number` entries: those that follow are damaged."""
        del self.entries[number:]
        if is_main_process():
            self._write([self._made_from, *self.entries])

    def add(self, entry: Any) -> None:
        """Note what the next batch gave (a JSON value)."""
        if is_main_process():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                lines = [entry] if file.tell() else [self._made_from, entry]
                file.write("".join(json.dumps(line) + "\n" for line in lines))


def continued(
    compute: Callable[[T], Any],
    batches: Iterable[T],
    journal: Journal | None,
    fits: Callable[[T, Any], bool] = lambda batch, entry: True,
) -> Iterator[Any]:
    """`compute(batch)` of every batch (JSON values), taken from the journal where an interrupted pass left it there.

    From the first entry on that does not fit its batch, which may be damaged, all are computed again.
    """
    known = [] if journal is None else journal.entries
    for number, batch in enumerate(batches):
        if number < len(known):
            if fits(batch, known[number]):
                yield known[number]
                continue
            assert journal is not None
            journal.cut(number)
        entry = compute(batch)
        if journal is not None:
            journal.add(entry)
        yield entry


def is_of(kind: Any, entry: Any) -> bool:
    """Whether an entry of a journal is of a kind (see core.files)."""
    try:
        checked(entry, kind, "", "")
    except UserError:
        return False
    return True
