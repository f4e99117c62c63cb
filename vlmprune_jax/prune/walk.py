"""The walk of calibration rows over the layers of a model, which everything that reads or repairs layers visits.

    stream = LayerStream(model, "text", batches)  # embeds
    for number in range(stream.n_layers):
        layer = stream.layer(number)  # loads
        for batch, result in stream.visit(compute, number):  # visits: compute(rows at the layer's input)
            ...
        stream.advance(layer, number)  # carries on, here or with other weights

One layer is on the devices at a time, with a few batches; its weights come from devices, the host or files. Between
layers the streams are on the hosts of their devices (`layers.to_hosts`), or stay on the devices. Every process has the
inputs of all rows.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.hf.lazy import to_device
from vlmprune_jax.models.context import STREAM
from vlmprune_jax.models.params import flatten, unflatten
from vlmprune_jax.models.vlm import Model, mesh_of, place_batch, to_nnx
from vlmprune_jax.prune.criteria.activations import real_images
from vlmprune_jax.prune.criteria.calibration import Arrays, stack_rows, weight_of_kinds
from vlmprune_jax.prune.layers import Given, Layer, Rows, State, streamed, to_devices

R = TypeVar("R")


@dataclass(frozen=True)
class CalibrationBatch:
    """Calibration rows, or images, that are processed together."""

    inputs: dict[str, Any]
    """Ids and images that the model embeds."""

    context: dict[str, Any]
    """Arrays for `BlockStack.context_of`."""

    weight: np.ndarray
    """Weight of every token, float32[rows, seq]."""

    names: list[str]
    """Names of the rows, for messages."""

    held_out: bool
    """True if nothing is fitted to these rows."""

    labels: np.ndarray | None = None
    """Labels of text, int32[rows, seq] with -100 where there is none."""


class LayerStream:
    """Residual stream of all calibration batches in one model, at the input of one of its layers.

    Args:
      model: weights may be on devices, on a mesh, on the host or in files.
      stack: "text" or "vision".
      dtype: of streams and layers; None is the model's.
      hosts: keep the streams on the hosts between layers.
    """

    def __init__(
        self,
        model: Model,
        stack: str,
        batches: Sequence[CalibrationBatch],
        *,
        dtype: Any = jnp.float32,
        hosts: bool = True,
    ):
        self.model, self.stack, self.batches, self.mesh = model, stack, batches, mesh_of(model.params)
        self._dtype, self._hosts, params = dtype, hosts, _entrance(model, stack)
        # Added to the outputs of the first layers, whatever their numbers, or the layers' own inputs.
        self.states, self.added = list[State](), list[tuple[jax.Array, ...]]()

        def embed(batch: CalibrationBatch) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            return _embed(params, place_batch(batch.inputs, self.mesh), cfg=model.cfg, dtype=dtype)

        for x, added in streamed(embed, batches, hosts=hosts):
            self.states.append(State(x, {}))
            self.added.append(added)

    @property
    def n_layers(self) -> int:
        """Number of layers of the stack."""
        return len(self.model.cfg.stack(self.stack).layers)

    def layer(self, number: int) -> Layer:
        """Load a layer to the devices."""
        return Layer.of(self.model, self.stack, number, self._dtype)

    def at(self, states: Sequence[State]) -> LayerStream:
        """Return the same batches at another layer, or behind other layers."""
        other = copy.copy(self)
        other.states = list(states)
        return other

    def given(self, at: int, place: int) -> Given:
        """Return a layer's inputs besides the residual stream for batch `at`, on the hosts; `place`: see `visit`."""
        added = self.added[at][place] if place < len(self.added[at]) else None
        return Given(self.batches[at].context, added, self.states[at].shared)

    def visit(
        self, compute: Callable[..., R], place: int, *targets: Sequence[Any], held_out: bool | None = None
    ) -> Iterator[tuple[CalibrationBatch, R]]:
        """Yield (batch, `compute(rows, *targets of the batch)`) for the batches, in order; results are on the hosts.

        All processes call it in step.

        Args:
          compute: function of `Rows` and the batch's targets, all on the devices.
          place: number of the layer that reads the stream, among those that are left.
          targets: lists of arrays, or of pytrees, for each batch.
          held_out: only batches that are, or are not, held out.
        """
        numbers = [at for at, batch in enumerate(self.batches) if held_out in (None, batch.held_out)]

        def on_devices(at: int) -> R:
            weight = place_batch({"weight": self.batches[at].weight}, self.mesh)["weight"]
            x, values = jax.tree.map(to_devices, (self.states[at].x, [target[at] for target in targets]))
            return compute(Rows(x, weight, self.given(at, place).placed(self.mesh)), *values)

        for at, result in zip(numbers, streamed(on_devices, numbers, hosts=self._hosts), strict=True):
            yield self.batches[at], result

    def advance(self, layer: Layer, place: int, capture: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """Run a layer on all batches; return the values named in `capture` (see `Layer.run`) for each."""
        captured = list[dict[str, Any]]()
        for at, (_, (state, values)) in enumerate(self.visit(lambda rows: layer.run(rows, capture), place)):
            self.states[at] = State(state.x, {**self.states[at].shared, **state.shared})
            captured.append(values)
        return captured


def walk(
    stream: LayerStream, visit: Callable[[Layer, LayerStream], Layer], progress: Callable[[int], None] | None
) -> None:
    """Pass all layers forward: `visit(layer, stream at its input)` returns the layer that the rows pass.

    `progress` is called with the number of finished layers.
    """
    for number in range(stream.n_layers):
        layer = visit(stream.layer(number), stream)
        if number + 1 < stream.n_layers:
            stream.advance(layer, number)
        if progress is not None:
            progress(number + 1)


def names_of_rows(batches: Sequence[Any], checked: Sequence[Arrays]) -> list[str]:
    """Return a name for every calibration row, for messages: the record's id if known."""
    names = list[str]()
    for batch, arrays in zip(batches, checked, strict=True):
        ids = getattr(batch, "record_ids", None) or [""] * len(arrays["kind"])
        names += [f"record {name}" if name else f"row {len(names) + at}" for at, name in enumerate(ids)]
    return names


def row_batches(
    batches: Sequence[Arrays],
    settings: Mapping[str, Any],
    names: Sequence[str] | None = None,
    cfg: ModelConfig | None = None,
) -> list[CalibrationBatch]:
    """Group calibration rows into batches; rows for fitting and held-out rows never share a batch.

    Without a `held_out` in the settings none is held out.

    Raises UserError if there are too few rows, or no token of them has weight.
    """
    rows = [
        {name: array[row] for name, array in arrays.items()} for arrays in batches for row in range(len(arrays["kind"]))
    ]
    names = names or [f"row {number}" for number in range(len(rows))]
    rows = [row | {"name": name} for name, row in zip(names, rows, strict=True) if row["attention_mask"].any()]
    # By content, so that the order of the rows is immaterial.
    rows.sort(key=lambda row: hashlib.sha256(row["input_ids"][row["attention_mask"] == 1].tobytes()).digest())
    weight_of, size = weight_of_kinds(settings), len(batches[0]["kind"])
    grouped = [
        text_batch(stack_rows(rows := chosen[at : at + size], size), weight_of, [row["name"] for row in rows], held_out)
        for chosen, held_out in _parted(rows, settings, "rows")
        for at in range(0, len(chosen), size)
    ]
    for held_out in {batch.held_out for batch in grouped}:
        if not any(batch.weight.any() for batch in grouped if batch.held_out == held_out):
            raise UserError(
                f"calibration: no token of the {'held-out ' if held_out else ''}records has a weight above 0: raise "
                "prompt_weight, image_weight or answer_weight, or use more records"
            )
    return grouped


def text_batch(
    arrays: Arrays, weight_of: np.ndarray, names: Sequence[str] = (), held_out: bool = False
) -> CalibrationBatch:
    """Return rows as `stack_rows` makes them; `weight_of`: weight of a token of each type."""
    inputs = {name: arrays.get(name) for name in ("input_ids", "pixel_values", "image_grid_thw")}
    context = {name: arrays.get(name) for name in ("attention_mask", "position_ids")}
    return CalibrationBatch(inputs, context, weight_of[arrays["kind"]], list(names), held_out, arrays["labels"])


def image_batches(
    batches: Sequence[Arrays], settings: Mapping[str, Any], names: Sequence[str], cfg: ModelConfig
) -> list[CalibrationBatch]:
    """Group the calibration images into batches, each image once, so that no image is both fitted and held out."""
    images = dict[bytes, tuple[np.ndarray, np.ndarray | None, str]]()
    row = 0
    for arrays in batches:
        for at in range(len(arrays["kind"])):
            for pixels, grid in _images(arrays, at, cfg):
                key = hashlib.sha256(pixels.tobytes() + (b"" if grid is None else grid.tobytes())).digest()
                images |= {key: (pixels, grid, names[row + at])}
        row += len(arrays["kind"])
    chosen = [images[key] for key in sorted(images)]
    assert cfg.vision is not None
    positions = cfg.vision.grid**2 + cfg.vision.class_token
    if cfg.any_size:
        positions = max((len(pixels) for pixels, _, _ in chosen), default=0)
    return [
        _image_batch(part[at : at + size], size, positions, held_out)
        for size in (len(batches[0]["kind"]),)
        for part, held_out in _parted(chosen, settings, "images")
        for at in range(0, len(part), size)
    ]


def _images(arrays: Arrays, row: int, cfg: ModelConfig) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield the pixels of a row's images, and their patch grids if images have any size."""
    pixels = arrays.get("pixel_values")
    if pixels is None:
        return
    if cfg.any_size:
        for patches, grid in zip(pixels[row], arrays["image_grid_thw"][row], strict=True):
            if grid.any():
                yield patches[: int(np.prod(grid))], grid
        return
    real = real_images(arrays["kind"][row : row + 1], pixels.shape[1], cfg.tokens_per_image)[0]
    for image in pixels[row, real]:
        yield image, None


def _image_batch(
    images: Sequence[tuple[np.ndarray, np.ndarray | None, str]], size: int, positions: int, held_out: bool
) -> CalibrationBatch:
    """Return a batch of images with equal numbers of vision-tower positions, padded to `size` images."""
    inputs: dict[str, Any] = {}
    first, grid, _ = images[0]
    shape = first.shape if grid is None else (positions, first.shape[-1])
    inputs["pixel_values"] = np.zeros((size, *shape), np.float32)
    real = np.zeros((size, positions), np.float32)
    if grid is not None:
        inputs["image_grid_thw"] = np.zeros((size, 3), np.int32)
    for at, (pixels, grid, _) in enumerate(images):
        inputs["pixel_values"][at, : len(pixels)] = pixels
        real[at, : positions if grid is None else len(pixels)] = 1
        if grid is not None:
            inputs["image_grid_thw"][at] = grid
    context = {"image_grid_thw": inputs.get("image_grid_thw")}
    return CalibrationBatch(inputs, context, real, [name for _, _, name in images], held_out)


def _parted(chosen: Sequence[Any], settings: Mapping[str, Any], what: str) -> tuple[tuple[Sequence[Any], bool], ...]:
    """Split items into (items for fitting, False) and (held-out items, True); raise UserError for fewer than two."""
    if "held_out" not in settings:
        return ((chosen, False),)
    n_held = min(max(1, round(settings["held_out"] * len(chosen))), len(chosen) - 1)
    if n_held < 1:
        raise UserError(
            f"reconstruct needs at least 2 calibration {what}, one for the fit and one held out: add records"
        )
    return (chosen[n_held:], False), (chosen[:n_held], True)


# stack -> its inputs in calibration batches
BATCHES: dict[str, Callable[..., list[CalibrationBatch]]] = {"text": row_batches, "vision": image_batches}


def _entrance(model: Model, stack: str) -> Any:
    """Return the model's parameters with what embeds the inputs of a stack on the device, and the rest without memory.

    Arrays that are on devices already stay there.
    """

    def place(path: str, leaf: Any) -> Any:
        used = path.startswith("vision/") or stack == "text"
        if isinstance(leaf, jax.Array) or (used and not path.startswith((f"{stack}/layers/", "text/lm_head/"))):
            return to_device(leaf)
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # jit drops what a program does not use

    return unflatten({path: place(path, leaf) for path, leaf in flatten(model.params).items()})


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def _embed(params: Any, inputs: Any, *, cfg: ModelConfig, dtype: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return the first layer's input, and the additions of `LayerStream`."""
    module, added = to_nnx(Model(params, cfg)), None
    if "input_ids" not in inputs:
        stored = jax.tree.leaves(params["vision"])[0].dtype
        x = module.vision.embed(inputs["pixel_values"].astype(stored), grid=inputs.get("image_grid_thw"))
    else:
        grid = inputs["image_grid_thw"]
        x, _, added = module.embed(inputs["input_ids"], inputs["pixel_values"], image_grid_thw=grid)
    additions = () if added is None else tuple(added)
    x, *rest = (constrain(array.astype(dtype or array.dtype), STREAM) for array in (x, *additions))
    return x, tuple(rest)
