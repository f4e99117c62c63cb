"""Tensors of an export, one at a time: fetched, padded with zeros, converted, joined; and the widths after padding."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.weight_files import WEIGHT_DTYPES
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.mixers import Attention
from vlmprune_jax.core.models.lazy import lazy_entry, to_host
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.io.checkpoints.disk.tensors import Tensor, weight
from vlmprune_jax.io.checkpoints.layout import Slot, make_slots
from vlmprune_jax.io.checkpoints.read import blocks_of
from vlmprune_jax.io.families import Family

_PADDED_ROPES = ("default", "linear", "llama3")  # rotary types whose frequencies depend only on channel / head_dim
# Function of an array (some rows of a parameter) and its slot in the export.
Convert = Callable[[np.ndarray, Slot], np.ndarray]


@dataclass(frozen=True)
class Weights:
    """Parameters of a model, for an export whose layers may be wider and whose vocabulary may have more rows.

    Attributes:
      cfg, wide: config of the model and of the export.
      slots: {name: slot} of the model; the export's slots have the same names.
    """

    cfg: ModelConfig
    wide: ModelConfig
    flat: Mapping[str, Any]
    slots: Mapping[str, Slot]

    @classmethod
    def of(cls, model: Model, family: Family, wide: ModelConfig) -> Weights:
        """Return the parameters of a model that this family's weight table describes."""
        slots = {slot.name: slot for slot in make_slots(model.cfg, family)}
        return cls(model.cfg, wide, flatten(model.params), slots)

    def tensor(
        self, key: str, slots: Sequence[Slot], dtype: str, convert: Convert | None = None, *, reorders: bool = False
    ) -> Tensor:
        """Return one tensor of the export, which is fetched, padded, converted and cast when it is written.

        The export's `slots` share the tensor, in order. `convert` is applied to every array before it is cast and
        joined with others; it `reorders` rows if it needs all of a parameter at once.
        """
        before = self.slots[slots[0].name]
        stored = lazy_entry(self.flat[before.path], before.place)
        what = f"{slots[0].key if stored is None else stored.location}, to be written as {dtype},"
        pieces = functools.partial(self._pieces, slots, dtype, convert, reorders)
        return weight(key, dtype, slots[0].hf_shape, pieces, what)

    def _pieces(
        self, slots: Sequence[Slot], dtype: str, convert: Convert | None, reorders: bool
    ) -> Iterator[np.ndarray]:
        """Yield the values of one tensor in groups of whole rows, in the order of the file."""

        def converted(array: np.ndarray, slot: Slot) -> np.ndarray:
            return cast(array if convert is None else convert(array, slot), dtype)

        for _, same_rows in itertools.groupby(slots, key=lambda slot: slot.start):
            pairs = [(self.slots[slot.name], slot) for slot in same_rows]
            stored = [lazy_entry(self.flat[before.path], before.place) for before, _ in pairs]
            alike = all((x.shape, x.columns, x.turned) == (y.shape, y.columns, y.turned) for x, y in pairs)
            blocks = blocks_of(stored, as_stored=convert is None) if alike and not reorders else None
            if blocks is None:  # side by side
                arrays = [converted(self._widened(slot), slot) for _, slot in pairs]
                arrays = [x.T if slot.turned else x for x, (_, slot) in zip(arrays, pairs, strict=True)]
                yield arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)
            else:
                yield from (converted(block, pairs[0][1]) for block in blocks)

    def _widened(self, after: Slot) -> np.ndarray:
        before = self.slots[after.name]
        array = to_host(self.flat[before.path], before.place)
        if dict(zip(before.axes, before.shape, strict=True)) == dict(zip(after.axes, after.shape, strict=True)):
            return array
        if before.layer is None:
            return _more_words(array, before.axes, self.wide.text.vocab_size)
        axes = before.axes[::-1] if before.turned else before.axes
        return pad_tensor(array, axes, before.part, before.layer, self.cfg, self.wide)


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return an array in a dtype of weight files; values that become infinite are reported when they are written."""
    with np.errstate(over="ignore"):
        return array.astype(WEIGHT_DTYPES[dtype], copy=False)


def _more_words(array: np.ndarray, axes: tuple[str, ...], size: int) -> np.ndarray:
    """Extend an embedding or output head to `size` rows with their mean, so that no new word has the largest logit."""
    axis = axes.index("vocab")
    mean = array.mean(axis=axis, keepdims=True, dtype=np.float32).astype(array.dtype)
    return np.concatenate([array, np.repeat(mean, size - array.shape[axis], axis=axis)], axis=axis)


def pad_tensor(array: np.ndarray, axes: tuple[str, ...], stack: str, layer: int, *cfgs: ModelConfig) -> np.ndarray:
    """Zero-pad a tensor along its named `axes`, from the first config's widths to the second's.

    A zero value head or neuron adds nothing to the residual stream, and the queries of a head with zero output weights
    do not matter. Query head g * per_group + r belongs to key/value head g, so both counts are padded separately. In
    heads of n times as many channels, channel i becomes n * i: rotary frequency theta ** (-2i / d) is number n * i of n
    * d. Queries are multiplied by sqrt(n), since scores are divided by sqrt(n * d).
    """
    layer_before, layer_after = (cfg.stack(stack).layers[layer] for cfg in cfgs)
    before, after = layer_before.sizes, layer_after.sizes
    for axis in layer_before.axes:
        if axis.name not in axes:
            continue
        at, size = axes.index(axis.name), after[axis.name]
        if axis.parent:
            old, new = before[axis.parent], after[axis.parent]
            array = array.reshape(*array.shape[:at], old, before[axis.name] // old, *array.shape[at + 1 :])
            array = _extend(_extend(array, at, new), at + 1, size // new)
            array = array.reshape(*array.shape[:at], size, *array.shape[at + 2 :])
        else:
            array = _extend(array, at, size)
    times = layer_after.mixer.head_dim // layer_before.mixer.head_dim
    if "head" not in axes or times == 1:
        return array
    at = axes.index("head")
    wide = np.zeros((*array.shape[:at], times * array.shape[at], *array.shape[at + 1 :]), array.dtype)
    wide[(slice(None),) * at + (slice(None, None, times),)] = array
    return wide * array.dtype.type(math.isqrt(times)) if axes[0] == "q_heads" else wide


def _extend(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths)


def padded(layers: Sequence[Layer], heads: int | None = None) -> tuple[Layer, ...]:
    """Return all layers after zero-padding to equal sizes: the smallest sizes that hold every layer.

    With `heads`, layers have that many query heads if a group size of at least the largest one divides this number.
    """
    axes = {axis.name: axis for layer in layers for axis in layer.axes}
    sizes = {name: max(layer.sizes[name] for layer in layers if name in layer.sizes) for name in axes}
    for name, axis in axes.items():
        if axis.parent:  # counts of parents and of children per parent are padded separately
            per_parent = max(x.sizes[name] // x.sizes[axis.parent] for x in layers if name in x.sizes)
            if heads is not None and name == "q_heads":
                fits = [n for n in range(sizes[axis.parent], heads // per_parent + 1) if heads % n == 0]
                if fits:
                    sizes[axis.parent], per_parent = fits[0], heads // fits[0]
            sizes[name] = sizes[axis.parent] * per_parent
    return tuple(layer.resized(sizes) for layer in layers)


def padded_stacks(cfg: ModelConfig) -> ModelConfig:
    """Return the config with every stack zero-padded to equal widths; a vision tower regains all its heads."""
    for name, stack in cfg.stacks.items():
        widths = {tuple(layer.sizes.items()) for layer in stack.layers}
        if not stack.uniform or len(widths) == 1:  # Gemma 4's class knows two widths
            heads = stack.hidden_size // stack.attention.head_dim if name == "text" and cfg.text.whole_heads else None
            cfg = cfg.with_layers(padded(stack.layers, heads), name)
    return with_whole_tower(cfg)


def with_whole_tower(cfg: ModelConfig) -> ModelConfig:
    """Return the config with all heads of the tower, whose classes compute the head size as hidden_size / heads."""
    if cfg.vision is None:
        return cfg
    heads = cfg.vision.hidden_size // cfg.vision.attention.head_dim
    sizes = {"q_heads": heads, "kv_heads": heads}
    return cfg.with_layers([layer.resized(sizes) for layer in cfg.vision.layers], "vision")


def with_head_dim(cfg: ModelConfig, head_dim: int) -> ModelConfig:
    """Return the config with decoder heads zero-padded to `head_dim` channels (0 = unchanged).

    Raises UserError if the padded heads would compute a different function.
    """
    layers = []
    for layer in cfg.text.layers:
        heads = layer.mixer
        if head_dim and (not isinstance(heads, Attention) or heads.head_dim != head_dim):
            rope = getattr(heads, "rope", None)
            plain = rope is not None and rope.kind in _PADDED_ROPES and not rope.sections and not heads.rotary_dim
            if not plain or heads.qk_norm or heads.v_norm or heads.scale or cfg.text.whole_heads:
                raise UserError(
                    f"head_dim={head_dim}: heads of {cfg.text.decoder} with this rotary embedding, norm or scale "
                    "cannot be padded with zeros: leave head_dim out"
                )
            if head_dim not in (4 * heads.head_dim, 16 * heads.head_dim):  # doubled or quadrupled queries round nothing
                raise UserError(
                    f"head_dim={head_dim}: expected 4 or 16 times the model's {heads.head_dim} channels: set head_dim "
                    f"to {4 * heads.head_dim} or {16 * heads.head_dim}"
                )
            layer = dataclasses.replace(layer, mixer=dataclasses.replace(heads, head_dim=head_dim))
        layers.append(layer)
    return cfg.with_layers(layers)
