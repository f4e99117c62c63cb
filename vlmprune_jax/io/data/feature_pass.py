"""Computation of the features of a frozen vision tower, once per image, into a cache."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.base.atomic import check_space
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.processes import from_all, on_process_zero, process_count, process_number
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import rows_of_process
from vlmprune_jax.core.models.media import AXES, Media, Packed
from vlmprune_jax.core.models.params import param_shapes
from vlmprune_jax.core.models.vlm import Params, tower_features
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.core.recovery.program import batch_sharding, local_rows, place_rows, step_context
from vlmprune_jax.core.recovery.trainable import assign_groups
from vlmprune_jax.io.data.encoding import smallest
from vlmprune_jax.io.data.feature_loader import FeatureLoader, Picture
from vlmprune_jax.io.families.tiles import ImageShape

TOWER = "vision"


def check_frozen(cfg: ModelConfig, config: RecoverConfig) -> None:
    """Raise UserError if features are cached for a model without images, or while training changes the vision tower."""
    if cfg.vision is None:
        raise UserError("data.feature_cache: this model has no vision tower: unset feature_cache")
    trained = assign_groups(list(param_shapes(cfg)), config.trainable)
    if any(path.startswith(f"{TOWER}/") for path in trained):
        raise UserError(
            f"data.feature_cache: recover.trainable={config.trainable!r} trains the vision tower, which changes its "
            "features: unset feature_cache, or train decoder, lora or projector"
        )


def feature_identity(
    cfg: ModelConfig, weights: Mapping[str, str], preparation: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """Return all that cached vision features depend on, apart from the image.

    These are the tower's config, its weights (digest and dtype), the selected states, the image preprocessing, and the
    dtype of the computation.
    """
    assert cfg.vision is not None
    assert cfg.projector is not None
    shuffle = {name: getattr(cfg.projector, name) for name in ("kind", "downsample", "shuffle_version")}
    return {
        "holds": "features of a vision tower",
        "weights": dict(weights),
        "tower": dataclasses.asdict(cfg.vision),
        "selection": {"feature_select": cfg.feature_select, **shuffle},
        "images": dict(preparation),
        "dtype": dtype,
    }


def compute_features(
    tower: Params,
    cfg: ModelConfig,
    loader: FeatureLoader,
    pictures: Mapping[str, Picture],
    *,
    batch_size: int,
    on_error: str,
    threads: int,
    mesh: Mesh | None,
    progress: Callable[[int], None],
) -> None:
    """Compute the vision features of images and add them to the cache.

    Every process must call this function with the same pictures, and computes its share. All processes run one program
    together; for images of varying size, one program per padded size, largest first. Each program is compiled once.
    Finished features are published even if `progress` stops the pass.

    Args:
      tower: parameters below "vision", on the mesh.
      cfg: config of the model.
      loader: loader that reads and preprocesses pictures, and owns the cache.
      pictures: pictures by their cache key.
      batch_size: number of tiles per batch, over all devices.
      on_error: "stop" at a picture that cannot be read, or "skip" it (it then has no tiles in the cache).
      threads: number of threads that read images.
      mesh: device mesh on which the tower is computed.
      progress: called with the number of finished pictures.

    Raises UserError if an image cannot be read, the disk is full, or the processes see different folders.
    """
    shares, local = _shares(loader, pictures, on_error), len(rows_of_process(mesh, batch_size))
    compute, cast = _make_compute(cfg, mesh), jax.tree.map(lambda x: x.astype(loader.dtype), tower)
    varied = bool(loader.preparation.merge)  # every image is one row, of as many tokens as it has
    tokens = [[count for count in share.values() if count] if varied else [0] * sum(share.values()) for share in shares]
    starts, mine = range(0, max(map(len, tokens)), local), shares[process_number()]

    def results() -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        rows, waiting = _rows(loader, pictures, mine, on_error, threads), dict[str, list[np.ndarray]]()
        nothing = np.empty((0, *[0] * (2 - len(loader.shape)), *loader.shape), loader.dtype)
        finished = {key: nothing for key, count in mine.items() if not count}
        yield (n_finished := len(finished)), finished
        for start in starts:
            chosen = list[_Row]()
            read = functools.partial(itertools.islice, rows, local)
            from_all(lambda: chosen.extend(read()))  # noqa: B023 (an image that one process cannot read stops all)
            largest = max(max(sizes[start : start + local], default=0) for sizes in tokens)
            states, finished = local_rows(compute(cast, _batch(loader, chosen, local, largest))), {}
            for row, state in zip(chosen, states, strict=False):
                waiting.setdefault(row.key, []).append(state[: row.shape.tokens or None])
                if row.last:
                    tiles = waiting.pop(row.key)
                    finished[row.key] = nothing if row.pixels is None else np.stack(tiles)
            n_finished += len(finished)
            yield min(n_finished * process_count(), len(pictures)), finished

    loader.cache.fill(results(), progress)
    progress(len(pictures))


class _Row(NamedTuple):
    """One tile, or one image of varying size: its pixels (None: the image cannot be read) and the image's shape."""

    key: str
    pixels: np.ndarray | None
    shape: ImageShape
    last: bool


