"""Calibration rows on their way through a stack layer by layer: a few at a time, between layers on the hosts.

Every process has the inputs of all rows; the streams of a row are where its devices are (`layers.to_hosts`). A layer
whose weights are known waits until the rows are on the devices for sums of the next one, so that streams are copied
once per layer.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from vlmprune_jax.models.vlm import Model, place_inputs, to_nnx
from vlmprune_jax.prune.criteria.activations import real_images
from vlmprune_jax.prune.criteria.calibration import Arrays, stack_rows, weight_of_kinds
from vlmprune_jax.prune.layers import Given, Layer, Shared, streamed

R = TypeVar("R")
_Picture = tuple[np.ndarray, np.ndarray | None, str]  # pixels, patch grid of an image of any size, and a name


@dataclasses.dataclass
class Step:
    """Calibration rows that are processed together, with the residual streams of unpruned and pruned model.

    `inputs`: ids and images that the models embed. `context`: arrays for `BlockStack.context_of`. `weight`:
    float32[rows, seq], of the tokens. `names`: of the rows, for messages. `labels`: of text, int32[rows, seq] with -100
    where there is none. `middle`, `statistics`: of the dense model's layer at work, see `layers.Streams`.
    `added_dense`, `added_ours`: added to the outputs of the first layers of either model, whatever their number in the
    other, or the layers' own inputs. `shared_dense`, `shared_ours`: keys and values of the layers so far. `waiting`:
    layers that the rows pass next, see `pass_layers`.
    """

    inputs: dict[str, Any]
    context: dict[str, Any]
    weight: np.ndarray
    names: list[str]
    held_out: bool
    labels: np.ndarray | None = None
    dense: jax.Array = dataclasses.field(init=False)
    ours: jax.Array = dataclasses.field(init=False)
    middle: Any = dataclasses.field(init=False)
    statistics: dict[str, jax.Array] = dataclasses.field(init=False)
    added_dense: tuple[jax.Array, ...] = ()
    added_ours: tuple[jax.Array, ...] = ()
    shared_dense: Shared = dataclasses.field(init=False, default_factory=dict)
    shared_ours: Shared = dataclasses.field(init=False, default_factory=dict)
    waiting: list[Callable[[Step], None]] = dataclasses.field(init=False, default_factory=list)

    def given(self, place: int, *, dense: bool = False) -> Given:
        """Return a layer's inputs besides the residual stream; `dense` selects the unpruned model's."""
        added, shared = (self.added_dense, self.shared_dense) if dense else (self.added_ours, self.shared_ours)
        return Given(self.context, added[place] if place < len(added) else None, shared)


_MOVED = ("dense", "ours", "middle", "statistics", "shared_dense", "shared_ours")  # by a layer


def pass_layers(steps: Sequence[Step], compute: Callable[[Step], R]) -> Iterator[tuple[Step, R]]:
    """Run the layers that wait for each step's rows, then `compute`; yield the step and the result, both on the hosts.

    All processes call it in step.
    """

    def run(step: Step) -> tuple[R, dict[str, Any]]:
        while step.waiting:
            step.waiting.pop(0)(step)
        return compute(step), {name: value for name, value in vars(step).items() if name in _MOVED}

    for step, (result, streams) in zip(steps, streamed(run, steps), strict=True):
        vars(step).update(streams)
        yield step, result


def pass_all(steps: Sequence[Step]) -> None:
    """Run all layers that wait for rows."""
    for _ in pass_layers([step for step in steps if step.waiting], lambda step: None):
        pass


def wait_for(steps: Sequence[Step], layer: Callable[[Step], None]) -> None:
    """Let a layer wait for the rows of all steps; `layer(step)` replaces the step's streams."""
    for step in steps:
        step.waiting.append(layer)


def pass_ours(layer: Layer, place: int, step: Step) -> None:
    """Run a layer of the pruned model, number `place` of those that are left."""
    step.ours, step.shared_ours = layer.run(step.ours, step.given(place))


def names_of_rows(batches: Sequence[Any], checked: Sequence[Arrays]) -> list[str]:
    """Return a name for every calibration row, for messages: the record's id if known."""
    names = list[str]()
    for batch, arrays in zip(batches, checked, strict=True):
        ids = getattr(batch, "record_ids", None) or [""] * len(arrays["kind"])
        names += [f"record {name}" if name else f"row {len(names) + at}" for at, name in enumerate(ids)]
    return names


