"""What the batches of a long pass gave, kept as they finish, so that an interrupted pass continues after them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

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
        lines = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else ():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        if not lines or lines[0] != self._made_from:
            self.path.unlink(missing_ok=True)
            return []
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(partial, self.path)
        return lines[1:]

    def add(self, entry: Any) -> None:
        """Note what the next batch gave (a JSON value)."""
        if is_main_process():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                lines = [entry] if file.tell() else [self._made_from, entry]
                file.write("".join(json.dumps(line) + "\n" for line in lines))


def continued(compute: Callable[[T], Any], batches: Iterable[T], journal: Journal | None) -> Iterator[Any]:
    """`compute(batch)` of every batch (JSON values), taken from the journal where an interrupted pass left it there."""
    known = [] if journal is None else journal.entries
    for number, batch in enumerate(batches):
        if number < len(known):
            yield known[number]
            continue
        entry = compute(batch)
        if journal is not None:
            journal.add(entry)
        yield entry
