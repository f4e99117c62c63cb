"""Compilation of programs for TPUs without having them, and the cost of the compiled programs."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.extend.core import Literal

from vlmprune_jax.base.chips import Chip, slice_of
from vlmprune_jax.base.errors import UserError

# The first three keep libtpu from asking the metadata server of Google Cloud where it runs; the last allows a second
# libtpu in one machine, since this one only compiles.
_ELSEWHERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Slice:
    """TPU slice or slices to compile for: name ("v5e:8x8", or "v5e:8x8:2" for two slices), chip type and devices."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]

    @property
    def count(self) -> int:
        """Number of TPU slices, which are connected by a data-centre network."""
        return len({getattr(device, "slice_index", 0) for device in self.devices})


def make_slice(name: str) -> Slice:
    """Return the TPU slice with this name; no TPU is needed.

    Raises UserError if the generation or topology does not exist (the message lists existing ones), or libtpu is
    missing.
    """
    chip, _ = slice_of(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("plan: libtpu, which compiles for TPUs, is not installed: pip install 'vlmprune-jax[tpu]'")
    for variable, value in _ELSEWHERE.items():
        os.environ.setdefault(variable, value)
    try:
        generation, grid, *slices = name.split(":")
        several = {"num_slices": int(slices[0])} if slices else {}
        devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:{grid}", **several).devices
    except jax.errors.JaxRuntimeError as error:
        sizes = ", ".join(chip.slices)
        reason = str(error).splitlines()[0]
        if "INVALID_ARGUMENT" not in reason:
            raise UserError(
                f"plan: libtpu, which compiles for {name}, does not start on this machine: {reason}"
            ) from error
        raise UserError(
            f"topology {name!r} does not exist ({reason}): use one of {name.partition(':')[0]}: {sizes}"
        ) from error
    return Slice(name, chip, tuple(devices))


@dataclass(frozen=True)
class Compiled:
    """Costs of a compiled program per chip: HBM bytes, and bytes received per collective operation.

    `flops`: executed FLOPs of all chips together. `seconds`: time of the compilation. `text`: the compiled program.
    """

    arguments: int
    temporaries: int
    received: dict[str, int]
    flops: int
    seconds: float
    text: str = field(default="", repr=False)


class DoesNotFit(UserError):
    """Error raised if a program needs more HBM than a chip has; `needed` and `capacity` are bytes per chip."""

    def __init__(self, needed: int, capacity: int):
        super().__init__(
            f"needs {needed / 2**30:.2f} GiB of HBM per chip, {(needed - capacity) / 2**30:.2f} GiB more than it has"
        )
        self.needed, self.capacity = needed, capacity


def compile_for_tpu(program: Any, *arguments: Any) -> Compiled:
    """Compile a jitted function for a TPU slice from abstract arguments, without the hardware.

    Raises:
      DoesNotFit: the program needs more HBM than a chip has.
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
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        memory.argument_size_in_bytes,
        # outputs beyond the donated arguments are temporary as well
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collective_bytes(text),
        executed_flops(traced.jaxpr.jaxpr),
        seconds,
        text,
    )


# "Used 17.25G of 15.75G hbm", or "... (18.00G) exceeds available HBM (15.75G)"
_OUT_OF_MEMORY = re.compile(
    r"Used [\d.]+[KMG] of [\d.]+[KMG] hbm|\([\d.]+[KMG]\) exceeds available HBM \([\d.]+[KMG]\)"
)
_SIZE = re.compile(r"([\d.]+)([KMG])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def executed_flops(jaxpr: Any) -> int:
    """Return the FLOPs of all matrix products in a jaxpr, counting every loop iteration and recomputation.

    All blocks of kernels are counted, even blocks that a causal mask skips. (XLA's `cost_analysis` counts loops once.)
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        inner = [executed_flops(jaxpr) for value in equation.params.values() for jaxpr in _jaxprs(value)]
        if inner:
            total += _times(equation) * (max(inner) if equation.primitive.name == "cond" else sum(inner))
    return total


def _jaxprs(value: Any) -> list[Any]:
    """Return the jaxprs in a parameter of a jaxpr equation (loop bodies, branches, called functions)."""
    values = value if isinstance(value, tuple | list) else (value,)
    jaxprs = [getattr(item, "jaxpr", item) for item in values]
    return [jaxpr for jaxpr in jaxprs if hasattr(jaxpr, "eqns")]


def _times(equation: Any) -> int:
    """Return how often a jaxpr equation runs its inner jaxprs (the length of a scan)."""
    params, name = equation.params, equation.primitive.name
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return params["mesh"].size  # attention is mapped over the whole mesh
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "while":  # upper bound: the largest constant in the condition, as in `_trip_count`
        values = [x.val for inner in params["cond_jaxpr"].jaxpr.eqns for x in inner.invars if isinstance(x, Literal)]
        return max((int(value) for value in values if np.ndim(value) == 0), default=1)
    return 1


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
