"""Making the device mesh from one line of config, and the process's place on a pod."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import jax
import msgspec
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from vlmprune_jax.core.errors import SharedError, UserError, reason
from vlmprune_jax.distributed import failure
from vlmprune_jax.distributed.rules import MESH_AXES

# Names for processes that no cluster introduces to each other (flags of the same names win).
VARIABLES = ("VLMPRUNE_COORDINATOR", "VLMPRUNE_NUM_PROCESSES", "VLMPRUNE_PROCESS_ID")
# How long the others of a run wait for a process that died, or that ended with an error while they expect it.
_LOSS: dict[str, Any] = {"heartbeat_timeout_seconds": 60, "shutdown_timeout_seconds": 60}
METADATA_SECONDS = 3.0  # a machine that is not on Google Cloud has no such server


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes of a run, before anything touches a device; alone, do nothing.

    The processes are those that the arguments name (None: the environment's VLMPRUNE_COORDINATOR and its companions),
    or else the workers of the TPU slice that this machine belongs to, when it has several. A second call does nothing.
    From then on they fail together (distributed/failure.py).

    Raises:
      UserError: an incomplete or impossible place among the processes, or the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    place = _named_place(coordinator, num_processes, process_id)
    if place is None and not _slice_has_workers():
        return
    try:
        if place is None:
            jax.distributed.initialize(**_LOSS)
        else:
            jax.distributed.initialize(*place, **_LOSS)
    except (RuntimeError, ValueError) as error:
        where = "the workers of this TPU slice" if place is None else f"process {place[2]} of {place[1]} at {place[0]}"
        raise UserError(f"{where}: could not join the other processes ({reason(error)}): start all of them") from error
    if process_count() > 1:
        failure.watch(jax.process_index(), jax.process_count())


def _named_place(coordinator: str | None, num_processes: int | None, process_id: int | None) -> tuple | None:
    """(host:port, number of processes, own number) from arguments and environment, or None where nothing is named."""
    given = (coordinator, num_processes, process_id)
    values = [os.environ.get(name) if value is None else str(value)
              for name, value in zip(VARIABLES, given, strict=True)]  # fmt: skip
    if not any(values):
        return None
    address, count, number = values
    if not (address and count and number):
        raise UserError(
            "several processes need all of --coordinator=HOST:PORT, --num_processes and --process_id "
            f"(or {', '.join(VARIABLES)}); got {address}, {count}, {number}"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"coordinator {address!r} must be HOST:PORT, the address of process 0")
    if not (count.isdigit() and number.isdigit() and int(number) < int(count)):
        raise UserError(f"process {number} of {count}: process_id must be between 0 and num_processes - 1")
    return address, int(count), int(number)


def _slice_has_workers() -> bool:
    """Whether this machine is one of several workers of a TPU slice.

    GKE says so in the environment, a TPU VM's metadata server in `worker-network-endpoints`. A machine that has libtpu
    only to compile for TPUs has neither.

    Raises:
      UserError: the metadata server answers, but not this question.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if importlib.util.find_spec("libtpu") is None or (platforms and "tpu" not in platforms.split(",")):
        return False
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if os.environ.get("MEGASCALE_COORDINATOR_ADDRESS") or "," in (hosts or ""):
        return True
    if hosts or os.environ.get("TPU_SKIP_MDS_QUERY"):
        return False
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")  # the name that jax uses as well
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
        raise UserError(f"{url}: answers {error.code}, so the workers of this slice are unknown: try again") from error
    except OSError:  # no such server: not on Google Cloud
        return False


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh `(data, fsdp, tensor)` over all devices of all processes, or over `devices`; one size may be -1 (what is
    left).

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes, n_devices = [data, fsdp, tensor], jax.device_count() if devices is None else len(devices)
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
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def process_count() -> int:
    """Number of processes that run together; asking does not start the accelerator where there is one process."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process writes exports, logs and progress; asking does not start the accelerator either."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def on_process_zero(compute: Callable[[], Any], kind: Any = Any) -> Any:
    """Return on every process what `compute` returns on process 0; all processes must call it, in step.

    Files of a workdir are looked at and changed by process 0 alone: others could see them before or after a change.

    Args:
      compute: returns a JSON value, or an instance of `kind`.
      kind: a type that msgspec converts from JSON, as a Struct.

    Raises:
      SharedError: `compute` raised a UserError; every process does.
    """
    if process_count() == 1:
        return compute()
    said: dict[str, Any] = {}
    if is_main_process():
        try:
            said = {"value": compute()}
        except UserError as error:
            said = {"error": str(error)}
        except BaseException as error:  # the others must not wait for an answer that never comes
            _tell({"error": f"process 0 failed ({type(error).__name__}: {error})"})
            raise
    said = _tell(said)
    if "error" in said:
        raise SharedError(said["error"])
    return msgspec.convert(said["value"], kind)


def _tell(said: dict[str, Any]) -> dict[str, Any]:
    """Process 0's value, on every process."""
    raw = np.frombuffer(json.dumps(said, default=msgspec.to_builtins).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(raw.size, np.int32)))
    padded = raw if is_main_process() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())


def from_all(compute: Callable[[], Any]) -> list[Any]:
    """What `compute` returns on each process (any JSON value), in their order, on every process; all must call it.

    Raises:
      SharedError: `compute` raised a UserError on any process; every process does.
    """
    if process_count() == 1:
        return [compute()]
    failure: BaseException | None = None
    try:
        said = {"value": compute()}
    except UserError as error:
        said = {"error": str(error)}
    except BaseException as error:  # the others must not wait for an answer that never comes
        said, failure = {"error": f"process {jax.process_index()} failed ({type(error).__name__}: {error})"}, error
    raw = np.frombuffer(json.dumps(said, default=msgspec.to_builtins).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray(raw.size, np.int32)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: raw.size] = raw
    rows = np.asarray(multihost_utils.process_allgather(padded))
    if failure is not None:
        raise failure
    answers = [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
    for answer in answers:
        if "error" in answer:
            raise SharedError(answer["error"])
    return [answer["value"] for answer in answers]


def gather_to_host(array: jax.Array) -> np.ndarray:
    """An array's values in host memory, on every process; all of them must call it where it is split over them."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context in which computations are laid out on `mesh` (`rules.constrain`); nothing without one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def row_ways(mesh: Mesh | AbstractMesh | None) -> int:
    """Over how many ways the rows of a batch are split: data x fsdp."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
