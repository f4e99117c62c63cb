"""Devices of a model's parameters, and batches that are moved to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import row_ways
from vlmprune_jax.core.mesh.rules import sharding
from vlmprune_jax.core.models.media import repack


def mesh_of(params: Any) -> Mesh | None:
    """Return the device mesh over which the parameters are sharded; None for arrays on one device."""
    leaf = jax.tree.leaves(params)[0]
    placed = getattr(leaf, "sharding", None)
    return placed.mesh if isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh) else None


def packed_rows(batch: int, mesh: Mesh | None) -> int:
    """Return the number of packed rows of images for a batch: one per device group, or 1 if rows do not divide."""
    return row_ways(mesh) if batch % row_ways(mesh) == 0 else 1


def place_inputs(params: Any, cfg: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Move a batch to the model's devices; images of varying size are packed into one row for each device group.

    Images without `input_ids` stay in their packed rows.
    """
    mesh, ids, media = mesh_of(params), arrays.get("input_ids"), arrays.get("media") or {}
    if ids is not None and "vision" in media and media["vision"].grid is not None:
        images = repack(cfg, ids, arrays.get("attention_mask"), media["vision"], packed_rows(len(ids), mesh))
        arrays = {**arrays, "media": {**media, "vision": images}}
    return place_batch(arrays, mesh)


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
