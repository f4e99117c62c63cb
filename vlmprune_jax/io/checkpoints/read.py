"""Weights of a Hugging Face folder: opened, pruned like device arrays, and read by block or placed on devices."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vlmprune_jax.base.checks import check_returned
from vlmprune_jax.base.errors import UserError, error_context, reason
from vlmprune_jax.base.files import read_json, reading
from vlmprune_jax.base.weight_files import DTYPES, WEIGHT_DTYPES
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.rules import check_divides, sharding
from vlmprune_jax.core.models.layers import activation
from vlmprune_jax.core.models.lazy import LazyArray, check_finite
from vlmprune_jax.core.models.params import param_axes, param_shapes, unflatten
from vlmprune_jax.core.models.vlm import Model, Params
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint, StoredWeight, find_storage, has_weights
from vlmprune_jax.io.checkpoints.layout import PARTS, Slot, make_slots, match_keys, refuse, stacked
from vlmprune_jax.io.data.processor_files import load_video_config
from vlmprune_jax.io.data.tokenizer_files import added_tokens
from vlmprune_jax.io.families import Family, detect
from vlmprune_jax.io.families.experts import as_stored, has_experts, with_separate_experts
from vlmprune_jax.io.families.fields import check_fields

# XLA on CPU uses a host buffer of this alignment without a copy.
_ALIGNMENT = 64
_PART = 2**26  # elements of a tensor that one thread reads
BLOCK = 2**24  # bytes that are read at a time for an export
_PIECE = 2**18  # elements of a tensor that are read, checked and distributed at a time
# Reading waits for the disk; copying and checking release Python's lock.
_THREADS = min(4, os.cpu_count() or 1)
# Files to download besides the weights (safetensors, or else `pytorch_model*.bin`).
_HUB_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "LICENSE*"]

# (start, stop) along every axis of the slice of a parameter that a device holds.
Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class FileArray(LazyArray):
    """One layer's weight, read from its file only when accessed; `take` selects indices of an axis without reading.

    Attributes:
      slot: rows (and columns) of the tensor `source` that belong to the weight.
      picks: pairs (axis in the file, kept indices).
      cast: dtype of the weight once it is read; None = the file's dtype.
    """

    source: StoredWeight
    slot: Slot
    picks: tuple[tuple[int, np.ndarray], ...] = ()
    cast: np.dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight after the selected indices are applied."""
        sizes = list(self.slot.shape)
        for axis, indices in self.picks:
            sizes[axis] = len(indices)
        return tuple(reversed(sizes)) if self.slot.turned else tuple(sizes)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weight once it is read."""
        return WEIGHT_DTYPES[self.source.dtype] if self.cast is None else self.cast

    @property
    def location(self) -> str:
        """File and tensor of the weight, for messages."""
        entry, key = self.slot.entry, self.source.key
        index = "" if entry is None or str(entry) in key.split(".") else f"[{entry}]"
        return f"{self.source.file}: tensor {key}{index}"

    def take(self, indices: np.ndarray, axis: int) -> FileArray:
        """Select `indices` along one axis without reading the weight; allowed once per axis."""
        return dataclasses.replace(
            self, picks=(*self.picks, (1 - axis if self.slot.turned else axis, np.asarray(indices)))
        )

    def read(self) -> np.ndarray:
        """Read the weight from its file."""
        (array,) = self.pieces([0, self.slot.shape[0]])
        return array.T if self.slot.turned else array

    def pieces(self, rows: Sequence[int], *, check: bool = False, once: bool = False) -> Iterator[np.ndarray]:
        """Yield the weight between consecutive rows in the file, as the file has its axes; buffers are reused.

        With `check`, raises UserError if a weight is not finite, in the file or in the dtype of the array. `once`: see
        `Entry.pieces`.
        """
        slot = self.slot
        pieces = self.source.pieces([slot.offset + row * slot.stride for row in rows], once=once)
        for (start, stop), values in zip(itertools.pairwise(rows), pieces, strict=True):
            # Integers of the same width: numpy has fast paths for them, and none for bfloat16.
            array = slot.rows_of(values.view(f"u{values.dtype.itemsize}"))
            for axis, indices in self.picks:
                inside = indices[(indices >= start) & (indices < stop)] - start if axis == 0 else indices
                array = np.take(array, inside, axis=axis)
            array = np.ascontiguousarray(array).view(values.dtype)
            if check:
                check_finite(array, self.location)
            with np.errstate(over="ignore"):  # reported with the tensor's name instead
                cast = array.astype(self.dtype, copy=False)
            if check and cast is not array:
                check_finite(cast, f"{self.location} as {self.dtype.name}")
            yield cast

    def elements(self, positions: tuple[np.ndarray, ...]) -> np.ndarray:
        """Read single elements, given one index array per axis."""
        assert not self.picks, "elements index the weight as stored"
        row, *inner = positions[::-1] if self.slot.turned else positions
        column = np.ravel_multi_index(inner, self.slot.shape[1:]) if inner else 0
        first = self.slot.offset + (self.slot.columns or (0,))[0]
        return self.source.elements(first + row * self.slot.stride + column)


def load(
    hf_dir: str | Path,
    *,
    vision_dir: str | Path | None = None,
    dtype: str = "float32",
    mesh: Mesh | Callable[[ModelConfig], Mesh | None] | None = None,
    parts: Collection[str] = PARTS,
) -> Model:
    """Load a model from a Hugging Face folder or hub id.

    Args:
      hf_dir: folder with config.json and safetensors (or `pytorch_model*.bin`), or a hub id.
      vision_dir: folder of the vision tower (CLIP, SigLIP) for an original-layout LLaVA or Bunny; it takes precedence
        over a tower in `hf_dir`.
      dtype: data type of all parameters: "float32", "bfloat16" or "float16".
      mesh: device mesh, or a function that chooses it for the model's config; parameters are split by
        `distributed.rules`. None uses the default device.
      parts: parts to load: "text", "projector", "vision". Without "vision", the model takes image features as input.

    Raises:
      UserError: unknown family, missing or damaged files, weights that do not match config.json or are not finite, or a
        mesh that does not divide the model.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    folder = resolve(hf_dir)
    tower = None if vision_dir is None else resolve(vision_dir)
    family, cfg = read_config(folder, tower)
    devices = mesh if mesh is None or isinstance(mesh, Mesh) else mesh(cfg)
    if devices is not None:
        check_divides(cfg, devices)
    arrays = open_weights(make_slots(cfg, family), cfg, family, Checkpoint(folder), tower, dtype=DTYPES[dtype])
    params = place([array for array in arrays if array.slot.part in parts], cfg, devices)
    return Model(params, dataclasses.replace(cfg, tower=cfg.tower and "vision" in parts), source=folder.absolute())


