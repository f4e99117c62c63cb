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

from vlmprune_jax.core.layer import Stack, layer_runs
from vlmprune_jax.core.mesh.mesh import gather_to_host, mesh_of
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.block import Block
from vlmprune_jax.core.models.context import KEYS, WRITERS, LayerEmbeds
from vlmprune_jax.core.models.lazy import to_device, to_host
from vlmprune_jax.core.models.params import flatten, unflatten
from vlmprune_jax.core.models.stack import at_layer, fill
from vlmprune_jax.core.models.vlm import Model, stack_module

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


class State(NamedTuple):
    """Residual stream of a batch between two layers, and the keys and values that later layers reuse."""

    x: Any
    shared: Shared = MappingProxyType({})


class Rows(NamedTuple):
    """Calibration rows on the devices, at the input of a layer."""

    x: jax.Array
    """Residual stream, float[rows, seq, embed]."""

    weight: jax.Array
    """Weight of every token, float32[rows, seq]."""

    context: Mapping[str, Any]
    """Masks and positions, inputs of `BlockStack.context_of`."""

    embeds: LayerEmbeds
    """Additional embeddings of this layer."""

    shared: Shared
    """Keys and values of earlier layers."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "number"),
    meta_fields=("stack", "cfg", "dtype", "mesh", "shares"),
)
@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a stack: its number, parameters by path (by default in float32), and the model's dtype.

    Layers are pytrees: functions that take one are compiled once for equal layers. `shares`: number of the
    layer for whose keys and values those of this layer can stand (`Stack.supplies`).
    """

    params: dict[str, jax.Array]
    number: int
    stack: str
    cfg: Stack
    dtype: Any
    mesh: Any
    shares: int | None = None

    @classmethod
    def of(cls, model: Model, stack: str, number: int, dtype: Any = jnp.float32) -> Layer:
        """Return layer `number` of a model's decoder or vision tower; the weights may be on the host or in files.

        `dtype`: data type of the layer's parameters in the computation; None = the model's.
        """
        cfg = model.cfg.stack(stack)
        run, (numbers, shape) = next((run, x) for run, x in enumerate(layer_runs(cfg.layers)) if number in x.numbers)
        flat, index = flatten(model.params[stack]["layers"][str(run)]), numbers.index(number)
        if all(isinstance(leaf, jax.Array) for leaf in flat.values()):
            weights = at_layer(flat, index)
        else:
            weights = {path: to_device(leaf, (index,)) for path, leaf in flat.items()}
        stored = next(iter(weights.values())).dtype
        params = {path: leaf.astype(dtype or leaf.dtype) for path, leaf in weights.items()}
        return cls(params, number, stack, cfg.alone(shape), stored, mesh_of(model.params), cfg.supplies(number))

    @classmethod
    def stacked(cls, model: Model, stack: str, numbers: range) -> Layer:
        """Return a run of equal layers as one pytree with a leading layer axis, for `jax.lax.scan`."""
        runs = enumerate(layer_runs(model.cfg.stack(stack).layers))
        params = model.params[stack]["layers"][str(next(index for index, run in runs if numbers[0] in run.numbers))]
        number: Any = jnp.arange(numbers.start, numbers.stop)
        return dataclasses.replace(cls.of(model, stack, numbers[0], None), params=flatten(params), number=number)

    @functools.cached_property
    def block(self) -> Block:
        """NNX module that computes this layer."""
        return fill(stack_module(self.stack, self.cfg).layers["0"], unflatten(self.params))

    def compute(
        self, rows: Rows, capture: tuple[str, ...] = (), prepare: Callable[[Block], None] | None = None
    ) -> tuple[Block, State, dict[str, Any]]:
        """Run the layer inside a compiled function; return (module, state after it, values named in `capture`).

        `prepare`: function that changes the module before the module runs.
        """
        module = stack_module(self.stack, self.cfg)
        block, ctx = fill(module.layers["0"], unflatten(self.params)), module.context_of(rows.x, rows.context)
        if prepare is not None:
            prepare(block)
        deepstack, layer_input = rows.embeds
        names = capture if self.shares is None else (*capture, KEYS)
        after, _, values = block(rows.x, ctx._replace(shared=rows.shared, layer_input=layer_input), None, names)
        shared = {} if self.shares is None else {self.shares: values.pop(KEYS)}
        return block, State(after if deepstack is None else after + deepstack, shared), values

    @functools.partial(jax.jit, static_argnames="capture")
    def run(self, rows: Rows, capture: tuple[str, ...] = ()) -> tuple[State, dict[str, Any]]:
        """Run the layer; return the state after it (stream and shared values), and the values named in `capture`.

        Names in `capture`: those of `models.context.VALUES`, and "statistics", which is {writer whose output is
        normalised: float32[rows, seq, 2]}, see `Norm.statistics`.
        """
        outs = {name: f"{name}_out" for name in WRITERS if "statistics" in capture}
        names = tuple(name for name in capture if name != "statistics")
        block, state, values = self.compute(rows, (*names, *outs.values()))
        captured: dict[str, Any] = {name: values[name] for name in names}
        if outs:
            norms = {name: norm for name in WRITERS if (norm := block.norm_after(name)) is not None}
            captured["statistics"] = {name: norm.statistics(values[outs[name]]) for name, norm in norms.items()}
        return jax.tree.map(lambda x: constrain(x, ("batch", *(None,) * (x.ndim - 1))), (state, captured))

    def with_params(self, params: Mapping[str, Any], dtype: Any = None) -> Layer:
        """Return a copy of the layer with parameters replaced by path, rounded to `dtype` (default: the model's)."""
        new = {path: values.astype(dtype or self.dtype).astype(np.float32) for path, values in params.items()}
        placed = {path: jax.device_put(values, self.params[path].sharding) for path, values in new.items()}
        return dataclasses.replace(self, params={**self.params, **placed})

    def changed(self, change: np.ndarray, module: str) -> Layer:
        """Return a copy of the layer with a least-squares correction added to an output projection.

        If a norm follows the projection, the correction is added at the norm's present statistics.
        """
        path, gain = self.block.writers[module], self.block.gain(module)
        if gain is not None:  # nothing can change a channel that is multiplied by 0
            factors = np.asarray(gather_to_host(gain))
            change = np.divide(change, factors, out=np.zeros_like(change), where=factors != 0)
        updates = {f"{path}/weight": change.T}
        if f"{path}/bias" in self.params:
            updates = {f"{path}/weight": change[:-1].T, f"{path}/bias": change[-1]}
        old = self.params
        return self.with_params({name: old[name] + new.reshape(old[name].shape) for name, new in updates.items()})

    def reading(self, change: np.ndarray, reader: str) -> Layer:
        """Return a copy of the layer whose attention or MLP reads x + D^T x instead of x, for D float32[embed, embed].

        `reader`: the branch, "self_attn" or "mlp"; in a parallel block, both branches read the same input.
        """
        readers = ("self_attn", "mlp") if self.block.parallel else (reader,)
        mapped = {
            path: weight + jnp.einsum("...e,fe->...f", weight, jnp.asarray(change), precision="highest")
            for path, weight in self.params.items()
            if self.block.reader_of(path) in readers and weight.ndim > 1 and weight.shape[-1] == len(change)
        }
        return self.with_params(mapped)

    def changes_from(self, other: Layer) -> dict[str, np.ndarray]:
        """Return the parameters that differ from those of the same layer before it was changed, in its dtype."""
        paths = [path for path, values in self.params.items() if values is not other.params[path]]
        return {path: np.asarray(gather_to_host(self.params[path])).astype(self.dtype) for path in paths}


def with_layers(model: Model, stack: str, changed: Mapping[int, Mapping[str, np.ndarray]]) -> Model:
    """Return the model with some layers' parameters replaced, given as {layer number: {path: array}}."""
    layers = dict(model.params[stack]["layers"])
    for run, (numbers, _) in enumerate(layer_runs(model.cfg.stack(stack).layers)):
        flat = flatten(layers[str(run)])
        # sorted: all processes must place the same array at a time
        for path in sorted({path for number in numbers for path in changed.get(number, ())}):
            leaf, arrays = flat[path], list[np.ndarray]()
            old = np.asarray(gather_to_host(leaf)) if isinstance(leaf, jax.Array) else None
            for index, number in enumerate(numbers):
                new = changed.get(number, {}).get(path)
                if new is None:  # only then read it
                    new = to_host(leaf, (index,)) if old is None else old[index]
                arrays.append(new)
            flat[path] = np.stack(arrays) if old is None else jax.device_put(np.stack(arrays), leaf.sharding)
        layers[str(run)] = unflatten(flat)
    return model.replace(params={**model.params, stack: {**model.params[stack], "layers": layers}})
