"""Resumable training state on disk: trained parameters, optimizer, step, key and data position, saved together."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from vlmprune_jax.distributed.mesh import from_all
from vlmprune_jax.errors import UserError
from vlmprune_jax.recover.step import TrainState

STATE, META = "state", "meta"


class Checkpointer:
    """Checkpoints of one run in one folder, written in the background, the newest `keep` of them kept.

    A checkpoint appears by a rename when it is complete: a process that is killed while saving leaves the previous
    one in place. `identity` is everything that has to be the same for a resumed run to be this run.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int):
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: TrainState, data_state: Any) -> None:
        """Start saving; returns when the arrays are on the host. Data states of all processes go into one file."""
        meta = {"identity": self.identity, "data": _gather(data_state)}
        args = ocp.args.Composite(
            **{STATE: ocp.args.StandardSave(_tree(state)), META: ocp.args.JsonSave(meta)},
        )
        self._manager.save(step, args=args, force=True)

    def restore(self, like: TrainState) -> tuple[TrainState, Any] | None:
        """The newest complete checkpoint and this process's data state, or None in a new folder.

        `like` gives shapes, dtypes and shardings (a state of step 0).

        Raises:
          UserError: the checkpoint is of another run; the message names the fields that differ.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        meta = self._read(step, META, ocp.args.JsonRestore())
        differs = differences(meta["identity"], self.identity)
        if differs:
            raise UserError(
                f"{self.folder}/{step} is a checkpoint of another run: {'; '.join(differs[:5])}; "
                "use another workdir, or remove that folder to start again"
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _tree(like))
        tree = self._read(step, STATE, ocp.args.StandardRestore(abstract))
        leaves = [tree[name] for name in sorted(tree)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), _decode(meta["data"][jax.process_index()])

    def _read(self, step: int, item: str, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            where = f"{self.folder}/{step}"
            raise UserError(f"{where}: cannot read the checkpoint ({reason}); remove that folder") from error

    def close(self) -> None:
        """Wait for the save in progress and stop the background threads."""
        self._manager.close()


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


def differences(saved: Any, now: Any, name: str = "") -> list[str]:
    """`field: saved -> now` for every leaf in which two JSON values differ."""
    if isinstance(saved, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*saved, *now}):
            found += differences(saved.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if saved == now else [f"{name} was {_short(saved)}, now {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