def open_model(folder: Path, vision_dir: Path | None = None, dtype: str | None = None) -> Model:
    """Open a model folder without reading weights; the arrays are `FileArray`s in `LazyStack`s.

    `dtype`: data type of the weights once they are read; None = as stored. `apply_plan`, `save` and `reconstruct`
    accept the model; `forward` and `generate` do not. Raises UserError under the conditions of `load`; weights that are
    not finite are detected only when they are read.
    """
    family, cfg = read_config(folder, vision_dir)
    cast = None if dtype is None else DTYPES[dtype]
    arrays = open_weights(make_slots(cfg, family), cfg, family, Checkpoint(folder), vision_dir, dtype=cast)
    stacks = stacked([(array.slot, array) for array in arrays], FileArray.stack)
    return Model(unflatten(stacks), cfg, source=folder.absolute())


def resolve(name: str | Path) -> Path:
    """Return the path of a local folder, or of the local snapshot of a hub id such as `llava-hf/llava-1.5-7b-hf`.

    Raises UserError if the folder does not exist, and the hub has no such model or cannot be reached.
    """
    folder, text = Path(name), str(name)
    inside = folder.glob("*.gguf") if os.path.isdir(folder) and not os.path.lexists(folder / "config.json") else ()
    if any(inside) or (text.endswith(".gguf") and os.path.isfile(folder)):
        raise UserError(f"{name}: is a GGUF file for llama.cpp: name the Hugging Face folder of the model instead")
    if os.path.isdir(folder):
        return folder
    if folder.is_absolute() or text.startswith(".") or text.count("/") != 1 or os.path.lexists(folder):
        raise UserError(f"{name}: no such folder (give a Hugging Face model folder or a hub id like org/name)")
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(text, allow_patterns=[*_HUB_FILES, "*.safetensors"]))
        if not has_weights(snapshot):
            snapshot = Path(snapshot_download(text, allow_patterns=[*_HUB_FILES, "pytorch_model*.bin"]))
    except Exception as error:  # the hub client raises its own, its transport's and OS errors
        raise UserError(f"{name}: no such folder, and not available from the hub ({reason(error)})") from error
    return snapshot


