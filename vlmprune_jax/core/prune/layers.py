"""Computation of one layer of a stack at a time, in float32, with its original or with changed weights.

Between layers the streams are in the memory of the hosts of their devices, each host with its devices' rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.core.layer import layer_runs
from vlmprune_jax.core.mesh.mesh import gather_to_host
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.block import Block
from vlmprune_jax.core.models.context import KEYS, WRITERS, LayerEmbeds
from vlmprune_jax.core.models.lazy import to_device, to_host
from vlmprune_jax.core.models.params import flatten, unflatten
from vlmprune_jax.core.models.placement import mesh_of, place_batch
from vlmprune_jax.core.models.stack import fill
from vlmprune_jax.core.models.vlm import Model, stack_module
from vlmprune_jax.core.stack import Stack

Shared = Mapping[int, tuple[Any, Any]]  # number of a layer -> its keys and values, for layers that reuse them
T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 2  # results that are on the devices at a time, besides the one that is computed


def streamed(compute: Callable[[T], R], items: Iterable[T], *, hosts: bool = True) -> Iterator[R]:
    """Yield `compute(item)` for every item, with its arrays moved to host memory unless `hosts` is False.

    Copies overlap with the computation of the following items. Only a few items are in progress at once, because on a
    mesh of virtual devices a long queue of collectives can starve. All processes must call this function together.
    """
    pending = deque[R]()
    for item in items:
        result = compute(item)
        pending.append(jax.tree.map(to_hosts, result) if hosts else result)
        if len(pending) > _AHEAD:
            yield jax.block_until_ready(pending.popleft())
    while pending:
        yield jax.block_until_ready(pending.popleft())


def to_hosts(x: jax.Array) -> jax.Array:
    """Start copying an array to host memory and return the copy; on CPUs return the array unchanged."""
    if jax.default_backend() == "cpu":
        return x
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))


def to_devices(x: Any) -> jax.Array:
    """Move an array back to device memory (undoes `to_hosts`); NumPy arrays go to the default device."""
    if not isinstance(x, jax.Array):
        return jnp.asarray(x)
    return jax.device_put(x, x.sharding.with_memory_kind("device"))


class Given(NamedTuple):
    """Inputs of a layer besides the residual stream: masks, positions, DeepStack additions, reused keys and values.

    `arrays`: inputs of `BlockStack.context_of`. `embeds`: additional embeddings. `shared`: keys and values of earlier
    layers.
    """

    arrays: Mapping[str, Any]
    embeds: LayerEmbeds = LayerEmbeds()
    shared: Shared = MappingProxyType({})

    def placed(self, mesh: Mesh | None) -> Given:
        """Return a copy of the layer's inputs on the device, or sharded over a mesh."""
        return Given(place_batch(self.arrays, mesh), *jax.tree.map(to_devices, (self.embeds, dict(self.shared))))


class Rows(NamedTuple):
    """Calibration rows on the devices: residual stream at the input of a layer, token weights and other inputs."""

    x: jax.Array
    """Residual stream, float[rows, seq, embed]."""

    weight: jax.Array
    """Weight of every token, float32[rows, seq]."""

    given: Given
    """Inputs of the layer besides the residual stream."""


