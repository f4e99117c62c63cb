"""Parameter dictionaries: flat paths, named axes, splitting of stacked layers, and random initialisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from vlmprune_jax.core.config import STACKS, ModelConfig
from vlmprune_jax.core.layer import layer_runs
from vlmprune_jax.core.mesh.rules import sharding
from vlmprune_jax.core.models.vlm import Model, Params, abstract, config_of

Flat = dict[str, Any]


def flatten(params: Params) -> Flat:
    """Flatten a nested parameter dict to paths: `{"text/norm/weight": array, ...}`."""
    return flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Nest a dict of flat parameter paths (undoes `flatten`)."""
    return unflatten_dict(dict(flat), sep="/")


def param_axes(cfg: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return {parameter path: named axes}, as the modules declare them; stacked layers have a leading "layer" axis."""
    return {"/".join(map(str, path)): leaf.get_metadata()["axes"] for path, leaf in nnx.to_flat_state(abstract(cfg)[1])}


def param_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {parameter path: shape} of a model config."""
    return {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(abstract(cfg)[1])).items()}


def abstract_params(cfg: ModelConfig, dtype: str, mesh: Mesh) -> Flat:
    """Return the parameters of a model config as abstract arrays that are split over a mesh."""
    axes = param_axes(cfg)
    return {
        path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding(mesh, axes[path], shape))
        for path, shape in param_shapes(cfg).items()
    }


def place_params(model: Model, mesh: Mesh | None) -> Flat:
    """Move flat params to the mesh or default device; arrays that are already there are not copied."""
    flat = flatten(model.params)
    if mesh is None:
        return {path: jnp.asarray(leaf) for path, leaf in flat.items()}
    axes = param_axes(model.cfg)
    return {path: jax.device_put(leaf, sharding(mesh, axes[path], leaf.shape)) for path, leaf in flat.items()}


def layer_axes(cfg: ModelConfig, stack: str = "text") -> dict[str, tuple[str, ...]]:
    """Return {path within a layer: named axes}, such as `self_attn/q_proj/weight`: ("q_heads", "head", "embed")."""
    prefix = f"{stack}/layers/"
    return {path.split("/", 3)[3]: axes[1:] for path, axes in param_axes(cfg).items() if path.startswith(prefix)}


def count_params(cfg: ModelConfig | Model, part: str = "") -> int:
    """Return the number of parameters of a model or config, optionally of one part ("text", "vision", "projector")."""
    shapes = param_shapes(config_of(cfg))
    return sum(math.prod(shape) for path, shape in shapes.items() if path.startswith(part))


def locate(cfg: ModelConfig, path: str) -> list[tuple[int | None, str, int | None]]:
    """Return (layer, path in `params`, index in the stacked array) of each parameter of a weight table entry.

    `text/layers/{i}/…` -> (layer, `text/layers/<group>/…`, index in the group's stacked array) for every layer. A path
    without `{i}` gives one entry, with None for layer and index.
    """
    stack, _, leaf = path.partition("/layers/{i}/")
    if not leaf:
        return [(None, path, None)]
    return [
        (number, f"{stack}/layers/{run}/{leaf}", index)
        for run, (numbers, _) in enumerate(layer_runs(cfg.stack(stack).layers))
        for index, number in enumerate(numbers)
    ]


def unstack_layers(params: Params, cfg: ModelConfig, stack: str = "text") -> tuple[list[Flat], Params]:
    """Split a stack's stacked parameters into one flat dict per layer; also return the remaining params."""
    layers = dict[int, Flat]()
    for run, (numbers, _) in enumerate(layer_runs(cfg.stack(stack).layers)):
        flat = flatten(params[stack]["layers"][str(run)])
        layers |= {number: {name: leaf[i] for name, leaf in flat.items()} for i, number in enumerate(numbers)}
    rest = {name: leaf for name, leaf in params[stack].items() if name != "layers"}
    return [layers[number] for number in sorted(layers)], {**params, stack: rest}


