"""Device mesh of a run, and start of its processes."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from vlmprune_jax.base.chips import chip_of
from vlmprune_jax.base.console import without_output
from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.base.processes import Processes, install, on_process_zero, process_count, process_number
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh import stop
from vlmprune_jax.core.mesh.rules import MESH_AXES, check_divides, dividing_sizes, sharding
from vlmprune_jax.core.sections import MeshSpec

# Environment variables for processes without a cluster (flags have priority).
VARIABLES = ("VLMPRUNE_COORDINATOR", "VLMPRUNE_NUM_PROCESSES", "VLMPRUNE_PROCESS_ID")
# Time that processes wait for another process that died or failed.
_LOSS: dict[str, Any] = {"heartbeat_timeout_seconds": 60, "shutdown_timeout_seconds": 60}
METADATA_SECONDS = 3.0  # outside Google Cloud there is no such server


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connect this process with the run's other processes, before any device is used; do nothing in a single process.

    The arguments (None: the environment variables VLMPRUNE_COORDINATOR etc.) name the processes; by default, they are
    the workers of this machine's TPU slice if it has several. A second call does nothing. Joined processes fail
    together (core/mesh/stop.py). Raises UserError if the arguments are incomplete or invalid, or the other
    processes cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    process = _named_process(coordinator, num_processes, process_id)
    if not process and not _slice_has_workers():
        return
    try:
        jax.distributed.initialize(*process, **_LOSS)
    except (RuntimeError, ValueError) as error:
        worker = "process {2} of {1} at {0}".format(*process) if process else "the workers of this TPU slice"
        raise UserError(f"{worker}: cannot join the other processes ({reason(error)}): start all processes") from error
    if process_count() > 1:
        stop.watch(process_number(), process_count())


def start_devices() -> None:
    """Initialise this machine's accelerator, or its CPU if it has none.

    Raises UserError if JAX_PLATFORMS names a platform that is not available.
    """
    try:
        with without_output():  # libtpu without a TPU prints many lines
            jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts that CUDA is there
        platforms = os.environ.get("JAX_PLATFORMS", "")
        why = str(error) or "no such device, or jax is installed without its plugin"
        raise UserError(
            f"JAX_PLATFORMS={platforms}: jax cannot start this platform ({why}): unset JAX_PLATFORMS, or install "
            "vlmprune-jax[cuda] (with a GPU) or vlmprune-jax[tpu] (on a TPU VM)"
        ) from error


def _named_process(*arguments: str | int | None) -> tuple[Any, ...]:
    """Return (host:port, process count, process number) from arguments or environment variables; () if unset."""
    pairs = zip(VARIABLES, arguments, strict=True)
    address, count, number = (os.environ.get(name) if value is None else str(value) for name, value in pairs)
    if not (address or count or number):
        return ()
    if not (address and count and number):
        raise UserError(
            f"several processes need all three flags (found coordinator {address}, num_processes {count}, "
            f"process_id {number}): set --coordinator=HOST:PORT, --num_processes and --process_id (or the variables "
            f"{', '.join(VARIABLES)})"
        )
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch(r"\d{1,5}", port, re.ASCII):
        raise UserError(f"coordinator {address!r} must be HOST:PORT, the address of process 0")
    if not all(re.fullmatch(r"\d{1,9}", text, re.ASCII) for text in (count, number)) or int(number) >= int(count):
        raise UserError(f"process {number} of {count}: process_id must be between 0 and num_processes - 1")
    return address, int(count), int(number)


def _slice_has_workers() -> bool:
    """Return True if this machine is one of several workers of a TPU slice.

    On GKE the environment tells, on a TPU VM the metadata server's `worker-network-endpoints`. A machine with libtpu
    only for compilation has neither. Raises UserError if the metadata server answers with an error.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if importlib.util.find_spec("libtpu") is None or (platforms and "tpu" not in platforms.split(",")):
        return False
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if os.environ.get("MEGASCALE_COORDINATOR_ADDRESS") or "," in (hosts or ""):
        return True
    if hosts or os.environ.get("TPU_SKIP_MDS_QUERY"):
        return False
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")  # the name that jax also uses
    url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=METADATA_SECONDS) as answer:
            return "," in answer.read().decode()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:  # on Google Cloud, but not on a TPU VM
            return False
        raise UserError(
            f"{url}: HTTP error {error.code}, so the workers of the slice are unknown: try again"
        ) from error
    except OSError:  # not on Google Cloud
        return False


