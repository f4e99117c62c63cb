"""Compiling a program for TPUs that this machine has not, and reading off what it will cost there."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.extend.core import Literal

from vlmprune_jax.core.chips import Chip, slice_of
from vlmprune_jax.core.errors import UserError

# libtpu asks the metadata server of Google Cloud where it runs, unless the first three say it; the last lets it load
# beside another one, since this one only compiles and uses no chips.
_ELSEWHERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Slice:
    """A TPU slice to compile for: "v5e:8x8", its generation and its devices."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]


def make_slice(name: str) -> Slice:
    """The slice of that name, without any TPU.

    Raises:
      UserError: unknown generation or impossible topology (with known ones), or libtpu is missing.
    """
    chip, _ = slice_of(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("planning compiles with libtpu, which is not installed: pip install 'vlmprune-jax[tpu]'")
    for variable, value in _ELSEWHERE.items():
        os.environ.setdefault(variable, value)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        sizes = ", ".join(chip.slices)
        reason = str(error).splitlines()[0]
        if "INVALID_ARGUMENT" not in reason:
            raise UserError(f"libtpu, which compiles for {name}, does not start here: {reason}") from error
        raise UserError(f"topology {name!r} does not exist ({reason}): {name.partition(':')[0]} has {sizes}") from error
    return Slice(name, chip, tuple(devices))


@dataclass(frozen=True)
class Compiled:
    """What a compiled program takes, per chip and run: bytes of HBM and of links between chips (`received`, by kind).

    `flops`: executed, all chips together. `seconds`: compiling took.
    """

    arguments: int
    temporaries: int
    received: dict[str, int]
    flops: int
    seconds: float


class DoesNotFit(UserError):
    """The compiler found no way to hold the program in HBM; `needed` and `capacity` in bytes per chip."""

    def __init__(self, needed: int, capacity: int):
        super().__init__(f"needs {needed / 2**30:.2f} GiB of HBM per chip, {(needed - capacity) / 2**30:.2f} too many")
        self.needed, self.capacity = needed, capacity


def compile_for_tpu(program: Any, *arguments: Any) -> Compiled:
    """Compile a jitted function for abstract arguments on a slice's devices.

    Raises:
      DoesNotFit: it does not.
    """
    traced = program.trace(*arguments)
    started = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = _OUT_OF_MEMORY.search(str(error))
        if sizes is None:
            raise
        raise DoesNotFit(*(int(float(size) * _UNITS[unit]) for size, unit in _SIZE.findall(sizes[0]))) from error
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        # outputs beyond the donated arguments are temporary as well
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collective_bytes(compiled.as_text()),
        executed_flops(traced.jaxpr.jaxpr),
        seconds,
    )


# "Used 17.25G of 15.75G hbm", or "... (18.00G) exceeds available HBM (15.75G)"
_OUT_OF_MEMORY = re.compile(
    r"Used [\d.]+[KMG] of [\d.]+[KMG] hbm|\([\d.]+[KMG]\) exceeds available HBM \([\d.]+[KMG]\)"
)
_SIZE = re.compile(r"([\d.]+)([KMG])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def executed_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products in a jaxpr, loops as often as they run, recomputation included.

    Kernels count all their blocks, those that a causal mask lets them skip as well. XLA's own `cost_analysis` counts a
    loop once.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        inner = [executed_flops(one) for value in equation.params.values() for one in _jaxprs(value)]
        if inner:
            total += _times(equation) * (max(inner) if equation.primitive.name == "cond" else sum(inner))
    return total


def _jaxprs(value: Any) -> list[Any]:
    """The jaxprs in a parameter of an equation."""
    values = value if isinstance(value, tuple | list) else (value,)
    opened = [getattr(one, "jaxpr", one) for one in values]
    return [one for one in opened if hasattr(one, "eqns")]


def _times(equation: Any) -> int:
    """How often the inner jaxprs of an equation run."""
    params, name = equation.params, equation.primitive.name
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return params["mesh"].size  # attention is mapped over the whole mesh
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "while":  # at most: the largest number that the condition compares with, as in `_trip_count`
        values = [x.val for one in params["cond_jaxpr"].jaxpr.eqns for x in one.invars if isinstance(x, Literal)]
        return max((int(value) for value in values if np.ndim(value) == 0), default=1)
    return 1


_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(rf"= (.+?) ({'|'.join(_COLLECTIVES)})(-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|calls|to_apply|called_computations|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_SHAPE = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")


def collective_bytes(hlo: str) -> dict[str, int]:
    """Bytes that every chip receives in one run of a compiled program, by kind of collective.

    A collective in a loop counts as often as the loop runs. Rings are assumed: of a result of n bytes over g chips, a
    gather, scatter or exchange receives n (g - 1) / g bytes (a scatter g times that of its smaller result), a
    reduction twice as much, a permutation n.
    """
    computations = _computations(hlo)
    runs = _executions(hlo, computations)
    # The compiler writes one asynchronous collective into several fusions, all with its channel.
    largest: dict[tuple[str, str], int] = defaultdict(int)
    for name, lines in computations.items():
        for number, line in enumerate(lines):
            found = _INSTRUCTION.search(line)
            if found is None:
                continue
            channel = _CHANNEL.search(line)
            key = (found[2], channel[1] if channel else f"{name}/{number}")
            # What starts an all-reduce names its result alone, the others (operands, results, ...).
            result = _second(found[1]) if found[3] and found[2] != "all-reduce" else found[1]
            largest[key] = max(largest[key], runs[name] * _received(found[2], result, line))
    total: dict[str, int] = defaultdict(int)
    for (kind, _), count in largest.items():
        total[kind] += count
    return dict(sorted(total.items()))


def _computations(hlo: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = found[head[1]] = []
        elif line.startswith("  "):
            lines.append(line)
    return found


def _executions(hlo: str, computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs, from the entry down; a while loop runs up to the constant it compares with."""
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, lines in computations.items():
        for line in lines:
            condition = _CONDITION.search(line)
            times = _trip_count(computations[condition[1]]) if condition else 1
            for group in _CALLED.findall(line):
                calls[name] += [(called.strip().lstrip("%"), times) for called in group.split(",")]
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)
    runs: dict[str, int] = defaultdict(int)
    pending = [(entry[1], 1)] if entry else []
    while pending:
        name, times = pending.pop()
        runs[name] += times
        pending += [(called, times * inner) for called, inner in calls[name]]
    return runs


def _trip_count(condition: Sequence[str]) -> int:
    return max((int(number) for line in condition for number in re.findall(r" constant\((\d+)\)", line)), default=1)


def _second(result: str) -> str:
    """The second part of "(first, second, ...)", any of which may be a tuple itself."""
    depth, parts = 0, [""]
    for character in result[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts[1]


def _received(kind: str, result: str, line: str) -> int:
    size = sum(
        math.prod(map(int, filter(None, dims.split(",")))) * _width(dtype) for dtype, dims in _SHAPE.findall(result)
    )
    group = _group_size(line)
    share = (group - 1) / group
    factor = {"all-reduce": 2 * share, "reduce-scatter": share * group, "collective-permute": 1.0}.get(kind, share)
    return round(size * factor)


def _width(dtype: str) -> float:
    """Bytes of a number: "bf16", "f32", "s8", "pred", "f8e4m3fn"."""
    bits = re.match(r"[a-z]+?(\d+)", dtype)
    return int(bits[1]) / 8 if bits else 1


def _group_size(line: str) -> int:
    """Chips that take part together, in any of the three ways in which XLA writes replica groups."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed[1].split(",")) if listed else 2
