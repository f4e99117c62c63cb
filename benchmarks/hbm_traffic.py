"""Bytes that a compiled program reads from and writes to HBM, counted in its text (used by `plan.py --evaluation`)."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.core.models.flops import head_of
from vlmprune_jax.core.models.params import abstract_params
from vlmprune_jax.run.planning import evaluation
from vlmprune_jax.run.planning.ahead_of_time import Compiled, computations_of, loops_of, width_of
from vlmprune_jax.run.workdir.tpu_plan import PlannedEvaluation

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
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


@contextlib.contextmanager
def compiled_programs() -> Iterator[list[Compiled]]:
    """Context that collects the programs that `plan_evaluation` compiles: prefill and decoding of each plan."""
    programs, compile_for_tpu = list[Compiled](), evaluation.compile_for_tpu

    def compile_and_keep(*arguments: Any) -> Compiled:
        programs.append(compile_for_tpu(*arguments))
        return programs[-1]

    evaluation.compile_for_tpu = compile_and_keep
    try:
        yield programs
    finally:
        evaluation.compile_for_tpu = compile_for_tpu


def bytes_per_token(decoding: Compiled) -> float:
    """Return the bytes of HBM that each chip reads and writes to decode one token of every row."""
    return hbm_bytes(decoding.text) / (evaluation.NEW_TOKENS - 1)


def resident_bytes(case: evaluation.EvaluationCase, planned: PlannedEvaluation) -> float:
    """Return the bytes per chip that a decoded token cannot avoid: the weights it needs, and the state of all rows."""
    mesh, text = case.make_mesh(), case.cfg.text
    needed = ("text/layers/", "text/norm", head_of(case.cfg))
    params = abstract_params(case.cfg, case.dtype, mesh)
    weights = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) for path, leaf in params.items() if path.startswith(needed)
    )
    state = sum(layer.mixer.state_bytes(planned.tokens_per_row, case.itemsize) for layer in text.layers)
    return weights * case.itemsize + state / mesh.size * planned.rows


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
        match = _INSTRUCTION.match(line)
        if match:
            arguments = match[4].split("), ")[0]
            ops.append(_Instruction(match[1], match[2], match[3], tuple(_NAME.findall(arguments)), line))
    return ops


def _touched(op: _Instruction, results: Mapping[str, str], parsed: _Computations) -> int:
    if op.kind in _FREE or op.kind.endswith("-done"):
        return 0
    sizes = [_bytes(results.get(name, "")) for name in op.operands]
    written = _bytes(op.result)
    if op.kind in _SLICES:
        return 2 * written
    if op.kind == "dynamic-update-slice":
        return 2 * sizes[1]
    if op.kind in ("copy-start", "slice-start"):
        first = op.result[1:].split("}, ")[0] + "}"
        return _bytes(first) + (sizes[0] if op.kind == "copy-start" else _bytes(first))
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
            read += _bytes(op.result, any_memory=True)
        elif op.kind == "dynamic-update-slice" and op.operands[0] in names:
            updates += _bytes(results[op.operands[1]], any_memory=True)
            names.add(op.name)
        elif op.kind == "fusion" and called:
            for place in (i for i, name in enumerate(op.operands) if name in names):
                inner = _used(parsed, called[1], place, size)
                read, updates = read + inner[0], updates + inner[1]
                names |= {op.name} if inner == (0, 0) else set()
        elif op.kind != "tuple":
            return size, updates
    return min(read, size), updates


def _bytes(result: str, any_memory: bool = False) -> int:
    """Return the HBM bytes of an HLO array type, or of all arrays in a tuple type."""
    total = 0
    for dtype, sizes, layout in _ARRAY.findall(result):
        if any_memory or not re.search(r"S\([1-9]", layout or ""):
            total += round(math.prod(map(int, filter(None, sizes.split(",")))) * width_of(dtype))
    return total