def row_steps(
    batches: Sequence[Arrays],
    settings: Mapping[str, Any],
    names: Sequence[str] | None = None,
    cfg: ModelConfig | None = None,
) -> list[Step]:
    """Group calibration rows into steps; rows for fitting and held-out rows never share a step.

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
    steps = [
        _step(chosen[at : at + size], size, weight_of, held_out)
        for chosen, held_out in _parted(rows, settings, "rows")
        for at in range(0, len(chosen), size)
    ]
    for held_out in {step.held_out for step in steps}:
        if not any(step.weight.any() for step in steps if step.held_out == held_out):
            raise UserError(
                f"calibration: no token of the {'held-out ' if held_out else ''}records has a weight above 0: raise "
                "prompt_weight, image_weight or answer_weight, or use more records"
            )
    return steps


def _step(rows: Sequence[Mapping[str, Any]], size: int, weight_of: np.ndarray, held_out: bool) -> Step:
    """Return a step of rows, padded to the longest row and to `size` rows."""
    arrays = stack_rows(rows, size)
    inputs = {name: arrays.get(name) for name in ("input_ids", "pixel_values", "image_grid_thw")}
    context = {name: arrays.get(name) for name in ("attention_mask", "position_ids")}
    names = [row["name"] for row in rows]
    return Step(inputs, context, weight_of[arrays["kind"]], names, held_out, arrays["labels"])


def image_steps(
    batches: Sequence[Arrays], settings: Mapping[str, Any], names: Sequence[str], cfg: ModelConfig
) -> list[Step]:
    """Group the calibration images into steps, each image once, so that no image is both fitted and held out."""
    images = dict[bytes, _Picture]()
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
    parts = [(_in_packs(part, positions), held_out) for part, held_out in _parted(chosen, settings, "images")]
    most = max((len(pack) for packs, _ in parts for pack in packs), default=0)
    size = len(batches[0]["kind"])
    return [
        _image_step(packs[at : at + size], (size, positions, most), held_out)
        for packs, held_out in parts
        for at in range(0, len(packs), size)
    ]


def _in_packs(images: Sequence[_Picture], positions: int) -> list[list[_Picture]]:
    """Pack images of any size in order into rows of `positions` patches; others have a row each."""
    packs, room = list[list[_Picture]](), 0
    for image in images:
        needed = positions if image[1] is None else len(image[0])
        if needed > room:
            packs.append([])
            room = positions
        packs[-1].append(image)
        room -= needed
    return packs


def _images(arrays: Arrays, row: int, cfg: ModelConfig) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield the pixels of a row's images, and their patch grids if images have any size."""
    pixels = arrays.get("pixel_values")
    if pixels is None:
        return
    if cfg.any_size:
        at = 0
        for grid in arrays["image_grid_thw"][row]:
            if grid.any():
                yield pixels[row, at : at + int(np.prod(grid))], grid
                at += int(np.prod(grid))
        return
    real = real_images(arrays["kind"][row : row + 1], pixels.shape[1], cfg.tokens_per_image)[0]
    for image in pixels[row, real]:
        yield image, None


def _image_step(packs: Sequence[Sequence[_Picture]], shape: tuple[int, int, int], held_out: bool) -> Step:
    """Return a step of images in packed rows; `shape`: number of rows, positions and images of each."""
    size, positions, most = shape
    first, grid, _ = packs[0][0]
    pixels = np.zeros((size, *(first.shape if grid is None else (positions, *first.shape[1:]))), np.float32)
    real, grids = np.zeros((size, positions), np.float32), np.zeros((size, most, 3), np.int32)
    for row, images in enumerate(packs):
        joined = np.concatenate([image for image, _, _ in images])
        pixels[row, : len(joined)] = joined
        real[row, : positions if grid is None else len(joined)] = 1
        if grid is not None:
            grids[row, : len(images)] = np.array([grid for _, grid, _ in images])
    context = {"image_grid_thw": None if grid is None else grids}
    names = [", ".join(name for _, _, name in images) for images in packs]
    return Step({"pixel_values": pixels, **context}, context, real, names, held_out)


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


# stack -> its inputs in calibration batches, as steps
STEPS: dict[str, Callable[..., list[Step]]] = {"text": row_steps, "vision": image_steps}


def entrance(model: Model, stack: str) -> Model:
    """Return the model with what embeds the inputs of a stack on the device, and the rest without memory.

    Arrays that are on devices already stay there.
    """

    def place(path: str, leaf: Any) -> Any:
        used = path.startswith("vision/") or stack == "text"
        if isinstance(leaf, jax.Array) or (used and not path.startswith((f"{stack}/layers/", "text/lm_head/"))):
            return to_device(leaf)
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # jit drops what a program does not use

    return model.replace(params=unflatten({path: place(path, leaf) for path, leaf in flatten(model.params).items()}))


def embedded(step: Step, model: Model) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return the first layer's input and the DeepStack additions for one step of calibration rows."""
    return _embed(model.params, place_inputs(model, step.inputs), cfg=model.cfg)


@functools.partial(jax.jit, static_argnames=("cfg",))
def _embed(params: Any, inputs: Any, *, cfg: ModelConfig) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    module, added = to_nnx(Model(params, cfg)), None
    if "input_ids" not in inputs:
        dtype = jax.tree.leaves(params["vision"])[0].dtype
        x = module.vision.embed(inputs["pixel_values"].astype(dtype), grid=inputs.get("image_grid_thw"))
    else:
        grid = inputs["image_grid_thw"]
        x, _, added = module.embed(inputs["input_ids"], inputs["pixel_values"], image_grid_thw=grid)
    additions = () if added is None else tuple(added)
    x, *rest = (constrain(array.astype(jnp.float32), STREAM) for array in (x, *additions))
    return x, tuple(rest)
