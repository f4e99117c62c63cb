"""Weights outside memory: what surgery, streams and exports need of an array that is read only when it is needed."""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.layers import at_layer

# First bit patterns (positive, negative) that are infinite or NaN.
_NOT_FINITE = {"float32": (0x7F800000, 0xFF800000), "bfloat16": (0x7F80, 0xFF80), "float16": (0x7C00, 0xFC00)}


class LazyArray(abc.ABC):
    """Array outside memory. Like a NumPy array, it has `shape`, `dtype` and `take`; only `read` and `elements` read."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the array, after the selected indices are applied."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """Data type of the array once it is read."""

    @property
    @abc.abstractmethod
    def location(self) -> str:
        """Name of the array's place for messages, such as "FILE: tensor KEY"."""

    @abc.abstractmethod
    def take(self, indices: np.ndarray, axis: int) -> LazyArray:
        """Select `indices` along one axis without reading the array; allowed once per axis."""

    @abc.abstractmethod
    def read(self) -> np.ndarray:
        """Read the array."""

    @abc.abstractmethod
    def elements(self, positions: tuple[np.ndarray, ...]) -> np.ndarray:
        """Read single elements, given one index array per axis."""

    @staticmethod
    def stack(members: Sequence[LazyArray]) -> LazyStack:
        """Stack arrays along a new first axis, without reading them."""
        return LazyStack(tuple(members))


@dataclass(frozen=True, eq=False)
class LazyStack(LazyArray):
    """One weight of several equal layers (or experts), with a leading axis, none of which is read yet."""

    members: tuple[LazyArray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.members), *self.members[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return self.members[0].dtype

    @property
    def location(self) -> str:
        return self.members[0].location

    def __getitem__(self, index: int) -> LazyArray:
        return self.members[index]

    def take(self, indices: np.ndarray, axis: int) -> LazyStack:
        if axis == 0:
            return LazyStack(tuple(self.members[i] for i in indices))
        return LazyStack(tuple(member.take(indices, axis - 1) for member in self.members))

    def take_each(self, indices: np.ndarray, axis: int) -> LazyStack:
        """Select other indices in each layer (or expert): `indices[i]` along axis `axis - 1` of member i."""
        pairs = zip(self.members, indices, strict=True)
        return LazyStack(tuple(member.take(chosen, axis - 1) for member, chosen in pairs))

    def read(self) -> np.ndarray:
        return np.stack([member.read() for member in self.members])

    def elements(self, positions: tuple[np.ndarray, ...]) -> np.ndarray:
        numbers, *inner = positions
        read = [self.members[n].elements(tuple(p[i : i + 1] for p in inner)) for i, n in enumerate(numbers)]
        return np.concatenate(read)


def lazy_entry(array: Any, index: tuple[int, ...]) -> LazyArray | None:
    """Return the entry of an array outside memory at `index`; None for arrays in memory."""
    for number in index if isinstance(array, LazyStack) else ():
        array = array[number]
    return array if isinstance(array, LazyArray) else None


def to_host(array: Any, index: tuple[int, ...]) -> np.ndarray:
    """Return the entry of an array at `index`, such as (layer,) or (layer, expert), in host memory.

    Collective for sharded arrays.
    """
    stored = lazy_entry(array, index)
    if stored is not None:
        return stored.read()
    if isinstance(array, np.ndarray):
        host: np.ndarray = array[index]
        return host
    if array.is_fully_replicated:
        # On CPU this is a view of the device buffer.
        return np.asarray(array.addressable_data(0))[index]
    part = functools.reduce(at_layer, index, array)
    if not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(part, tiled=True))
    # Assembled by hand: np.asarray(array) would keep a host copy of every weight alive inside the model.
    host = np.empty(part.shape, part.dtype)
    for shard in part.addressable_shards:
        host[shard.index] = np.asarray(shard.data)
    return host


def to_device(array: Any, index: tuple[int, ...] = ()) -> jax.Array:
    """Return the entry of an array at `index`, or the array, on the device; an array outside memory is read first.

    Raises UserError if a weight that is read is not finite.
    """
    stored = lazy_entry(array, index)
    if isinstance(stored, LazyStack):
        return jnp.stack([to_device(member) for member in stored.members])
    if stored is not None:
        host = stored.read()
        check_finite(host, stored.location)
        return jnp.asarray(host)
    return jnp.asarray(array[index] if index else array)


def check_finite(array: np.ndarray, title: str) -> None:
    """Raise a UserError that begins with `title` for weights with infinity or NaN.

    Two maxima over the bit patterns (signed and unsigned) need no temporary array and are much faster than isfinite.
    """
    if array.size == 0:
        return
    positive, negative = _NOT_FINITE[array.dtype.name]
    bits = array.dtype.itemsize * 8
    if array.view(f"int{bits}").max() >= positive or array.view(f"uint{bits}").max() >= negative:
        count = int(np.sum(~np.isfinite(array)))
        raise UserError(f"{title} has {count} NaN or infinite values: check the weights, or use a wider dtype")