def read_config(folder: Path, vision_dir: Path | None = None) -> tuple[Family, ModelConfig]:
    """Return the family and ModelConfig of a folder, from its JSON files (and its experts' shapes, if it has weights).

    generation_config.json supplies the ids of begin, end and padding tokens that config.json lacks. Raises UserError
    for an unknown family, unsupported settings or quantisation, or invalid fields.
    """
    path, generation = folder / "config.json", folder / "generation_config.json"
    config = read_fields(path)
    family = detect(config, str(path))
    if find_storage(config, str(path)) is not None:  # refuses unknown quantisation
        family = with_separate_experts(family)
    if os.path.lexists(generation):
        ids, nested = read_fields(generation), family.text_config(config)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if config.get(name) is None and nested.get(name) is None and ids.get(name) is not None:
                config = {**config, name: ids[name]}
    if family.token_names:
        tokens = added_tokens(folder)
        config = {**config, **{name: tokens[token] for name, token in family.token_names if token in tokens}}
    vision = None
    if family.separate_vision:
        vision = read_fields(vision_dir / "config.json") if vision_dir is not None else config.get("vision_config")
    with reading(path), error_context(path):
        cfg = family.from_hf(config, vision)
        check_returned(family.from_hf, cfg, isinstance(cfg, ModelConfig), "a core.config.ModelConfig")
        channels = [layer.channel for stack in cfg.stacks.values() for layer in stack.layers]
        for part in {*channels, *([] if cfg.projector is None else [cfg.projector])}:
            activation(getattr(part, "activation", "silu"))  # refuses unknown ones
    if has_experts(cfg.text) and has_weights(folder):
        family = as_stored(family, cfg, {key: entry.shape for key, entry in Checkpoint(folder).entries.items()})
    if family.video is not None and cfg.vision is not None:
        cfg = dataclasses.replace(cfg, video=load_video_config(folder, family.video))
    return family, cfg


def read_fields(path: Path) -> dict[str, Any]:
    """Return the content of config.json or generation_config.json, with all known fields checked.

    Raises UserError if the file cannot be read (`read_json`) or a field is invalid (`check_fields`).
    """
    config: dict[str, Any] = read_json(path)
    check_fields(config, str(path))
    return config


def open_weights(
    slots: list[Slot],
    cfg: ModelConfig,
    family: Family,
    checkpoint: Checkpoint,
    vision_dir: Path | None,
    parts: Collection[str] = PARTS,
    dtype: np.dtype | None = None,
) -> list[FileArray]:
    """Return the weights of the model's `parts` in their files; `dtype`: of the weights once they are read.

    `vision_dir` has the tower of an original LLaVA or Bunny. Raises UserError that lists all unknown, missing or
    repeated keys, wrong shapes and dtypes.
    """
    holders: list[tuple[Checkpoint, Collection[str]]] = [(checkpoint, parts)]
    if family.separate_vision and vision_dir is not None and has_weights(vision_dir):
        holders = [(checkpoint, ("text", "projector")), (Checkpoint(vision_dir), ("vision",))]
    matches = [(holder, match_keys(slots, cfg, family, holder, parts)) for holder, parts in holders]
    location = " + ".join(str(holder.folder) for holder, _ in matches)
    refuse([problem for _, match in matches for problem in match.problems], family, location)
    match = matches[0][1]
    if match.tied is not None:
        embedding = match.keys[next(slot.key for slot in slots if slot.path == "text/embed_tokens/weight")]
        copies = [checkpoint.entries[key] for key in (match.tied, embedding)]
        cuts = [*range(0, math.prod(copies[0].shape), _PIECE), math.prod(copies[0].shape)]
        pairs = zip(*(copy.pieces(cuts) for copy in copies), strict=True)
        alike = (a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in pairs)
        if not all(alike):
            raise UserError(
                f"{checkpoint.folder}: tie_word_embeddings is true but {match.tied} differs from {embedding}: "
                "set it to false in config.json, or remove the wrong tensor"
            )
    sources = {name: holder.entries[key] for holder, match in matches for name, key in match.keys.items()}
    return [FileArray(sources[slot.key], slot, cast=dtype) for slot in slots if slot.part in parts]


