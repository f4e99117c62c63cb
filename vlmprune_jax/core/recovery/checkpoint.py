"""Resumable training state on disk: trained parameters, optimizer, step, random key and data position."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import orbax.checkpoint as ocp

from vlmprune_jax.base.atomic import check_space
from vlmprune_jax.base.errors import UserError, differences, reason
from vlmprune_jax.base.files import checked, open_file, reading
from vlmprune_jax.base.processes import from_all, on_process_zero, process_count, process_number
from vlmprune_jax.core.recovery.program import TrainState

_HALF_WRITTEN = ".orbax-checkpoint-tmp"  # suffix that orbax gives to incomplete checkpoints
_REMEDY = "remove that folder, and run the same command"


class _Meta(TypedDict):
    """Metadata of a training checkpoint: every process's data position (`data`), and a checksum (`digest`)."""

    identity: dict[str, Any]
    data: Annotated[list[str], msgspec.Meta(min_length=1)]
    digest: str


class Checkpointer:
    """Training checkpoints in one folder, written in the background; only the newest `keep` checkpoints remain.

    A complete checkpoint is renamed into place, so a process that is killed while saving leaves the previous
    checkpoint. `identity` holds everything that must be equal for a run to resume. Devices and processes may differ:
    arrays are restored onto the current mesh.

    As a context manager, the object waits at the end for the save in progress.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int):
        self.folder, self.keep = folder, keep
        self.identity = json.loads(json.dumps(identity))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        on_process_zero(lambda: _prepare(folder))
        with reading(folder, _REMEDY):
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # after an error, the user should read that one
        with self._failing() if error is None else contextlib.suppress(Exception):
            self._manager.close()

    def check(self) -> None:
        """Raise UserError if a background save has failed."""
        with self._failing():
            self._manager.check_for_errors()

    def prepare(self, state: TrainState, saves: int) -> None:
        """Compile the computations of `save` in advance, so that no training step waits for compilation.

        Raises UserError if the disk has no room for the checkpoints of `saves` calls: `keep`, and one in progress.
        """
        complete = sum(path.name.isdecimal() for path in self.folder.iterdir())
        needed = min(saves, max(1, self.keep + 1 - complete)) * sum(leaf.nbytes for leaf in _tree(state).values())
        on_process_zero(lambda: check_space(self.folder, needed))
        weights_digest(_tree(state))

    def save(self, step: int, state: TrainState, data_state: Any) -> None:
        """Start saving a checkpoint in the background; return once the arrays are copied to host memory.

        Raises UserError if this save or the previous one cannot be written.
        """
        is_bytes = isinstance(data_state, bytes)
        position = "b" + base64.b64encode(data_state).decode() if is_bytes else "j" + json.dumps(data_state)
        positions = from_all(lambda: position)
        meta = {"identity": self.identity, "data": positions, "digest": weights_digest(_tree(state))}
        args = ocp.args.Composite(state=ocp.args.StandardSave(_tree(state)), meta=ocp.args.JsonSave(meta))
        with self._failing():  # force: otherwise orbax checks for preemption on its own
            self._manager.save(step, args=args, force=True)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Context that converts exceptions of orbax and tensorstore to a one-line UserError naming the folder."""
        try:
            yield
        except Exception as error:
            complete = sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdecimal())
            last = f"last complete checkpoint: step {complete[-1]}" if complete else "no complete checkpoint"
            full = (os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
            why = next((text for text in full if text in str(error)), reason(error))  # tensorstore's texts are long
            raise UserError(
                f"{self.folder}: cannot save a checkpoint ({why}); {last}: "
                "free disk space or repair the disk, and run the same command"
            ) from error

    def restore(self, like: TrainState) -> tuple[TrainState, Any] | None:
        """Return the newest complete checkpoint and this process's data position; None if there is none.

        `like` is the state at step 0, with the shapes, dtypes and shardings to restore. Raises UserError if the
        checkpoint is damaged or belongs to another run; the message lists the fields that differ.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        location = f"{self.folder}/{step}"

        def read(**args: Any) -> Any:
            with reading(location, _REMEDY):
                return self._manager.restore(step, args=ocp.args.Composite(**args))

        meta = checked(read(meta=ocp.args.JsonRestore())["meta"], _Meta, location, _REMEDY)
        differs = differences(meta["identity"], self.identity)
        if differs:
            raise UserError(
                f"{location}: is a checkpoint of a run with other settings ({'; '.join(differs[:5])}): use another "
                "folder, or remove that folder to start again"
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _tree(like))
        tree = read(state=ocp.args.StandardRestore(abstract))["state"]
        with reading(location, _REMEDY):
            state = jax.tree.unflatten(jax.tree.structure(like), [tree[name] for name in sorted(tree)])
            if int(state.step) != step:
                raise UserError(
                    f"{location}: contains training step {int(state.step)}, expected step {step}: {_REMEDY}"
                )
            if weights_digest(tree) != meta["digest"]:
                raise UserError(f"{location}: the arrays differ from the saved ones: {_REMEDY}")
        # Streams over global batches have one position on all processes, so any number of processes continues them.
        positions = meta["data"]
        if len(positions) != process_count() and len(set(positions)) > 1:
            raise UserError(
                f"{location}: was saved by {len(positions)} processes at different positions in their data, but now "
                f"there are {process_count()}: continue with {len(positions)} processes"
            )
        position = positions[process_number() if len(positions) == process_count() else 0]
        with reading(location, _REMEDY):
            return state, base64.b64decode(position[1:]) if position[0] == "b" else json.loads(position[1:])


def _prepare(folder: Path) -> None:
    """Create the checkpoint folder and remove incomplete checkpoints; raise UserError for FIFOs and devices in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*" + _HALF_WRITTEN):
        _discard(path)
    for path in folder.rglob("*"):
        if not path.is_dir():
            open_file(path).close()


def _discard(path: Path) -> None:
    """Remove an incomplete checkpoint, retrying while a failed save still writes files to it."""
    until = time.monotonic() + 10
    while True:
        try:
            return shutil.rmtree(path)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or time.monotonic() > until:
                raise UserError(f"{path}: cannot be removed ({error.strerror}): {_REMEDY}") from error
        time.sleep(0.1)


def _tree(state: TrainState) -> dict[str, jax.Array]:
    """Return the training state as {index: leaf}, independent of how optax nests it."""
    return {f"{i:06d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


@jax.jit
def _digest(leaves: list[jax.Array]) -> list[jax.Array]:
    """Return a checksum uint32[] per array: the wrapping sum of its bits weighted by position."""
    sums = []
    for leaf in leaves:
        width = jnp.dtype(f"uint{leaf.dtype.itemsize * 8}")
        bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
        for axis in range(bits.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            bits = bits * (jnp.uint32(2) * index + jnp.uint32(1 + 2 * axis))
        sums.append(jnp.sum(bits, dtype=jnp.uint32))
    return sums


def weights_digest(params: Any) -> str:
    """Return a fingerprint that changes whenever any weight changes, computed on the devices."""
    sums = np.asarray(jax.device_get(_digest(jax.tree.leaves(params))), np.uint64)
    mixed = np.uint64(1469598103934665603)
    for value in sums:
        mixed = np.uint64((int(mixed) ^ int(value)) * 1099511628211 % 2**64)
    return f"{int(mixed):016x}"
