"""Layer-by-layer pass of calibration rows through a model, for all code that measures or repairs layers.

    stream = LayerStream(model, "text", batches)  # embeds
    for number in range(stream.n_layers):
        layer = stream.layer(number)  # loads
        for batch, result in stream.visit(compute, number):  # visits: compute(rows at the layer's input)
            ...
        stream.advance(layer, number)  # carries on, here or with other weights

One layer is on the devices at a time; its weights come from devices, the host or files. Between layers the streams are
on the devices if they are small, otherwise on their hosts (`layers.to_hosts`), with a few batches on the devices. Every
process has the inputs of all rows.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.processes import from_all
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.machine import free_memory
from vlmprune_jax.core.mesh.mesh import row_ways
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import STREAM, LayerEmbeds
from vlmprune_jax.core.models.inputs import images_of
from vlmprune_jax.core.models.lazy import to_device
from vlmprune_jax.core.models.params import flatten, unflatten
from vlmprune_jax.core.models.placement import mesh_of, place_batch, place_inputs
from vlmprune_jax.core.models.vlm import Model, to_nnx
from vlmprune_jax.core.prune.batches import CalibrationBatch
from vlmprune_jax.core.prune.layers import Given, Layer, Rows, State, streamed, to_devices

R = TypeVar("R")


class LayerStream:
    """Residual stream of all calibration batches in one model, at the input of one of its layers.

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
        self._dtype, params, width = dtype, _entrance(model, stack), model.cfg.stack(stack).hidden_size
        size = 4 * width * sum(batch.weight.size for batch in batches) // row_ways(self.mesh)
        self._hosts = copies is not None and copies * size > min(from_all(lambda: free_memory() // 4))
        self.states, self.embeds = list[State](), list[LayerEmbeds]()  # embeds: one array per remaining layer

        def embed(batch: CalibrationBatch) -> tuple[jax.Array, LayerEmbeds]:
            return _embed(
                params, place_inputs(model.params, model.cfg, batch.inputs), cfg=model.cfg, stack=stack, dtype=dtype
            )

        for x, embeds in streamed(embed, batches, hosts=self._hosts):
            self.states.append(State(x, {}))
            self.embeds.append(embeds)

    @property
    def n_layers(self) -> int:
        """Number of layers of the stack."""
        return len(self.model.cfg.stack(self.stack).layers)

    def layer(self, number: int) -> Layer:
        """Load a layer's weights to the devices."""
        return Layer.of(self.model, self.stack, number, self._dtype)

    def at(self, states: Sequence[State]) -> LayerStream:
        """Return a copy of the stream with other hidden states of the same batches, for example at another layer."""
        other = copy.copy(self)
        other.states = list(states)
        return other

    def given(self, at: int, place: int) -> Given:
        """Return the inputs of a layer besides the residual stream (masks, rotary tables), for batch number `at`."""
        return Given(self.batches[at].context, self.embeds[at].of_layer(place), self.states[at].shared)

    def visit(
        self, compute: Callable[..., R], place: int, *targets: Sequence[Any], held_out: bool | None = None
    ) -> Iterator[tuple[CalibrationBatch, R]]:
        """Yield (batch, `compute(rows, *targets of the batch)`) for every batch; results are stored like streams.

        All processes must call this function together.

        Args:
          compute: function of `Rows` and the batch's targets, all on the devices.
          place: number of the layer that reads the stream, among the remaining layers.
          targets: lists with an array or pytree for each batch.
          held_out: True for held-out batches only, False for the other batches only; None for all.
        """
        numbers = [at for at, batch in enumerate(self.batches) if held_out in (None, batch.held_out)]

        def on_devices(at: int) -> R:
            placed: dict[str, Any] = place_batch({"weight": self.batches[at].weight}, self.mesh)
            x, values = jax.tree.map(to_devices, (self.states[at].x, [target[at] for target in targets]))
            return compute(Rows(x, given=self.given(at, place).placed(self.mesh), **placed), *values)

        for at, result in zip(numbers, streamed(on_devices, numbers, hosts=self._hosts), strict=True):
            yield self.batches[at], result

    def advance(self, layer: Layer, place: int, capture: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """Run a layer on all batches; return, for each batch, the intermediate values named in `capture`."""
        captured = list[dict[str, Any]]()
        for at, (_, (state, values)) in enumerate(self.visit(lambda rows: layer.run(rows, capture), place)):
            self.states[at] = State(state.x, {**self.states[at].shared, **state.shared})
            captured.append(values)
        return captured


def walk(
    stream: LayerStream, visit: Callable[[Layer, LayerStream], Layer], progress: Callable[[int], None] | None
) -> None:
    """Call `visit(layer, stream at its input)` for all layers in order, and run the layer that it returns.

    `progress` is called with the number of finished layers.
    """
    for number in range(stream.n_layers):
        layer = visit(stream.layer(number), stream)
        if number + 1 < stream.n_layers:
            stream.advance(layer, number)
        if progress is not None:
            progress(number + 1)


def _entrance(model: Model, stack: str) -> Any:
    """Return the model's parameters with those that embed a stack's inputs on the device.

    Other parameters are replaced by zeros that take no memory, unless they are on devices already.
    """

    def place(path: str, leaf: Any) -> Any:
        used = path.startswith(f"{stack}/") or stack == "text"
        if isinstance(leaf, jax.Array) or (used and not path.startswith((f"{stack}/layers/", "text/lm_head/"))):
            return to_device(leaf)
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # jit drops what a program does not use

    return unflatten({path: place(path, leaf) for path, leaf in flatten(model.params).items()})


@functools.partial(jax.jit, static_argnames=("cfg", "stack", "dtype"))
def _embed(params: Any, inputs: Any, *, cfg: ModelConfig, stack: str, dtype: Any) -> tuple[jax.Array, LayerEmbeds]:
    """Return the input of a stack's first layer, and the additional embeddings of all layers."""
    module, embeds = to_nnx(Model(params, cfg)), LayerEmbeds()
    images = None if stack in dict(cfg.encoders) else images_of(inputs)
    if stack == "text":
        x, _, embeds = module.embed(inputs["input_ids"], images, cfg.encoder_inputs(inputs))
    else:
        values = inputs[cfg.input_of(stack)].astype(jax.tree.leaves(params[stack])[0].dtype)
        x = getattr(module, stack).embed(values if images is None else images._replace(values=values))
    apart = LayerEmbeds(*(None if stacked is None else tuple(stacked) for stacked in embeds))
    return jax.tree.map(lambda array: constrain(array.astype(dtype or array.dtype), STREAM), (x, apart))
