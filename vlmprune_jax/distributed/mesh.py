"""Making the device mesh from one line of config, and the process's place on a pod."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh

from vlmprune_jax.distributed.rules import MESH_AXES
from vlmprune_jax.errors import UserError


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh `(data, fsdp, tensor)` over all devices of all processes; one size may be -1 (what is left).

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes, n_devices = [data, fsdp, tensor], jax.device_count()
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {dict(zip(MESH_AXES, sizes, strict=True))}: sizes are positive, and at most one is -1")
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    if -1 in sizes and n_devices % known == 0:
        sizes[sizes.index(-1)] = n_devices // known
        known = n_devices
    if known != n_devices:
        raise UserError(
            f"mesh {dict(zip(MESH_AXES, sizes, strict=True))} needs {known} devices but there are {n_devices}: "
            "their product must be the number of devices (use -1 for one size to fill up)"
        )
    # Auto: the compiler propagates shardings from the parameters and the pinned activations (distributed/rules.py).
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def process_count() -> int:
    """Number of processes that run together; asking does not start the accelerator where there is one process."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process writes exports, logs and progress; asking does not start the accelerator either."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0
