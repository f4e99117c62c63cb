"""`speed.json`, what was measured of speed, and what the report says of it.

processor   what computed
load        processes that waited for a processor, on average over the minute before
workload    rounds, prompt_tokens, new_tokens, batch_size, image, dtype
pairs       one object per shape: `models`, the runs that have it; `unpruned` and `pruned`, measured in turns:
            prefill and decode (tokens/s) and first_token (s), a value a round, and peak_bytes (or null)

And `bench.json`, which `vlmprune bench --json` writes: the same of models and engines, see `bench_tables`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from vlmprune_jax.core.errors import printable
from vlmprune_jax.core.files import Count, read_json
from vlmprune_jax.report.page import Table

SPEED, BENCH = "speed.json", "bench.json"
_TODO = "run `vlmprune run` again, or remove it"
_BENCH_TODO = "measure again with `vlmprune bench --json`, or remove it"
_Json = dict[str, Any]
_Row = tuple[str, ...]
_Rounds = Annotated[list[Annotated[float, Meta(gt=0, lt=1e30)]], Meta(min_length=1, max_length=1000)]


class _Speed(TypedDict):
    prefill: _Rounds
    decode: _Rounds
    first_token: _Rounds
    peak_bytes: Count | None


class _Pair(TypedDict):
    models: Annotated[list[str], Meta(min_length=1)]
    unpruned: _Speed
    pruned: _Speed


class _Workload(TypedDict):
    rounds: Count
    prompt_tokens: Count
    new_tokens: Count
    batch_size: Count
    image: bool
    dtype: str


class Measured(TypedDict):
    """The file; see the docstring of this module."""

    processor: str
    load: float
    workload: _Workload
    pairs: list[_Pair]


class _BenchSide(TypedDict):
    model: str
    backend: str
    versions: dict[str, str]
    weights: str
    bytes: Count
    parameters: NotRequired[Count]
    image: bool
    prompt_tokens: Count
    prefill: _Rounds
    decode: _Rounds
    first_token: _Rounds
    peak_bytes: Count


class _BenchWorkload(TypedDict):
    rounds: Count
    prompt_tokens: Count
    new_tokens: Count
    image: bool
    dtype: str


class Benched(TypedDict):
    """What `vlmprune bench --json` writes; see `bench_tables`."""

    processor: str
    threads: Count
    load: float
    workload: _BenchWorkload
    sides: Annotated[list[_BenchSide], Meta(min_length=1, max_length=1000)]


def read_bench(path: Path) -> _Json:
    """What `vlmprune bench --json` wrote to a file.

    Raises:
      UserError: it is not there, or damaged.
    """
    return read_json(path, Benched, todo=_BENCH_TODO, unicode=False)


def read_speed(workdir: Path) -> _Json | None:
    """What was measured, or None.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / SPEED
    return read_json(path, Measured, todo=_TODO, unicode=False) if path.is_file() else None


def medians(speed: _Json) -> _Json:
    """prefill and decode (tokens/s), first_token (s) and peak_bytes of one model, as `result.json` has them."""
    named = {name: statistics.median(speed[name]) for name in ("prefill", "decode", "first_token")}
    return {**named, "peak_bytes": speed["peak_bytes"]}


def speeds_of(measured: _Json | None) -> dict[str, _Json]:
    """`medians` by the names of runs; the unpruned model's, of all rounds, is named ""."""
    if measured is None or not measured["pairs"]:
        return {}
    pairs = measured["pairs"]
    found = {name: medians(pair["pruned"]) for pair in pairs for name in pair["models"]}
    rounds = {name: [value for pair in pairs for value in pair["unpruned"][name]] for name in _NAMES}
    return {"": medians({**rounds, "peak_bytes": pairs[0]["unpruned"]["peak_bytes"]}), **found}


_NAMES = ("prefill", "decode", "first_token")


def speed_tables(measured: _Json) -> tuple[Table, Table]:
    """What was measured, a row per shape and one of the unpruned model beside each; and how many times as fast."""
    rows, times = list[tuple[str, ...]](), list[tuple[str, ...]]()
    for pair in measured["pairs"]:
        before, after = pair["unpruned"], pair["pruned"]
        names = list(map(printable, pair["models"]))
        beside = "unpruned" if len(measured["pairs"]) == 1 else f"unpruned, beside {names[0]}"
        rows += [(beside, *_cells(before)), (together(names), *_cells(after))]
        times.append((together(names), *(_times(before[name], after[name]) for name in ("prefill", "decode"))))
    header = ("model", "prefill, tokens/s", "decoding, tokens/s", "first token, ms", "memory, MiB")
    return (
        Table("Measured speed: median (range) of all rounds", header, tuple(rows)),
        Table("Times the unpruned model, round by round", ("model", "prefill", "decoding"), tuple(times)),
    )