def place(arrays: Sequence[FileArray], cfg: ModelConfig, mesh: Mesh | None) -> Params:
    """Read weights to the devices with several threads, each of which reads one block of a file at a time."""
    members: dict[str, list[FileArray]] = defaultdict(list)
    for array in arrays:
        members[array.slot.path].append(array)
    axes, flat = param_axes(cfg), {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for path, shape in param_shapes(cfg).items():
            if path in members:
                placement = None if mesh is None else sharding(mesh, axes[path], shape)
                flat[path] = _place(members[path], shape, placement, pool)
    return unflatten(flat)


def _place(
    arrays: list[FileArray], shape: tuple[int, ...], placement: NamedSharding | None, pool: ThreadPoolExecutor
) -> jax.Array:
    def bounds(index: Any) -> Bounds:
        return tuple((part.start or 0, part.stop or size) for part, size in zip(index, shape, strict=True))

    whole = {None: (slice(None),) * len(shape)}
    slices = (whole if placement is None else placement.addressable_devices_indices_map(shape)).values()
    # Devices that hold the same slice share one buffer.
    parts = {bounds(index) for index in slices if index is not None}
    blocks = {part: _aligned(part, arrays[0].dtype) for part in parts}
    starts = [(x, at) for x in arrays for at in range(0, x.slot.shape[0], max(1, _PART // x.slot.stride))]
    list(pool.map(lambda start: _fill(start[0], start[1], blocks), starts))  # raises what a thread raised
    if placement is None:
        return jax.device_put(*blocks.values())
    return jax.make_array_from_callback(shape, placement, lambda index: blocks[bounds(index)])


def _fill(array: FileArray, begin: int, blocks: Mapping[Bounds, np.ndarray]) -> None:
    """Copy `_PART` values of an array, from row `begin`, to the blocks of its parameter, in cache-sized pieces."""
    slot, targets = array.slot, []
    for bounds, block in blocks.items():
        for number in slot.place:
            (first, last), *inner = bounds
            if not first <= number < last:
                break
            bounds, block = tuple(inner), block[number - first]
        else:
            if slot.turned:
                bounds, block = bounds[::-1], block.T
            targets.append((bounds[0], tuple(slice(*bound) for bound in bounds[1:]), block))
    start = max(begin, min((rows[0] for rows, _, _ in targets), default=0))
    stop = min(slot.shape[0], begin + max(1, _PART // slot.stride), max((rows[1] for rows, _, _ in targets), default=0))
    if start >= stop:
        return
    rows = [*range(start, stop, max(1, _PIECE // slot.stride)), stop]
    for (at, end), piece in zip(itertools.pairwise(rows), array.pieces(rows, check=True), strict=True):
        for (first, last), columns, block in targets:
            low, high = max(first, at), min(last, end)
            if low < high:
                block[low - first : high - first] = piece[(slice(low - at, high - at), *columns)]


def _aligned(bounds: Bounds, dtype: np.dtype) -> np.ndarray:
    shape = [stop - start for start, stop in bounds]
    n_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


def blocks_of(arrays: Sequence[LazyArray | None], *, as_stored: bool) -> Iterator[np.ndarray] | None:
    """Return an iterator over groups of rows, at most `BLOCK` bytes each, that these weights fill side by side.

    None if they are in memory, or lie otherwise in the file than in `params` (`as_stored`: which does not matter).
    """
    files = [array for array in arrays if isinstance(array, FileArray)]
    if len(files) < len(arrays):
        return None
    first, slot = files[0], files[0].slot
    if slot.turned or slot.columns:
        if not as_stored or any(x.picks or x.source is not first.source for x in files):
            return None
        slot = dataclasses.replace(slot, shape=(slot.stop - slot.start, slot.width), columns=None, turned=False)
        first = dataclasses.replace(first, slot=slot)
    step = max(1, BLOCK // (slot.stride * first.dtype.itemsize))
    return first.pieces([*range(0, slot.shape[0], step), slot.shape[0]], once=True)
