"""Damaged and hostile JSON: every node of a good value deleted, or replaced by what nobody would write there."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

DELETED = object()
VALUES = (
    DELETED,
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    1e308,
    "",
    "\x1b[31m\u202e$\\frac{<b>[/red]\0\udcff",
    "\ud800",
    "中文" * 300,
    "../../etc/passwd",
    [],
    [[[]]],
    {},
    {"": None},
)


def mutants(good: Any, share: float = 1.0, seed: int = 0) -> Iterator[tuple[str, Any]]:
    """(where and what, a copy with one node changed), of all or a seeded share of them."""
    draw = random.Random(seed)
    for place in [(), *_places(good)]:
        for value in VALUES:
            if draw.random() >= share or (value is DELETED and not place):
                continue
            changed = copy.deepcopy(good)
            if not place:
                changed = value
            else:
                holder = changed
                for step in place[:-1]:
                    holder = holder[step]
                if value is DELETED:
                    del holder[place[-1]]
                else:
                    holder[place[-1]] = value
            yield f"{place} = {value!r:.40}", changed


def _places(value: Any) -> Iterator[tuple[Any, ...]]:
    steps = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for step in steps:
        yield (step,)
        yield from ((step, *rest) for rest in _places(value[step]))