def together(names: Sequence[str]) -> str:
    """Models that have the same shape, in a few words."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} of its shape)"


def _cells(speed: _Json) -> tuple[str, ...]:
    peak = speed["peak_bytes"]
    milliseconds = [1000 * second for second in speed["first_token"]]
    shown = (_range(speed["prefill"]), _range(speed["decode"]), _range(milliseconds))
    return (*shown, "" if peak is None else f"{peak / 2**20:,.1f}")


def _range(values: Sequence[float]) -> str:
    return f"{_number(statistics.median(values))} ({_number(min(values))} to {_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratios(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """How many times as fast, round by round."""
    return [new / old for old, new in zip(before, after, strict=False)]


def is_faster(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether every round says so."""
    return min(ratios(before, after)) > 1


def _times(before: Sequence[float], after: Sequence[float]) -> str:
    found = ratios(before, after)
    told = f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
    return told if min(found) > 1 else f"{told}, {'slower' if max(found) < 1 else 'no speed-up'}"


def speed_notes(measured: _Json) -> list[str]:
    """In words: what was measured where, and which models are no faster."""
    told = measured["workload"]
    images = ", an image first" if told["image"] else ""
    lines = [
        f"Measured on {printable(measured['processor'])} (load {measured['load']:.1f} before) in "
        f"{printable(told['dtype'])}: {told['batch_size']:,} row(s) of {told['prompt_tokens']:,} tokens{images}, then "
        f"{told['new_tokens']:,} tokens generated, {told['rounds']:,} rounds in turns. Memory is what the compiled "
        "program takes of a device. Our own forward pass; other machines and engines differ."
    ]
    for name, what in (("prefill", "the prompt"), ("decode", "generating tokens")):
        slow = [
            pair["models"] for pair in measured["pairs"] if not is_faster(pair["unpruned"][name], pair["pruned"][name])
        ]
        if slow:
            named = "; ".join(together([printable(name) for name in shape]) for shape in slow)
            lines.append(f"No speed-up in {what}: {named}. Not every round was faster.")
    return lines


def bench_tables(found: _Json) -> list[Table]:
    """What `vlmprune bench` measured: speed, size, and how many times as fast as the first model in the same engine.

    `found`: processor, threads, load and workload; `sides`, an object per model and engine: model, backend, versions,
    weights (their type), bytes (on disk), parameters (older files have none), image, prompt_tokens; prefill and decode
    (tokens/s) and first_token (s), a value a round; peak_bytes.
    """
    speeds, sizes, times, first = list[_Row](), list[_Row](), list[_Row](), dict[str, _Json]()
    for side in found["sides"]:
        name = _end(side["model"])
        shown = f"{side['prompt_tokens']:,}{', image' if side['image'] else ''}"
        *speed, memory = _cells(side)
        speeds.append((name, side["backend"], *speed))
        sizes.append((name, side["backend"], side["weights"], shown, f"{side['bytes'] / 2**20:,.1f}", memory))
        before = first.setdefault(side["backend"], side)
        if before is not side:
            cells = (_times(before[key], side[key]) for key in ("prefill", "decode"))
            times.append((name, side["backend"], _end(before["model"], 24), *cells))
    tables = [
        Table("Speed: median (range) of all rounds",
              ("model", "engine", "prefill, tokens/s", "decoding, tokens/s", "first token, ms"), tuple(speeds)),
        Table("Size",
              ("model", "engine", "weights", "prompt, tokens", "on disk, MiB", "peak memory, MiB"), tuple(sizes)),
    ]  # fmt: skip
    if times:
        header = ("model", "engine", "than", "prefill", "decoding")
        tables.append(Table("Times as fast, round by round", header, tuple(times)))
    return tables


def decode_rates(found: _Json) -> dict[int, float]:
    """Tokens per second by parameters, of the models that `vlmprune bench` measured in its first engine and type."""
    first, rates = found["sides"][0], dict[int, list[float]]()
    for side in found["sides"]:
        if "parameters" in side and all(side[name] == first[name] for name in ("backend", "weights")):
            rates.setdefault(side["parameters"], []).extend(side["decode"])
    return {size: statistics.median(rates[size]) for size in sorted(rates)}


def bench_notes(found: _Json) -> list[str]:
    """In words: what was measured where."""
    told, versions = found["workload"], dict[str, str]()
    for side in found["sides"]:
        versions |= side["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [
        f"Measured on {printable(found['processor'])}, {found['threads']} thread(s), load {found['load']:.1f} before: "
        f"one prompt, then {told['new_tokens']:,} tokens generated, {told['rounds']:,} rounds in turns.",
        f"Each engine had a process of its own, whose peak memory is all that it held, libraries and loading "
        f"included: {named}.",
    ]


def _end(name: str, longest: int = 26) -> str:
    """A path whose end tells models apart."""
    name = printable(name)
    return name if len(name) <= longest else f"...{name[3 - longest :]}"
