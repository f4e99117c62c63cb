"""Tables and sentences about measured speed (`speed.json`, `bench.json`)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from vlmprune_jax.base.errors import printable
from vlmprune_jax.run.report.page import Table
from vlmprune_jax.run.workdir.evaluation import UNPRUNED
from vlmprune_jax.run.workdir.speed import Bench, BenchSide, Measurement, Speed, speedup

_Row = tuple[str, ...]
RULE = 'A speed-up is "not measurable" if repeats differ by more than 20 % of the change in speed'
LIMITS = ", or if it is more than FLOPs (prefill) or bytes (decoding) allow"


def speed_tables(measured: Speed, labels: Mapping[str, str] | None = None) -> tuple[Table, Table]:
    """Return tables of speed-ups over the unpruned model and of measured speeds, one row per layer shape.

    `labels`: {model: readable name}; of models of one shape, the shortest name is shown.
    """
    rows, times = list[_Row](), list[_Row]()
    for pair in measured.pairs:
        known = [labels[name] for name in pair.models if labels and name in labels] or pair.models
        name = min(map(printable, known), key=len)
        name += f" (and {len(known) - 1} of its shape)" if len(known) > 1 else ""
        beside = UNPRUNED if len(measured.pairs) == 1 else f"{UNPRUNED}, beside {name}"
        rows += [(beside, *_cells(pair.unpruned)), (name, *_cells(pair.pruned))]
        times.append((name, str(pair.medians.prefill_speedup), str(pair.medians.decode_speedup)))
    header = ("model", "prefill, tokens/s", "decoding, tokens/s", "first token, ms", "memory, MiB")
    return (
        Table("Speed as a multiple of the unpruned model's: ratio of medians (interval over rounds)",
              ("model", "prefill", "decoding"), tuple(times)),
        Table("Measured speed: median (range) of all rounds", header, tuple(rows), ascending=header[3:]),
    )  # fmt: skip


def _cells(speed: Measurement) -> _Row:
    milliseconds = [1000 * second for second in speed.first_token]
    memory = "" if speed.peak_bytes is None else f"{speed.peak_bytes / 2**20:,.1f}"
    return _range(speed.prefill), _range(speed.decode), _range(milliseconds), memory


def _range(values: Sequence[float]) -> str:
    numbers = statistics.median(values), min(values), max(values)
    return "{} ({} to {})".format(*(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in numbers))


def _conditions(measured: Speed | Bench) -> str:
    workload = measured.workload
    image = ", an image first" if workload.image else ""
    return (
        f"Measured on {printable(measured.processor)} (load {measured.load:.1f} before): "
        f"{workload.batch_size:,} row(s) of {workload.prompt_tokens:,} tokens{image}, then "
        f"{workload.new_tokens:,} tokens generated, {workload.rounds:,} rounds in turns."
    )


def speed_notes(measured: Speed) -> list[str]:
    """Return notes on the conditions of speed measurements."""
    return [
        f"{_conditions(measured)} Weights in {printable(measured.workload.dtype)}, in vlmprune's JAX forward pass, not "
        "in another engine. Memory is that of the compiled program on one device."
    ]


def bench_tables(bench: Bench) -> list[Table]:
    """Return benchmark tables: speed and size, and speed-ups over the first model in the same engine."""
    speeds, sizes, times, first = list[_Row](), list[_Row](), list[_Row](), dict[str, BenchSide]()
    for side in bench.sides:
        name = _path_end(side.model)
        shown = f"{side.prompt_tokens:,}{', image' if side.image else ''}"
        prefill, decode, _, memory = _cells(side)  # the first token takes the prompt's tokens by prefill
        tokens = bench.workload.batch_size * bench.workload.new_tokens
        answers = [1000 * (start + tokens / rate) for start, rate in zip(side.first_token, side.decode, strict=True)]
        speeds.append((name, side.backend, prefill, decode, _range(answers)))
        sizes.append((name, side.backend, side.weights, shown, f"{side.bytes / 2**20:,.1f}", memory))
        before = first.setdefault(side.backend, side)
        if before is not side:
            speedups = speedup(before.prefill, side.prefill), speedup(before.decode, side.decode)
            times.append((name, side.backend, _path_end(before.model, 24), *(speedup.show() for speedup in speedups)))
    tables = [
        Table("Speed: median (range) of all rounds",
              ("model", "engine", "prefill, tokens/s", "decoding, tokens/s", "question, ms"), tuple(speeds),
              ascending=("question, ms",)),
        Table("Size",
              ("model", "engine", "weights", "prompt, tokens", "on disk, MiB", "peak memory, MiB"), tuple(sizes)),
    ]  # fmt: skip
    if times:
        header = ("model", "engine", "than", "prefill", "decoding")
        tables.append(Table("Times as fast: ratio of medians (interval over rounds)", header, tuple(times)))
    return tables


def bench_notes(bench: Bench) -> list[str]:
    """Return notes on the conditions of a benchmark, and on its engines."""
    versions = {name: version for side in bench.sides for name, version in side.versions.items()}
    named = ", ".join(map(" ".join, versions.items()))
    return [
        f"{_conditions(bench)} A question is a prompt and the tokens generated for it. {RULE}.",
        f"Each engine had a process of its own with {bench.threads} thread(s), whose peak memory is all that it held, "
        f"libraries and loading included: {named}.",
    ]


def _path_end(name: str, longest: int = 26) -> str:
    name = printable(name)
    return name if len(name) <= longest else f"...{name[3 - longest :]}"
