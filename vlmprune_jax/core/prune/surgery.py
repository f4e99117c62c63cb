"""Application of a plan: pure indexing along the named axes that each weight declares."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import mesh_of
from vlmprune_jax.core.mesh.rules import check_divides, sharding
from vlmprune_jax.core.models.lazy import LazyStack
from vlmprune_jax.core.models.params import flatten, layer_axes, param_axes, stack_layers, unflatten, unstack_layers
from vlmprune_jax.core.models.vlm import Model, Params
from vlmprune_jax.core.part import AXES, VOCAB
from vlmprune_jax.core.plans.kept import KeptLayer, KeptVocabulary
from vlmprune_jax.core.plans.plan import PrunePlan, compose
from vlmprune_jax.core.prune.fingerprints import fingerprint


def apply_plan(model: Model, plan: PrunePlan) -> Model:
    """Apply a prune plan: return the pruned model, leaving the input model unchanged.

    The model may have host or device arrays, or arrays outside memory (core/models/lazy.py). On a mesh, every
    parameter keeps its named-axis sharding. Raises UserError if the plan is for another model, or the mesh does not
    divide the remaining widths.
    """
    check_plan_is_for(model, plan)
    cfg, mesh = plan.apply_to(model.cfg), mesh_of(model.params)
    check_divides(cfg, mesh)
    params = model.params
    for name, stack in plan.stacks.items():
        params = _take(params, model.cfg, "depth", stack.kept_layers, f"{name}/")
        layers = params[name]["layers"]
        cut = functools.partial(_cut, name, stack.layers, model.cfg, cfg, mesh)
        on_device = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(layers))
        layers = jax.jit(cut)(layers) if on_device else cut(layers)  # one program, not one per layer and weight
        params = params | {name: params[name] | {"layers": layers}}
    if plan.vocabulary is not None:
        params = _take(params, cfg, VOCAB, plan.vocabulary.kept)
    return model.replace(params=_place(params, cfg, mesh), cfg=cfg, plan=plan_since_loading(model, plan))


def plan_since_loading(model: Model, plan: PrunePlan) -> PrunePlan:
    """Return a plan for the model combined with the plans that were applied to it before."""
    return plan if model.plan is None else compose(model.plan, plan)


def trim_vocabulary(model: Model, vocabulary: KeptVocabulary | None) -> Model:
    """Return the model with only the kept tokens; an already trimmed model is returned unchanged.

    The trimmed model's probabilities are those of the whole model, renormalised over the kept tokens. Such a model is
    the teacher of a trimmed student.
    """
    if vocabulary is None or model.cfg.text.vocab_size == len(vocabulary.kept):
        return model
    cfg, mesh = vocabulary.apply_to(model.cfg), mesh_of(model.params)
    check_divides(cfg, mesh)
    params = _take(model.params, cfg, VOCAB, vocabulary.kept)
    return model.replace(params=_place(params, cfg, mesh), cfg=cfg)


def check_plan_is_for(model: Model, plan: PrunePlan) -> None:
    """Raise UserError if a plan was made for another model (compares sizes, then weight samples)."""
    plan.check_sizes(model.cfg)
    actual = fingerprint(model)
    if plan.fingerprint != actual:
        raise UserError(
            f"plan of another model: sizes are equal, but fingerprints differ (plan {plan.fingerprint}, model "
            f"{actual}): score and plan this model"
        )


def _cut(name: str, kept: Sequence[KeptLayer], old: ModelConfig, cfg: ModelConfig, mesh: Any, runs: Params) -> Params:
    """Return the runs of equal layers of a stack after its plan, on a mesh with the sharding of their axes."""
    axes = layer_axes(old, name)
    layers, _ = unstack_layers({name: {"layers": runs}}, old, name)
    cut = [{path: keep_indices(x, axes[path], layer) for path, x in layers[layer.index].items()} for layer in kept]
    return _place(stack_layers(cut, {name: {}}, cfg, name), cfg, mesh)[name]["layers"]


def keep_indices(leaf: Any, axes: tuple[str, ...], layer: KeptLayer) -> Any:
    """Return one layer's parameter restricted to the kept units.

    A tensor that is kept completely is returned unchanged, without a copy.
    """
    for position, axis in enumerate(axes):
        indices = layer.kept.get(axis)
        parents = layer.kept.get(AXES[axis].parent) if axis in AXES and AXES[axis].parent in axes[:position] else None
        if indices is None or len(indices) == leaf.shape[position] * (1 if parents is None else len(parents)):
            continue
        if parents is None:
            leaf = leaf.take(np.asarray(indices), axis=position)
        else:  # of every parent its own, and the parents were taken before
            own = np.reshape(indices, (len(parents), -1)) % leaf.shape[position]
            leaf = _take_each(leaf, own, position)
    return leaf


def _take_each(leaf: Any, indices: np.ndarray, axis: int) -> Any:
    """Select units along an axis separately for each parent: entry i of the array [parents, ...] keeps `indices[i]`."""
    if isinstance(leaf, LazyStack):
        return leaf.take_each(indices, axis)
    shape = [1] * leaf.ndim
    shape[0], shape[axis] = indices.shape
    take = np.take_along_axis if isinstance(leaf, np.ndarray) else jnp.take_along_axis
    return take(leaf, indices.reshape(shape), axis=axis)


def _take(params: Params, cfg: ModelConfig, axis: str, indices: Sequence[int], below: str = "") -> Params:
    """Select indices along an axis of the model (layers, tokens) in all parameters below a path that have this axis."""
    flat, axes = flatten(params), param_axes(cfg)
    for path, leaf in flat.items():
        names = axes[path] if path.startswith(below) else ()
        if axis in names and len(indices) < leaf.shape[names.index(axis)]:
            flat[path] = leaf.take(np.asarray(indices), axis=names.index(axis))
    return unflatten(flat)


def _place(params: Params, cfg: ModelConfig, mesh: Mesh | None) -> Params:
    if mesh is None:
        return params
    axes = param_axes(cfg)
    placed = {path: jax.device_put(x, sharding(mesh, axes[path], x.shape)) for path, x in flatten(params).items()}
    return unflatten(placed)
