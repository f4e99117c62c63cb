"""Resumable training state on disk: trained parameters, optimizer, step, key and data position, saved together."""

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
from typing import Annotated, Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import orbax.checkpoint as ocp

from vlmprune_jax.core.errors import UserError, differences, reason
from vlmprune_jax.core.files import checked, open_file, reading
from vlmprune_jax.distributed.mesh import from_all, on_process_zero
from vlmprune_jax.recovery.step import TrainState

STATE, META = "state", "meta"
_HALF_WRITTEN = ".orbax-checkpoint-tmp"  # what orbax ends the name of a checkpoint with until it is complete
_REMEDY = "remove that folder, and run the same command"


class _Meta(TypedDict):
    """`data`: the data state of every process, see `_gather`; `digest`: of the state, which older versions lack."""

    identity: dict[str, Any]
    data: Annotated[list[str], msgspec.Meta(min_length=1)]
    digest: NotRequired[str]


class Checkpointer:
    """Checkpoints of one run in one folder, written in the background, the newest `keep` of them kept.

    A checkpoint appears by a rename when it is complete: a process that is killed while saving leaves the previous
    one in place. `identity` is everything that has to be the same for a resumed run to be this run. Devices and
    processes are not part of it: arrays are read onto whatever mesh there is now.

    As a context it waits for the save in progress at the end.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int):
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        on_process_zero(lambda: _prepare(folder))
        with reading(folder, _REMEDY):
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            with self._failing():
                self._manager.close()
        else:  # what went wrong first is what the user should read
            with contextlib.suppress(Exception):
                self._manager.close()

    def check(self) -> None:
        """Raise UserError if a save that went on in the background has failed."""
        with self._failing():
            self._manager.check_for_errors()

    def prepare(self, state: TrainState) -> None:
        """Compile what `save` computes, so that no step waits for it."""
        weights_digest(_tree(state))

    def save(self, step: int, state: TrainState, data_state: Any) -> None:
        """Start saving; returns when the arrays are on the host. Data states of all processes go into one file.

        Raises:
          UserError: this save or the one before it cannot be written.
        """
        meta = {"identity": self.identity, "data": _gather(data_state), "digest": weights_digest(_tree(state))}
        args = ocp.args.Composite(
            **{STATE: ocp.args.StandardSave(_tree(state)), META: ocp.args.JsonSave(meta)},
        )
        with self._failing():  # force: orbax would ask on its own whether the machine is taken away
            self._manager.save(step, args=args, force=True)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Whatever orbax and its storage raise, as one line with the folder."""
        try:
            yield
        except Exception as error:
            complete = sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdecimal())
            last = f"the last complete one is of step {complete[-1]}" if complete else "there is no complete one"
            raise UserError(
                f"{self.folder}: cannot save a checkpoint ({_why(error)}); {last}: "
                "make room or mend the disk, and run the same command"
            ) from error

    def restore(self, like: TrainState) -> tuple[TrainState, Any] | None:
        """The newest complete checkpoint and this process's data state, or None in a new folder.

        `like` gives shapes, dtypes and shardings (a state of step 0).

        Raises:
          UserError: the checkpoint is of another run; the message names the fields that differ.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        where = f"{self.folder}/{step}"
        meta = checked(self._read(step, META, ocp.args.JsonRestore()), _Meta, where, _REMEDY)
        differs = differences(meta["identity"], self.identity)
        if differs:
            raise UserError(
                f"{self.folder}/{step} is a checkpoint of another run: {'; '.join(differs[:5])}; "
                "use another workdir, or remove that folder to start again"
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _tree(like))
        tree = self._read(step, STATE, ocp.args.StandardRestore(abstract))
        with reading(where, _REMEDY):
            state = jax.tree.unflatten(jax.tree.structure(like), [tree[name] for name in sorted(tree)])
            if int(state.step) != step:
                raise UserError(f"{where}: holds the state of step {int(state.step)}: {_REMEDY}")
            if "digest" in meta and weights_digest(tree) != meta["digest"]:
                raise UserError(f"{where}: holds other numbers than were saved: {_REMEDY}")
            return state, self._own(step, meta["data"])

    def _own(self, step: int, states: list[str]) -> Any:
        """This process's data state of those that were saved.

        Streams that go through the global batches (`data.batching`) are in the same place on every process, so that
        any number of processes can continue them.
        """
        if len(states) != jax.process_count() and len(set(states)) > 1:
            raise UserError(
                f"{self.folder}/{step} was saved by {len(states)} processes, each in another place of its data: "
                f"continue with {len(states)} processes, not {jax.process_count()}"
            )
        return _decode(states[jax.process_index() if len(states) == jax.process_count() else 0])

    def _read(self, step: int, item: str, args: Any) -> Any:
        with reading(f"{self.folder}/{step}", _REMEDY):
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]


def _prepare(folder: Path) -> None:
    """Make the folder, remove half-written checkpoints, and refuse what orbax would wait for: FIFOs, devices."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*" + _HALF_WRITTEN):
        _discard(path)
    for path in folder.rglob("*"):
        if not path.is_dir():
            open_file(path).close()


def _discard(path: Path, patience_s: float = 10.0) -> None:
    """Remove a half-written checkpoint. A save that failed may still be writing files into it for a moment.

    Raises:
      UserError: it cannot be removed.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            return shutil.rmtree(path)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or time.monotonic() > until:
                raise UserError(f"{path}: cannot be removed ({error.strerror}): {_REMEDY}") from error
        time.sleep(0.1)


def _why(error: Exception) -> str:
    """Why a save failed; tensorstore tells what it was at first, and that the disk is full at the very end."""
    full = (os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    return next((text for text in full if text in str(error)), reason(error))


def _tree(state: TrainState) -> dict[str, jax.Array]:
    """The state's leaves by position: an order that does not depend on how optax nests its tuples."""
    return {f"{i:06d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _gather(data_state: Any) -> list[str]:
    """Every process's data state (bytes, or anything JSON can hold), encoded as one string each."""
    if isinstance(data_state, bytes):
        text = "b" + base64.b64encode(data_state).decode()
    else:
        text = "j" + json.dumps(data_state)
    return from_all(lambda: text)


def _decode(text: str) -> Any:
    return base64.b64decode(text[1:]) if text[0] == "b" else json.loads(text[1:])


@jax.jit
def _digest(leaves: list[jax.Array]) -> list[jax.Array]:
    """uint32[] wrapping sum of each leaf's bits, weighted by position: exact in any order and on any sharding."""
    sums = []
    for leaf in leaves:
        width = jnp.dtype(f"uint{leaf.dtype.itemsize * 8}")
        bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
        for axis in range(bits.ndim):
            place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            bits = bits * (jnp.uint32(2) * place + jnp.uint32(1 + 2 * axis))
        sums.append(jnp.sum(bits, dtype=jnp.uint32))
    return sums


def weights_digest(params: Any) -> str:
    """A short text that changes when any weight does; one pass on the devices."""
    sums = np.asarray(jax.device_get(_digest(jax.tree.leaves(params))), np.uint64)
    mixed = np.uint64(1469598103934665603)
    for value in sums:
        mixed = np.uint64((int(mixed) ^ int(value)) * 1099511628211 % 2**64)
    return f"{int(mixed):016x}"
