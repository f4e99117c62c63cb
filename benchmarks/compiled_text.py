"""What a program compiled for TPUs says in its text: bytes from other chips, and bytes of HBM read and written."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(rf"= (.+?) ({'|'.join(_COLLECTIVES)})(-start)?\(")
# With several slices, the program is that of one; the network's share of a collective is a transfer of the host.
_BETWEEN_SLICES = re.compile(r'= \((\S+), u32\[\], token\[\]\) recv\(.*_xla_megascale_transfer_type="(\w+)"')
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|calls|to_apply|called_computations|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_BODY = re.compile(r"body=%([\w.\-]+)")
_NAMED = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = ")
_SHAPE = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_SPREAD = re.compile(r"async_collective_fusion")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")


def collective_bytes(hlo: str) -> dict[str, int]:
    """Return {collective operation: bytes that each chip receives} for one run of a compiled program.

    A collective in a loop is counted in every iteration; one that the compiler spreads over an inner loop that the
    program does not have it in is counted once per run of that loop. Rings are assumed: for a result of n bytes over g
    chips, a gather or all-to-all receives n (g - 1) / g bytes, a scatter g times as many (its result is smaller), a
    reduction twice as many, and a permutation n. Bytes from other slices are listed separately, as "KIND between
    slices".
    """
    computations = computations_of(hlo)
    loops = loops_of(hlo, computations)
    # The compiler writes an asynchronous collective into several fusions with the same channel.
    largest: dict[tuple[str, str], int] = defaultdict(int)
    for name, lines in computations.items():
        runs = sum(levels[-1] for levels in loops[name])
        for number, line in enumerate(lines):
            match = _INSTRUCTION.search(line)
            if between := _BETWEEN_SLICES.search(line):
                kind = f"{between[2].lower().replace('_', '-')} between slices"
                largest[kind, f"{name}/{number}"] = runs * round(_bytes(between[1]))
            if match is None:
                continue
            channel = _CHANNEL.search(line)
            key = (match[2], channel[1] if channel else f"{name}/{number}")
            # The start of an all-reduce names only its result, other starts (operands, results, ...).
            result = _second(match[1]) if match[3] and match[2] != "all-reduce" else match[1]
            times = runs
            if _SPREAD.match(name) and (source := _SOURCE.search(line)):
                depth = source[1].count("/while/body")
                times = sum(levels[min(depth, len(levels) - 1)] for levels in loops[name])
            largest[key] = max(largest[key], times * _received(match[2], result, line))
    total: dict[str, int] = defaultdict(int)
    for key, count in largest.items():
        total[key[0]] += count
    return dict(sorted(total.items()))


def computations_of(hlo: str) -> dict[str, list[str]]:
    """Return {computation name: lines} of a compiled program's HLO text."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = computations[head[1]] = []
        elif line.startswith("  "):
            lines.append(line)
    return computations


def loops_of(hlo: str, computations: dict[str, list[str]]) -> dict[str, list[tuple[int, ...]]]:
    """Return, for every way to reach a computation, how often each loop around it runs, the outermost first.

    The first number is 1, for the whole program; the last one is the number of executions.
    """
    calls: dict[str, list[tuple[str, int | None]]] = defaultdict(list)
    for name, lines in computations.items():
        for line in lines:
            condition, body = _CONDITION.search(line), _BODY.search(line)
            times = _trip_count(computations[condition[1]], computations[body[1]]) if condition and body else None
            for group in _CALLED.findall(line):
                calls[name] += [(called.strip().lstrip("%"), times) for called in group.split(",")]
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)
    ways: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    pending: list[tuple[str, tuple[int, ...]]] = [(entry[1], (1,))] if entry else []
    while pending:
        name, levels = pending.pop()
        ways[name].append(levels)
        pending += [
            (called, levels if times is None else (*levels, levels[-1] * times)) for called, times in calls[name]
        ]
    return ways


