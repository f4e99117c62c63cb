"""Journal of a long pass over data: results are stored batch by batch, and an interrupted pass resumes there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import checked, read_json_lines, replacing
from vlmprune_jax.base.processes import is_main_process, on_process_zero

T = TypeVar("T")


class Journal:
    """File with one JSON line per finished batch, from which an interrupted pass over the data resumes.

    Process 0 reads and writes the file. A journal of a different pass (`made_from`) is discarded, and so is a line
    truncated by a crash. Floats are exact, because the JSON text of a float64 is read back as the same value.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]):
        self.path = path
        self._made_from = json.loads(json.dumps(dict(made_from)))
        self.entries: list[Any] = on_process_zero(self._open)

    def _open(self) -> list[Any]:
        """Return the finished batches of an interrupted pass; delete the journal if it belongs to other inputs."""
        try:
            lines = read_json_lines(self.path, Any, cut=True)
        except UserError:  # missing, or not a journal
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
        """Keep the first `number` entries of the journal and delete the later ones, which are damaged."""
        del self.entries[number:]
        if is_main_process():
            self._write([self._made_from, *self.entries])

    def add(self, entry: Any) -> None:
        """Append the result of one batch (a JSON value) to the journal."""
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
    progress: Callable[[int], None] | None = None,
) -> Iterator[Any]:
    """Yield `compute(batch)` (a JSON value) for every batch; results already in the journal are not recomputed.

    From the first entry that does not match its batch (`fits`), which may be damaged, results are computed again.
    `progress`: called with the number of batches done.
    """
    entries = [] if journal is None else journal.entries
    for number, batch in enumerate(batches):
        if journal is not None and number < len(entries) and not fits(batch, entries[number]):
            journal.cut(number)
        stored = number < len(entries)
        entry = entries[number] if stored else compute(batch)
        if journal is not None and not stored:
            journal.add(entry)
        yield entry
        if progress is not None:
            progress(number + 1)


def is_of(kind: Any, entry: Any) -> bool:
    """Return True if a JSON value in the journal has the type `kind`."""
    try:
        checked(entry, kind, "", "")
    except UserError:
        return False
    return True
