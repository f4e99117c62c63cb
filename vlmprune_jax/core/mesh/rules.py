"""Sharding rules: the mesh axes of every named axis, in one place."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.part import AXES

MESH_AXES = ("data", "fsdp", "tensor")

# Named axis -> mesh axis or axes; prunable axes declare theirs (`Axis.mesh`), and axes that are not listed are
# replicated. Parameters are split over `fsdp` along the residual width and over `tensor` along heads, neurons and
# vocabulary; activations are split along the batch.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "vision": "fsdp",
    "encoder": "fsdp",
    "projector": "tensor",
    "shuffled": "fsdp",
    "extra": "fsdp",
    "rows": "data",  # batch axis of arrays whose channels are split over `fsdp`
}
WHERE_DIVISIBLE = ("extra",)  # axes that are replicated if the mesh does not divide them


def spec(axes: Sequence[str | None], shape: Sequence[int] = (), fsdp: int = 1) -> PartitionSpec:
    """Return the PartitionSpec for named axes; each mesh axis shards only the first named axis that maps to it.

    Axes in `WHERE_DIVISIBLE`, and prunable axes with `Axis.where_divisible`, are sharded only if `fsdp`, the size of
    that mesh axis, divides their size in `shape`. Otherwise, or without `shape`, they are replicated.
    """
    divisible = {axis for axis, size in zip(axes, shape, strict=False) if size % fsdp == 0}
    entries: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for axis in axes:
        prunable = AXES.get(axis or "")
        entry = RULES.get(axis or "") if prunable is None else prunable.mesh or None
        where_divisible = axis in WHERE_DIVISIBLE if prunable is None else prunable.where_divisible
        names = {entry} if isinstance(entry, str) else {*(entry or ())}
        replicated = names & used or (where_divisible and axis not in divisible)
        entries.append(None if replicated else entry)
        used |= set() if replicated else names
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int] = ()) -> NamedSharding:
    """Return the NamedSharding on `mesh` of an array with these named axes."""
    return NamedSharding(mesh, spec(axes, shape, mesh.shape["fsdp"]))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Constrain an activation's sharding inside jit; without a mesh return it unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh.shape["fsdp"]))


def check_divides(cfg: ModelConfig, mesh: Mesh | None) -> None:
    """Raise UserError if a mesh axis size does not divide the model's dimension that it shards."""
    sizes, split = _split_sizes(cfg), {axis: 1 if mesh is None else mesh.shape[axis] for axis in ("tensor", "fsdp")}
    indivisible = [f"{name} = {size}" for name, (axis, size) in sizes.items() if size % split[axis]]
    if mesh is None or not indivisible:
        return
    fits = {axis: dividing_sizes(cfg, axis, split[axis])[-1] for axis in split}
    data = mesh.size // (fits["fsdp"] * fits["tensor"])  # all devices stay in use
    raise UserError(
        f"mesh fsdp={split['fsdp']} tensor={split['tensor']} does not divide {'; '.join(indivisible[:4])}"
        f"{' …' if len(indivisible) > 4 else ''}: use data={data} fsdp={fits['fsdp']} tensor={fits['tensor']} or prune "
        f"to widths that are multiples of tensor={split['tensor']}"
    )


def dividing_sizes(cfg: ModelConfig, axis: str, devices: int) -> list[int]:
    """Return the sizes of a mesh axis, ascending, that divide `devices` and all dimensions that it shards."""
    sizes = [size for sharding_axis, size in _split_sizes(cfg).values() if sharding_axis == axis]
    return [n for n in range(1, devices + 1) if devices % n == 0 and all(size % n == 0 for size in sizes)]


def _split_sizes(cfg: ModelConfig) -> dict[str, tuple[str, int]]:
    """Return {model dimension: (mesh axis that shards it, size of the dimension)}."""
    text = cfg.text
    sizes: dict[str, tuple[str, int]] = {
        "hidden_size": ("fsdp", text.hidden_size),
        "vocab_size": ("tensor", text.vocab_size),
    }
    for name, stack in cfg.stacks.items():
        for i, layer in enumerate(stack.layers):
            for axis in layer.axes:
                if axis.mesh and not axis.where_divisible:
                    apart = axis.parent and AXES[axis.parent].mesh != axis.mesh  # one index per parent in arrays
                    size = layer.sizes[axis.name] // (layer.sizes[axis.parent] if apart else 1)
                    sizes[f"{axis.name} of {name} layer {i}"] = axis.mesh, size
    if cfg.vision is not None:
        sizes |= {
            "vision hidden_size": ("fsdp", cfg.vision.hidden_size),
            "projector width": ("tensor", text.hidden_size),
        }
    return sizes