def _trip_count(condition: Sequence[str], body: Sequence[str]) -> int:
    """Return the trip count of an HLO while loop: the largest constant in its condition / the counter's step.

    The compiler for TPUs turns a gather and the product that reads it into a ring of permutations, and unrolls it: its
    counter advances by two.
    """
    most = max((int(number) for line in condition for number in re.findall(r" constant\((\d+)\)", line)), default=1)
    counter = next(
        (match[1] for line in condition if (match := re.search(r"32\[\].* get-tuple-element\(.*index=(\d+)", line))),
        None,
    )
    return -(-most // (1 if counter is None else _step(body, int(counter))))


def _step(body: Sequence[str], counter: int) -> int:
    """Return the step by which an HLO loop body increments its counter (1 if unknown)."""
    lines = {match[1]: line for line in body if (match := _NAMED.match(line))}
    root = next((line for line in body if line.lstrip().startswith("ROOT")), "")
    state = re.findall(r"%([\w.\-]+)", root.partition(" tuple(")[2].partition(")")[0])
    advanced = (
        re.search(r" add\(%([\w.\-]+), %([\w.\-]+)\)", lines.get(state[counter], "")) if counter < len(state) else None
    )
    constants = (
        [re.search(r" constant\((\d+)\)", lines.get(name, "")) for name in advanced.groups()] if advanced else []
    )
    return next((int(match[1]) for match in constants if match and int(match[1])), 1)


def _second(result: str) -> str:
    """Return the second element of an HLO tuple in text form; the tuple may be nested."""
    depth, elements = 0, [""]
    for character in result[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            elements.append("")
        else:
            elements[-1] += character
    return elements[1]


def _bytes(result: str) -> float:
    return sum(
        math.prod(map(int, filter(None, dims.split(",")))) * width_of(dtype) for dtype, dims in _SHAPE.findall(result)
    )


def _received(kind: str, result: str, line: str) -> int:
    size, group = _bytes(result), _group_size(line)
    share = (group - 1) / group
    factor = {"all-reduce": 2 * share, "reduce-scatter": share * group, "collective-permute": 1.0}.get(kind, share)
    return round(size * factor)


def width_of(dtype: str) -> float:
    """Return the size in bytes of an HLO element type such as "bf16", "s8" or "pred"."""
    bits = re.match(r"[a-z]+?(\d+)", dtype)
    return int(bits[1]) / 8 if bits else 1


def _group_size(line: str) -> int:
    """Return the number of chips in a replica group."""
    groups = _groups(line)
    return len(groups[0]) if len(groups) and "source_target_pairs" not in line else 2


def _groups(line: str) -> np.ndarray:
    """Return a collective's replica groups or source-target pairs, int[groups, n], from any HLO notation."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        along, names = re.findall(r"'(\w+)'", mesh[2]), [*sizes]
        order = [*(name for name in names if name not in along), *along]
        every = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        return every.transpose([names.index(name) for name in order]).reshape(-1, math.prod(sizes[n] for n in along))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        dims = [int(size) for size in iota[3].split(",")]
        order = [int(axis) for axis in iota[4].split(",")] if iota[4] else [*range(len(dims))]
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(int(iota[1]), int(iota[2]))
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}", line)
    return np.asarray(
        [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])] if listed else []
    )


_ASSIGNMENT = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"calls=%([\w.\-]+)")
# Instructions that move nothing, or whose work is in the computations that they call.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
         "async-update", "optimization-barrier", "partition-id", "iota"}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclass(frozen=True)
class _Instruction:
    name: str
    result: str
    kind: str
    operands: tuple[str, ...]
    line: str


_Computations = Mapping[str, Sequence[_Instruction]]


def hbm_bytes(hlo: str) -> int:
    """Return the bytes of HBM that each chip reads and writes in one run of a compiled program.

    Instructions in a loop count in every iteration. A fusion that only slices an operand reads the slice; a fusion that
    updates a slice of an operand in place writes the update. Arrays in on-chip memory (`S(1)` and above) do not count.
    """
    computations = computations_of(hlo)
    runs = {name: sum(levels[-1] for levels in ways) for name, ways in loops_of(hlo, computations).items()}
    parsed = {name: _parse(lines) for name, lines in computations.items()}
    fused = {match[1] for lines in computations.values() for line in lines
             if " fusion(" in line and (match := _CALLS.search(line))}  # fmt: skip
    total = 0
    for name, instructions in parsed.items():
        if runs.get(name) and name not in fused:
            results = {op.name: op.result for op in instructions}
            total += runs[name] * sum(_touched(op, results, parsed) for op in instructions)
    return total


def _parse(lines: Sequence[str]) -> list[_Instruction]:
    ops = []
    for line in lines:
        match = _ASSIGNMENT.match(line)
        if match:
            arguments = match[4].split("), ")[0]
            ops.append(_Instruction(match[1], match[2], match[3], tuple(_NAME.findall(arguments)), line))
    return ops


def _touched(op: _Instruction, results: Mapping[str, str], parsed: _Computations) -> int:
    if op.kind in _FREE or op.kind.endswith("-done"):
        return 0
    sizes = [_hbm(results.get(name, "")) for name in op.operands]
    written = _hbm(op.result)
    if op.kind in _SLICES:
        return 2 * written
    if op.kind == "dynamic-update-slice":
        return 2 * sizes[1]
    if op.kind in ("copy-start", "slice-start"):
        first = op.result[1:].split("}, ")[0] + "}"
        return _hbm(first) + (sizes[0] if op.kind == "copy-start" else _hbm(first))
    called = _CALLS.search(op.line)
    if op.kind == "fusion" and called:
        uses = [_used(parsed, called[1], number, size) for number, size in enumerate(sizes)]
        in_place = sum(size for size, (_, updates) in zip(sizes, uses, strict=True) if updates)
        used = sum(sum(part) or size for size, part in zip(sizes, uses, strict=True))
        return used + max(written - in_place, 0)
    return sum(sizes) + written


def _used(parsed: _Computations, body: str, number: int, size: int) -> tuple[int, int]:
    """Return how many bytes of an operand a fused HLO computation reads, and how many it updates in place.

    Both are 0 if it passes the operand on.
    """
    if not size:
        return 0, 0
    names = {op.name for op in parsed[body] if op.kind == "parameter" and f" parameter({number})" in op.line}
    results = {op.name: op.result for op in parsed[body]}
    read = updates = 0
    for op in parsed[body]:  # in order: a bitcast comes before its users
        if not names.intersection(op.operands):
            continue
        called = _CALLS.search(op.line)
        if op.kind == "bitcast":
            names.add(op.name)
        elif op.kind in _SLICES:
            read += _hbm(op.result, any_memory=True)
        elif op.kind == "dynamic-update-slice" and op.operands[0] in names:
            updates += _hbm(results[op.operands[1]], any_memory=True)
            names.add(op.name)
        elif op.kind == "fusion" and called:
            for place in (i for i, name in enumerate(op.operands) if name in names):
                inner = _used(parsed, called[1], place, size)
                read, updates = read + inner[0], updates + inner[1]
                names |= {op.name} if inner == (0, 0) else set()
        elif op.kind != "tuple":
            return size, updates
    return min(read, size), updates


def _hbm(result: str, any_memory: bool = False) -> int:
    """Return the HBM bytes of an HLO array type, or of all arrays in a tuple type."""
    total = 0
    for dtype, sizes, layout in _ARRAY.findall(result):
        if any_memory or not re.search(r"S\([1-9]", layout or ""):
            total += round(math.prod(map(int, filter(None, sizes.split(",")))) * width_of(dtype))
    return total