def stack_layers(layers: Sequence[Flat], rest: Params, cfg: ModelConfig, stack: str = "text") -> Params:
    """Stack per-layer parameter dicts for layers with the shapes in `cfg` (undoes `unstack_layers`)."""
    stacked = {}
    for run, (numbers, _) in enumerate(layer_runs(cfg.stack(stack).layers)):
        members = [layers[number] for number in numbers]
        array_type = type(next(iter(members[0].values())))
        # arrays outside memory (core/models/lazy.py) bring their own
        join = np.stack if issubclass(array_type, np.ndarray) else getattr(array_type, "stack", jnp.stack)
        stacked[str(run)] = unflatten({name: join([layer[name] for layer in members]) for name in members[0]})
    return {**rest, stack: {**rest[stack], "layers": stacked}}


def init_params(cfg: ModelConfig, key: jax.Array, dtype: Any, paths: Sequence[str] | None = None) -> Params:
    """Return randomly initialised parameters: norms 1, biases 0, matrices normal / sqrt(inputs), LoRA as in PEFT.

    `paths` limits the result to these flat paths, with the same values. Branch outputs (o_proj, dense, down_proj,
    out_proj, fc2) are scaled by 1/sqrt(2 layers) as in GPT-2, so that the residual stream of a deep model starts near
    the identity.
    """
    axes, shapes = param_axes(cfg), param_shapes(cfg)
    keys = dict(zip(sorted(shapes), jax.random.split(key, len(shapes)), strict=True))
    return unflatten({path: _init(path, shapes[path], axes[path], cfg, keys[path], dtype) for path in paths or shapes})


def _init(
    path: str, shape: tuple[int, ...], axes: tuple[str, ...], cfg: ModelConfig, key: jax.Array, dtype: Any
) -> jax.Array:
    names = path.split("/")
    stack, (owner, leaf) = names[0], names[-2:]
    if leaf in ("bias", "lora_b"):
        return jnp.zeros(shape, dtype)
    if "norm" in owner:
        offset = cfg.stack(stack).block.norm_offset if stack in STACKS else 0.0
        return jnp.full(shape, 1 - offset, dtype)
    if owner.startswith("layer_scale"):
        return jnp.full(shape, 0.1, dtype)  # InternVLVisionConfig.layer_scale_init_value
    if owner == "embed_tokens":
        # Embeddings of unit length. With the usual standard deviation 0.02, attention outputs drown the embeddings of a
        # small model, which then does not learn to compare a word with its context (text-only easy-VQA, 64 wide: 87 %
        # after 150 steps and flat, against 99.6 % after 250 with unit length).
        return jax.random.normal(key, shape, dtype) * (1 / math.sqrt(shape[-1]))
    if owner == "step":  # the softplus of it: 0.001 to 0.1, states that last (Gu & Dao 2023, arXiv 2312.00752)
        return jax.random.uniform(key, shape, dtype, -7.0, -2.3)
    if owner in ("class_embedding", "position_embedding"):
        return 0.02 * jax.random.normal(key, shape, dtype)
    size = dict(zip(axes, shape, strict=True))
    if leaf == "lora_a":
        fan_in = math.prod(shape[axes.index("rank") + 1 :])
        bound = 1 / math.sqrt(fan_in)  # kaiming-uniform with a = sqrt(5)
        return jax.random.uniform(key, shape, dtype, -bound, bound)
    into = {"patch_embedding": axes[1:], **dict.fromkeys(("o_proj", "dense", "out_proj"), axes[2:])}
    fan_in = math.prod(size[axis] for axis in into.get(owner, axes[-1:]))
    branches = 2 * len(cfg.stack(stack).layers) if owner in ("o_proj", "dense", "down_proj", "out_proj", "fc2") else 1
    return jax.random.normal(key, shape, dtype) * (1 / math.sqrt(fan_in * branches))