class State(NamedTuple):
    """Residual stream of a batch between two layers, and the keys and values that later layers reuse."""

    x: Any
    shared: Shared = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a stack: original number, parameters by path (by default in float32), and the model's dtype.

    `shares`: number of the layer for whose keys and values those of this layer can stand (`Stack.supplies`).
    """

    number: int
    stack: str
    params: dict[str, jax.Array]
    cfg: Stack
    dtype: Any
    mesh: Any
    shares: int | None = None
    changed_paths: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Model, stack: str, number: int, dtype: Any = jnp.float32) -> Layer:
        """Return layer `number` of a model's decoder or vision tower; the weights may be on the host or in files.

        `dtype`: data type of the layer's parameters in the computation; None = the model's.
        """
        cfg = model.cfg.stack(stack)
        run, (numbers, shape) = next((run, x) for run, x in enumerate(layer_runs(cfg.layers)) if number in x.numbers)
        flat = flatten(model.params[stack]["layers"][str(run)])
        weights = {path: to_device(leaf, numbers.index(number)) for path, leaf in flat.items()}
        stored = next(iter(weights.values())).dtype
        params = {path: leaf.astype(dtype or leaf.dtype) for path, leaf in weights.items()}
        return cls(number, stack, params, cfg.alone(shape), stored, mesh_of(model.params), cfg.supplies(number))

    @functools.cached_property
    def block(self) -> Block:
        """NNX module that computes this layer."""
        return fill(stack_module(self.stack, self.cfg).layers["0"], unflatten(self.params))

    def run(self, rows: Rows, capture: tuple[str, ...] = ()) -> tuple[State, dict[str, Any]]:
        """Run the layer; return the state after it (stream and shared values), and the values named in `capture`.

        Names in `capture`: those of `models.context.VALUES`, and "statistics", which is {writer whose output is
        normalised: float32[rows, seq, 2]}, see `Norm.statistics`.
        """
        sizes = {"stack": self.stack, "cfg": self.cfg, "shares": self.shares, "capture": capture}
        return _run(self.params, rows.x, rows.given, **sizes)

    def changed(self, module: str, change: np.ndarray) -> Layer:
        """Return a copy of the layer with a least-squares correction added to an output projection.

        If a norm follows the projection, the correction is added at the norm's present statistics.
        """
        path, params, gain = self.block.writers[module].projection, dict(self.params), self.block.gain(module)
        if gain is not None:  # nothing can change a channel that is multiplied by 0
            factors = np.asarray(gather_to_host(gain))
            change = np.divide(change, factors, out=np.zeros_like(change), where=factors != 0)
        updates = {"weight": change.T}
        if f"{path}/bias" in params:
            updates = {"weight": change[:-1].T, "bias": change[-1]}
        for name, update in updates.items():
            old = params[f"{path}/{name}"]
            new = (old + update.reshape(old.shape)).astype(self.dtype).astype(jnp.float32)
            params[f"{path}/{name}"] = jax.device_put(new, old.sharding)
        paths = (*self.changed_paths, *(f"{path}/{name}" for name in updates))
        return dataclasses.replace(self, params=params, changed_paths=paths)

    def reading(self, reader: str, change: np.ndarray) -> Layer:
        """Return a copy of the layer whose attention or MLP reads x + D^T x instead of x, for D float32[embed, embed].

        `reader`: the branch, "self_attn" or "mlp"; in a parallel block, both branches read the same input.
        """
        readers = ("self_attn", "mlp") if self.block.parallel else (reader,)
        params, paths, embed = dict(self.params), list[str](), change.shape[0]
        for path, old in self.params.items():
            if self.block.reader_of(path) in readers and old.ndim > 1 and old.shape[-1] == embed:
                new = old + jnp.einsum("...e,fe->...f", old, jnp.asarray(change), precision="highest")
                params[path] = jax.device_put(new.astype(self.dtype).astype(jnp.float32), old.sharding)
                paths.append(path)
        return dataclasses.replace(self, params=params, changed_paths=(*self.changed_paths, *paths))

    @property
    def written(self) -> dict[str, np.ndarray]:
        """Parameters that reconstruction has changed, {path: array in the model's dtype}."""
        return {path: np.asarray(gather_to_host(self.params[path])).astype(self.dtype) for path in self.changed_paths}


def run_block(
    stack: str,
    cfg: Stack,
    params: Mapping[str, jax.Array],
    x: jax.Array,
    given: Given,
    capture: tuple[str, ...],
    prepare: Callable[[Block], None] | None = None,
) -> tuple[Block, jax.Array, dict[str, jax.Array]]:
    """Run one layer; return (module, residual stream after it, intermediate values named in `capture`).

    `prepare`: function that changes the module before the module runs.
    """
    module = stack_module(stack, cfg)
    block, ctx = fill(module.layers["0"], unflatten(params)), module.context_of(x, given.arrays)
    if prepare is not None:
        prepare(block)
    deepstack, layer_input = given.embeds
    after, _, values = block(x, ctx._replace(shared=given.shared, layer_input=layer_input), None, capture)
    return block, after if deepstack is None else after + deepstack, values


@functools.partial(jax.jit, static_argnames=("stack", "cfg", "shares", "capture"))
def _run(
    params: Any, x: jax.Array, given: Given, *, stack: str, cfg: Stack, shares: int | None, capture: tuple[str, ...]
) -> tuple[State, dict[str, Any]]:
    outs = {name: f"{name}_out" for name in WRITERS if "statistics" in capture}
    names = (*(name for name in capture if name != "statistics"), *outs.values(), *(() if shares is None else (KEYS,)))
    block, after, values = run_block(stack, cfg, params, x, given, names)
    captured: dict[str, Any] = {name: values[name] for name in capture if name != "statistics"}
    if outs:
        norms = {name: norm for name in WRITERS if (norm := block.norm_after(name)) is not None}
        captured["statistics"] = {name: norm.statistics(values[outs[name]]) for name, norm in norms.items()}
    keys: dict[int, Any] = {} if shares is None else {shares: values[KEYS]}
    result = State(after, keys), captured
    return jax.tree.map(lambda leaf: constrain(leaf, ("batch", *(None,) * (leaf.ndim - 1))), result)


def with_layers(model: Model, stack: str, changed: Mapping[int, Mapping[str, np.ndarray]]) -> Model:
    """Return the model with some layers' parameters replaced, given as {layer number: {path: array}}."""
    layers = dict(model.params[stack]["layers"])
    for run, (numbers, _) in enumerate(layer_runs(model.cfg.stack(stack).layers)):
        flat = flatten(layers[str(run)])
        # sorted: all processes must place the same array at a time
        for path in sorted({path for number in numbers for path in changed.get(number, ())}):
            leaf, arrays = flat[path], list[np.ndarray]()
            old = np.asarray(gather_to_host(leaf)) if isinstance(leaf, jax.Array) else None
            for at, number in enumerate(numbers):
                new = changed.get(number, {}).get(path)
                if new is None:  # only then read it
                    new = to_host(leaf, at) if old is None else old[at]
                arrays.append(new)
            flat[path] = np.stack(arrays) if old is None else jax.device_put(np.stack(arrays), leaf.sharding)
        layers[str(run)] = unflatten(flat)
    return model.replace(params={**model.params, stack: {**model.params[stack], "layers": layers}})