def mesh_of_spec(sizes: MeshSpec) -> Mesh | None:
    """Return a device mesh with these axis sizes; None if all sizes are 1."""
    axes = (sizes.data, sizes.fsdp, sizes.tensor)
    return None if axes == (1, 1, 1) else make_mesh(*axes)


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh with axes `(data, fsdp, tensor)` over `devices`, by default all devices of all processes.

    One size may be -1: the remaining devices. TPU slices that are connected by a network lie along `data`, so that only
    gradients cross the network. Raises UserError if the product of the sizes is not the number of devices, or the
    number of slices does not divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes, n_devices = [data, fsdp, tensor], len(devices)
    requested = f"mesh {dict(zip(MESH_AXES, sizes, strict=True))}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{requested}: sizes must be positive, and at most one may be -1")
    product = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and n_devices % product == 0:
        sizes[sizes.index(-1)] = n_devices // product
        product = n_devices
    if product != n_devices:
        raise UserError(
            f"{requested} needs {product} devices but there are {n_devices}: choose sizes with this product (-1 for "
            "one size: the remaining devices)"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]} must be a multiple of the number of TPU slices ({slices}), because only gradients "
            "should be exchanged between slices"
        )
    # Auto: the compiler propagates shardings from parameters and pinned activations (core/mesh/rules.py)
    kinds = (AxisType.Auto,) * 3
    if slices == 1:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=kinds, devices=devices)
    grid = mesh_utils.create_hybrid_device_mesh((sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices=devices)
    return Mesh(grid, MESH_AXES, axis_types=kinds)


def decoding_mesh(cfg: ModelConfig, mesh: Mesh | None, n_bytes: float, sizes: Sequence[int] = ()) -> Mesh | None:
    """Return the mesh for generation on the devices of `mesh`: each chip permanently holds a shard of the weights.

    An `fsdp` axis would gather all weights for every token. `tensor` is the smallest size with which the weights
    (`n_bytes`) take at most a quarter of a chip's memory, if heads, neurons and vocabulary are divisible by it. Rows
    are split over the other devices. `sizes`: use these (data, fsdp, tensor) instead.

    Raises UserError if the product of `sizes` is not the number of devices, or `sizes` do not divide the model.
    """
    if mesh is None:
        return None
    devices = list(mesh.devices.flat)
    if not sizes:
        chip = chip_of(devices[0].device_kind)
        # the device may be another process's, which has no statistics here
        memory = on_process_zero(_memory_limit) if chip is None else chip.hbm
        share = mesh.size / mesh.shape["data"]  # with unknown memory, a chip keeps at least its share of now
        least = share if memory is None else 4 * n_bytes / memory
        fits = dividing_sizes(cfg, "tensor", mesh.size)
        tensor = next((size for size in fits if size >= least), fits[-1])
        sizes = (mesh.size // tensor, 1, tensor)
    data, fsdp, tensor = sizes
    new_mesh = make_mesh(data, fsdp, tensor, devices)
    check_divides(cfg, new_mesh)
    return new_mesh


def _memory_limit() -> float | None:
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _count() -> int:
    return jax.process_count() if jax.distributed.is_initialized() else 1


def _number() -> int:
    return jax.process_index() if jax.distributed.is_initialized() else 0


def _broadcast(message: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(message), np.int32)))
    padded = np.frombuffer(message.ljust(size)[:size], np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()


def _gather(message: bytes) -> list[bytes]:
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray(len(message), np.int32)))
    rows = multihost_utils.process_allgather(np.frombuffer(message.ljust(lengths.max()), np.uint8))
    return [row[:length].tobytes() for row, length in zip(np.asarray(rows), lengths, strict=True)]


install(Processes(_count, _number, _broadcast, _gather))


def gather_to_host(array: jax.Array) -> np.ndarray:
    """Return an array's values in host memory on every process (collective for sharded arrays)."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Context in which `rules.constrain` shards activations over `mesh`; without effect if `mesh` is None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def mesh_of(params: Any) -> Mesh | None:
    """Return the device mesh over which the parameters are sharded; None for arrays on one device."""
    leaf = jax.tree.leaves(params)[0]
    placed = getattr(leaf, "sharding", None)
    return placed.mesh if isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh) else None


def place_batch(arrays: Mapping[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """Move host arrays to the devices, split along the batch axis if the mesh divides it (else replicated)."""

    def place(array: Any) -> jax.Array:
        if mesh is None:
            return jnp.asarray(array)
        axes = ("batch",) if len(array) % row_ways(mesh) == 0 else (None,)
        array_sharding = sharding(mesh, axes + (None,) * (array.ndim - 1))
        if isinstance(array, np.ndarray):  # device_put would first compare all of it between the processes
            return jax.make_array_from_callback(array.shape, array_sharding, array.__getitem__)
        return jax.device_put(array, array_sharding)

    return jax.tree.map(place, dict(arrays))


def row_ways(mesh: Mesh | AbstractMesh | None) -> int:
    """Return the number of device groups over which batch rows are split: data x fsdp."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def rows_of_process(mesh: Mesh | None, count: int) -> np.ndarray:
    """Return the indices int[local], ascending, of the global batch's `count` rows that this process loads.

    These are the rows of the process's devices in the mesh: all rows if one process controls all devices (Pathways),
    and the same rows for processes that share a row group along `tensor`. Raises UserError if the mesh does not divide
    `count`.
    """
    ways = row_ways(mesh)
    if count < 1 or count % ways:
        raise UserError(f"batch size {count} must be a positive multiple of mesh.data x mesh.fsdp = {ways}")
    if mesh is None:
        return np.arange(count)
    local = set(mesh.local_devices)
    groups = mesh.devices.reshape(ways, -1)
    local_groups = [group for group in range(ways) if not local.isdisjoint(groups[group])]
    return np.arange(count).reshape(ways, -1)[local_groups].ravel()