def _rows(
    loader: FeatureLoader, pictures: Mapping[str, Picture], counts: Mapping[str, int], on_error: str, threads: int
) -> Iterator[_Row]:
    """Yield the rows of the images in `counts`, {cache key: tiles or tokens}; threads decode images ahead."""

    def decode(key: str) -> list[_Row]:
        shape, varied = loader.shape_of(pictures[key]), bool(loader.preparation.merge)

        def tiles() -> Sequence[np.ndarray]:
            pixels = loader.pixels(pictures[key])
            if (shape.positions(1), varied or len(pixels)) != (counts[key], varied or counts[key]):
                raise UserError(f"{pictures[key].image}: has changed since this command started: run it again")
            return [pixels] if varied else list(pixels[:, None])

        read = _attempt(tiles, [None] * (1 if varied else counts[key]), on_error)
        return [_Row(key, pixels, shape, number == len(read)) for number, pixels in enumerate(read, start=1)]

    readable = [key for key, count in counts.items() if count]
    if readable:
        source = grain.MapDataset.source(readable).map(decode)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
        yield from itertools.chain.from_iterable(source.to_iter_dataset(options))


def _batch(loader: FeatureLoader, chosen: Sequence[_Row], rows: int, tokens: int) -> dict[str, Packed]:
    """Return a batch of `rows` rows that begins with `chosen`; images of any size are padded to a bucket."""
    buckets = loader.preparation.image_buckets
    room = smallest(buckets, tokens) if buckets else 0
    slots, images = loader.preparation.usual[-1] if room else 1, loader.images
    values = np.zeros((rows, images.room(slots, room), *images.shape), images.dtype)
    grid = np.zeros((rows, slots, AXES), np.int32) if room else None
    for number, row in enumerate(chosen):
        if row.pixels is not None:
            values[number, : len(row.pixels)] = row.pixels
        if grid is not None:
            grid[number, : len(row.shape.grids)] = row.shape.grids
    return {"vision": Packed(values, grid)}


def _make_compute(cfg: ModelConfig, mesh: Mesh | None) -> Callable[[Params, Media], jax.Array]:
    """Return a function that computes vision features of a batch of tiles, compiled once per shape."""
    sharding = None if mesh is None else batch_sharding(mesh, 3)
    program = jax.jit(lambda tower, rows: tower_features(tower, cfg, rows["vision"]), out_shardings=sharding)

    def compute(tower: Params, rows: Media) -> jax.Array:
        dtype = jax.tree.leaves(tower)[0].dtype.name
        with step_context(mesh, dtype):
            return program(tower, place_rows(rows, mesh))

    return compute


def _attempt(compute: Callable[[], Any], otherwise: Any, on_error: str) -> Any:
    try:
        return compute()
    except UserError:
        if on_error == "stop":
            raise
        return otherwise


def _shares(loader: FeatureLoader, pictures: Mapping[str, Picture], on_error: str) -> list[dict[str, int]]:
    """Return the images that each process computes, {cache key: tiles or tokens}; 0 for unreadable ones.

    Raises UserError if the disk has no room for all features.
    """
    keys, processes = list(pictures), process_count()

    def count() -> list[int]:
        mine = keys[process_number() :: processes]
        return [_attempt(functools.partial(loader.count, pictures[key]), 0, on_error) for key in mine]

    counted = from_all(count)
    counts = {key: counted[number % processes][number // processes] for number, key in enumerate(keys)}
    needed = sum(counts.values()) * int(np.prod(loader.shape)) * jnp.dtype(loader.dtype).itemsize
    on_process_zero(lambda: check_space(loader.cache.folder / "*.safetensors", needed))
    if loader.preparation.merge:
        keys.sort(key=lambda key: -counts[key])
    return [{key: counts[key] for key in keys[process::processes]} for process in range(processes)]
