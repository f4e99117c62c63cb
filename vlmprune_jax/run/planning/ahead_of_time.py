"""Compilation of programs for TPUs without having them, and the cost of the compiled programs."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
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
    """Costs of a compiled program: HBM bytes per chip, and executed FLOPs of all chips together.

    `seconds`: time of the compilation. `text`: the compiled program.
    """

    arguments: int
    temporaries: int
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
    memory = compiled.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        # outputs beyond the donated arguments are temporary as well
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        executed_flops(traced.jaxpr.jaxpr),
        seconds,
        compiled.as_text(),
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
    if name == "while":  # upper bound: the largest constant in the condition
        values = [x.val for inner in params["cond_jaxpr"].jaxpr.eqns for x in inner.invars if isinstance(x, Literal)]
        return max((int(value) for value in values if np.ndim(value) == 0), default=1)
    return 1
