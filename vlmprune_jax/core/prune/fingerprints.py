"""Fingerprints of models, which tie scores and plans to one model."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import layer_runs
from vlmprune_jax.core.mesh.mesh import mesh_of
from vlmprune_jax.core.models.lazy import LazyArray
from vlmprune_jax.core.models.params import Flat, flatten, param_axes, param_shapes
from vlmprune_jax.core.models.vlm import Model

_LAYERS = "/layers/"
SAMPLES = 32  # weights sampled per tensor and layer: 300 tensors give 9,600, for about 40 MB of page reads at 7B
_GOLDEN = 0.6180339887498949  # multiples of the golden ratio spread over a tensor without lining up with its columns


def shape_digest(cfg: ModelConfig) -> str:
    """Return a digest (12 hex digits) of all parameter names and shapes."""
    shapes = param_shapes(cfg)
    layers = {path: [shape[1:]] * shape[0] for path, shape in shapes.items() if _LAYERS in path}
    listed = {path: shape for path, shape in shapes.items() if path not in layers}
    listed |= {path: (len(rows), *rows[0]) for path, rows in _by_neighbours(cfg, layers).items()}
    text = json.dumps(sorted((_digested(path), shape) for path, shape in listed.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(model: Model) -> str:
    """Return a model's fingerprint `shapes-content`: digests of parameter shapes and of weight samples.

    Weight samples are rounded to bfloat16, so that a checkpoint has the same fingerprint in every dtype and sharding
    (float32 sums would depend on both).
    """
    return f"{shape_digest(model.cfg)}-{content_digest(model)}"


def content_digest(model: Model, part: str = "") -> str:
    """Return the digest (16 hex digits) of weight samples from all tensors below a parameter path."""
    flat = {path: leaf for path, leaf in flatten(model.params).items() if path.startswith(part)}
    axes = param_axes(model.cfg)
    stacked = {path: axes[path][0] == "layer" for path in flat}
    sampled = _by_neighbours(model.cfg, _sample(flat, stacked))
    digest = hashlib.sha256()
    for path in sorted(sampled, key=_digested):
        digest.update(_digested(path).encode())
        digest.update(np.ascontiguousarray(sampled[path]).tobytes())
    return digest.hexdigest()[:16]


def _by_neighbours(cfg: ModelConfig, runs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the per-layer entries regrouped by consecutive equal layers, as fingerprints of version 0.1.0 need.

    `runs`: {parameter path: one entry per layer of a run}; the layers of a run need not be consecutive. The result has
    paths that number groups of consecutive equal layers. Parameters outside layers are returned unchanged.
    """
    result = {path: entries for path, entries in runs.items() if _LAYERS not in path}
    for stack, layers in ((name, stack.layers) for name, stack in cfg.stacks.items()):
        runs_of = [(number, run, at) for run, x in enumerate(layer_runs(layers)) for at, number in enumerate(x.numbers)]
        group = 0
        for number, run, at in sorted(runs_of):
            group += number > 0 and layers[number] != layers[number - 1]
            prefix = f"{stack}{_LAYERS}{run}/"
            for path in (path for path in runs if path.startswith(prefix)):
                result.setdefault(f"{stack}{_LAYERS}{group}/{path.removeprefix(prefix)}", []).append(runs[path][at])
    return result


def _digested(path: str) -> str:
    """Return a parameter's name as digests spell it (the vision tower's without its group number)."""
    return re.sub("^vision/layers/0/", "vision/layers/", path)


def _sample(flat: Flat, stacked: dict[str, bool]) -> dict[str, np.ndarray]:
    """Return bfloat16 samples of every parameter, without loading whole tensors from files."""
    sampled, device = dict[str, np.ndarray](), Flat()
    for path, leaf in flat.items():
        if isinstance(leaf, LazyArray):
            sampled[path] = _read_samples(leaf, stacked[path])
        elif isinstance(leaf, np.ndarray) or [x.platform for x in leaf.devices()] == ["cpu"]:  # NumPy reads these
            sampled[path] = np.asarray(leaf)[_indices(leaf.shape, stacked[path])]
        else:
            device[path] = leaf
    sampled = {path: values.astype(ml_dtypes.bfloat16) for path, values in sampled.items()}
    if device:
        mesh = mesh_of(device)
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())

        @functools.partial(jax.jit, out_shardings=everywhere)
        def gather(leaves: Flat) -> Flat:
            return {
                path: leaf[_indices(leaf.shape, stacked[path])].astype(jnp.bfloat16) for path, leaf in leaves.items()
            }

        sampled |= {path: np.asarray(values) for path, values in gather(device).items()}
    return sampled


def _read_samples(leaf: Any, stacked: bool) -> np.ndarray:
    if stacked:
        return np.stack([_read_samples(member, False) for member in leaf.members])
    return leaf.elements(_indices(leaf.shape, stacked=False))


def _indices(shape: tuple[int, ...], stacked: bool) -> tuple[Any, ...]:
    """Return the indices of `SAMPLES` evenly spaced elements in each layer of a stacked tensor."""
    inner = shape[1:] if stacked else shape
    size = int(np.prod(inner))
    flat = (np.modf(np.arange(1, SAMPLES + 1) * _GOLDEN)[0] * size).astype(np.int64)
    positions = np.unravel_index(flat, inner)
    if not stacked:
        return positions
    return (np.arange(shape[0])[:, None], *(p[None, :] for p in positions))
