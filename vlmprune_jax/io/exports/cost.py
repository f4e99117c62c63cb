"""Costs of exported models in bytes on disk, which depend on the format."""

from __future__ import annotations

import dataclasses

from vlmprune_jax.base.budget import UNEVEN, Budget
from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.weight_files import DTYPES
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.flops import active_params, forward_flops
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune.cost import cache_size
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.disk.tensors import bytes_on_disk
from vlmprune_jax.io.checkpoints.lazy import open_model
from vlmprune_jax.io.checkpoints.read import resolve
from vlmprune_jax.io.exports.folder import MAX_SHARD_BYTES, make_tensors
from vlmprune_jax.io.exports.huggingface import FolderOptions
from vlmprune_jax.io.exports.target import make_target
from vlmprune_jax.io.exports.uneven import padded_stacks


def costs_of(
    cfg: ModelConfig, *, dtype: str, uneven: str, length: int, images: int, image_tokens: int = 0
) -> dict[str, int]:
    """Return a model's costs (parameters, bytes, FLOPs), computed from its layer shapes.

    `active_parameters`: parameters that one token uses. `forward_flops`: see `models.flops.forward_flops`.
    `kv_bytes_per_token`: bytes of the key/value cache per token of a row (less beyond a layer's window). `file_bytes`:
    bytes of the exported weights.
    """
    itemsize, images = DTYPES[dtype].itemsize, images if cfg.vision is not None else 0
    return {
        "active_parameters": active_params(cfg),
        "forward_flops": forward_flops(cfg, length=length, images=images, image_tokens=image_tokens),
        "kv_bytes_per_token": itemsize * cache_size(cfg.text, 1),
        "file_bytes": itemsize * count_params(padded_stacks(cfg) if uneven == "pad" else cfg),
    }


def with_export(budget: Budget) -> Budget:
    """Return the budget with what `disk_bytes` counts: the exported layers, and weights copied from `source_dir`.

    Raises UserError if the folder cannot be read or exported.
    """
    if one_of("budget uneven", budget.uneven, UNEVEN) == "pad":
        budget = dataclasses.replace(budget, exported=padded_stacks)
    if budget.source_dir is None or budget.disk_bytes is None:
        return dataclasses.replace(budget, source_dir=None, vision_dir=None)
    source = resolve(budget.source_dir)
    model = open_model(source, None if budget.vision_dir is None else resolve(budget.vision_dir))
    options = FolderOptions(layout=budget.layout, uneven=budget.uneven, dtype=budget.dtype)
    target = make_target(model.cfg, source, options)
    tensors = make_tensors(model, target, Checkpoint(source), budget.dtype)
    computed = costs_of(model.cfg, dtype=budget.dtype, uneven=budget.uneven, length=1, images=0)["file_bytes"]
    other = bytes_on_disk(tensors, MAX_SHARD_BYTES) - computed
    return dataclasses.replace(budget, other_bytes=other, layout="source", source_dir=None, vision_dir=None)
