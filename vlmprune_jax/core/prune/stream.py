"""Layer-by-layer pass of calibration rows through a model, for all code that measures or repairs layers.

    stream = LayerStream(model, "text", batches)  # embeds

    def visit(layer):  # the stream is at the layer's input
        for batch, result in stream.visit(compute):  # compute(rows at the layer's input)
            ...
        return layer  # or one with other weights, through which the stream advances

    stream.walk(visit)

One layer is on the devices at a time; its weights come from devices, the host or files. Between layers the streams are
on the devices if they are small, otherwise on their hosts (`layers.to_hosts`), with a few batches on the devices. Every
process has the inputs of all rows.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.processes import from_all
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import layer_runs
from vlmprune_jax.core.mesh.machine import free_memory
from vlmprune_jax.core.mesh.mesh import mesh_of, place_batch, row_ways, use_mesh
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import STREAM, LayerEmbeds
from vlmprune_jax.core.models.lazy import LazyArray, to_device
from vlmprune_jax.core.models.media import place_inputs
from vlmprune_jax.core.models.params import flatten, unflatten
from vlmprune_jax.core.models.vlm import Model, to_nnx
from vlmprune_jax.core.prune.batches import CalibrationBatch
from vlmprune_jax.core.prune.layers import Layer, Rows, State, streamed, to_devices

R = TypeVar("R")


class LayerStream:
    """Residual stream of all calibration batches in one model, at the input of layer `number` of a stack.

    Args:
      model: the model; its weights may be on devices, on a mesh, on the host or in files.
      stack: "text", "vision" or an encoder.
      dtype: data type of streams and layers; None = the model's.
      copies: number of such streams that are kept at a time. If a quarter of the free device memory holds them, they
        stay on the devices, otherwise on the hosts. None: on the devices.
    """

    def __init__(
        self,
        model: Model,
        stack: str,
        batches: Sequence[CalibrationBatch],
        *,
        dtype: Any = jnp.float32,
        copies: int | None = 4,
    ):
        self.model, self.stack, self.batches, self.mesh = model, stack, batches, mesh_of(model.params)
        self.number, self.n_layers, self._dtype = 0, len(model.cfg.stack(stack).layers), dtype
        size = 4 * model.cfg.stack(stack).hidden_size * sum(batch.weight.size for batch in batches)
        self._hosts = copies is not None and copies * size // row_ways(self.mesh) > min(
            from_all(lambda: free_memory() // 4)
        )
        self.states, self.embeds = list[State](), list[LayerEmbeds]()  # embeds: one array per remaining layer
        owner, layers = "" if stack == "text" else f"{stack}/", (f"{stack}/layers/", "text/lm_head/")
        params = placed_params(model, lambda path: path.startswith(owner) and not path.startswith(layers))

        def embed(batch: CalibrationBatch) -> tuple[jax.Array, LayerEmbeds]:
            inputs = place_inputs(model.params, model.cfg, batch.inputs)
            return _embed(params, inputs, cfg=model.cfg, stack=stack, dtype=dtype)

        with use_mesh(self.mesh):
            for x, embeds in streamed(embed, batches, hosts=self._hosts):
                self.states.append(State(x, {}))
                self.embeds.append(embeds)

    def load(self, number: int) -> Layer:
        """Load a layer's weights to the devices."""
        return Layer.of(self.model, self.stack, number, self._dtype)

    def scan_groups(self) -> list[int | range]:
        """Return the numbers of all layers for `walk`, with a range for every run of layers that one program can scan.

        These are equal layers in sequence, on the devices, without embeddings of their own or keys for other layers.
        """
        cfg, groups = self.model.cfg.stack(self.stack), list[int | range]()
        leaves = jax.tree.leaves(self.model.params[self.stack]["layers"])
        on_devices = all(isinstance(leaf, jax.Array) for leaf in leaves)
        scans = on_devices and not cfg.producers and not jax.tree.leaves(self.embeds)
        for numbers, _ in layer_runs(cfg.layers):
            run = range(numbers[0], numbers[-1] + 1)
            groups += [run] if scans and len(run) == len(numbers) else numbers
        return sorted(groups, key=lambda group: group if isinstance(group, int) else group.start)

    def at(self, number: int, states: Sequence[State]) -> Self:
        """Return a copy of the stream at the input of another layer, with the hidden states there."""
        other = copy.copy(self)
        other.number, other.states = number, list(states)
        return other

    def embeds_of(self, batch: int) -> LayerEmbeds:
        """Return the additional embeddings of the present layer, for batch number `batch`."""
        return self.embeds[batch].of_layer(self.number)

    def rows(self, batch: int) -> Rows:
        """Return the rows of batch number `batch` at the present layer's input, on the devices or sharded over them."""
        state, calibration = self.states[batch], self.batches[batch]
        weight: Any = place_batch({"weight": calibration.weight}, self.mesh)["weight"]
        x, embeds, shared = jax.tree.map(to_devices, (state.x, self.embeds_of(batch), dict(state.shared)))
        return Rows(x, weight, place_batch(calibration.context, self.mesh), embeds, shared)

    def visit(
        self, compute: Callable[..., R], *targets: Sequence[Any], held_out: bool | None = None
    ) -> Iterator[tuple[CalibrationBatch, R]]:
        """Yield (batch, `compute(rows, *targets of the batch)`) for every batch; results are stored like streams.

        All processes must call this function together.

        Args:
          compute: function of `Rows` and the batch's targets, all on the devices.
          targets: lists with an array or pytree for each batch.
          held_out: True for held-out batches only, False for the other batches only; None for all.
        """
        chosen = [number for number, batch in enumerate(self.batches) if held_out in (None, batch.held_out)]

        def on_devices(batch: int) -> R:
            return compute(self.rows(batch), *jax.tree.map(to_devices, [target[batch] for target in targets]))

        for batch, result in zip(chosen, streamed(on_devices, chosen, hosts=self._hosts), strict=True):
            yield self.batches[batch], result

    def advance(
        self, layer: Layer, compute: Callable[..., tuple[State, R]] | None = None, *targets: Sequence[Any]
    ) -> list[R]:
        """Run a layer on all batches; `compute(rows, *targets)` returns (state after the layer, the batch's result)."""
        results = list[R]()
        for batch, (_, (state, result)) in enumerate(self.visit(compute or layer.run, *targets)):
            self.states[batch] = State(state.x, {**self.states[batch].shared, **state.shared})
            results.append(result)
        self.number += 1
        return results

    def walk(
        self,
        visit: Callable[[Layer], Layer | None] = lambda layer: layer,
        numbers: Iterable[int | range] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Load the layers `numbers`, by default all, call `visit(layer)`, and advance through the layer it returns.

        A visitor that moves the stream itself (also in reverse) returns None. The layers of a range (`scan_groups`) are
        passed together, see `Layer.stacked`. `progress` is called with the number of visits.
        """
        for done, number in enumerate(range(self.n_layers) if numbers is None else numbers, start=1):
            self.number = number if isinstance(number, int) else number.start
            with use_mesh(self.mesh):
                layer = visit(
                    self.load(number) if isinstance(number, int) else Layer.stacked(self.model, self.stack, number)
                )
                if layer is not None:
                    self.advance(layer)
            if progress is not None:
                progress(done)


def on_devices(model: Model) -> Model:
    """Return the model with arrays of host memory on the device; weights in files stay there."""
    params = [leaf if isinstance(leaf, LazyArray) else jnp.asarray(leaf) for leaf in jax.tree.leaves(model.params)]
    return model.replace(params=jax.tree.unflatten(jax.tree.structure(model.params), params))


def placed_params(model: Model, used: Callable[[str], bool]) -> Any:
    """Return the model's parameters with those whose path is `used` on the device.

    Other parameters are replaced by zeros that take no memory, unless they are on devices already.
    """

    def place(path: str, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) or used(path):
            return to_device(leaf)
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # jit drops what a program does not use

    return unflatten({path: place(path, leaf) for path, leaf in flatten(model.params).items()})


@functools.partial(jax.jit, static_argnames=("cfg", "stack", "dtype"))
def _embed(params: Any, inputs: Any, *, cfg: ModelConfig, stack: str, dtype: Any) -> tuple[jax.Array, LayerEmbeds]:
    """Return the input of a stack's first layer, and the additional embeddings of all layers."""
    module, embeds = to_nnx(Model(params, cfg)), LayerEmbeds()
    if stack == "text":
        x, embeds = module.embed(inputs["input_ids"], inputs.get("media"))
    else:
        values = inputs["media"][stack].values.astype(jax.tree.leaves(params[stack])[0].dtype)
        images = inputs["media"][stack]._replace(values=values)
        x = getattr(module, stack).embed(images if stack == "vision" else values.reshape(-1, *values.shape[2:]))
    by_layer = LayerEmbeds(*(None if stacked is None else tuple(stacked) for stacked in embeds))
    return jax.tree.map(lambda array: constrain(array.astype(dtype or array.dtype), STREAM), (x, by_layer))
