"""Computation of the features of a frozen vision tower, once per image, into a cache."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.base.atomic import check_space
from vlmprune_jax.base.errors import Stopped, UserError
from vlmprune_jax.base.processes import from_all, on_process_zero, process_count, process_number
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import rows_of_process
from vlmprune_jax.core.models.features import tower_features
from vlmprune_jax.core.models.params import param_shapes
from vlmprune_jax.core.models.vlm import Params
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.core.recovery.step import batch_sharding, local_rows, place_rows, step_context
from vlmprune_jax.core.recovery.trainable import assign_groups
from vlmprune_jax.io.data.encoding import smallest
from vlmprune_jax.io.data.feature_loader import FeatureLoader, Picture
from vlmprune_jax.io.data.images import GRIDS
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
    mine = _share(loader, pictures, on_error)
    queue, local = _Queue(loader, mine, on_error, threads), len(rows_of_process(mesh, batch_size))
    compute, cast = _make_compute(cfg, mesh), jax.tree.map(lambda x: x.astype(loader.dtype), tower)
    try:
        while True:
            shares = from_all(lambda: queue.advance(local))
            if not any(in_progress for in_progress, _ in shares):
                break
            progress(len(pictures) - min(queue.left * process_count(), len(pictures)))
            tiles = queue.take(local)
            batch = _batch(loader, tiles, local, max(tokens for _, tokens in shares))
            states = local_rows(compute(cast, batch))
            queue.finished.extend(
                state[: tile.shape.tokens or None] for state, tile in zip(states, tiles, strict=False)
            )
        progress(len(pictures))
    except Stopped:
        loader.cache.publish()
        raise
    loader.cache.publish()


class _Tile(NamedTuple):
    """Pixels of one tile, or patches of one image of varying size, with the patch grid of the image."""

    pixels: np.ndarray
    shape: ImageShape


class _Queue:
    """Images whose vision features a process is computing; `left` counts the images still to be cached."""

    def __init__(self, loader: FeatureLoader, pictures: Mapping[str, Picture], on_error: str, threads: int):
        self.finished, self.left = deque[np.ndarray](), len(pictures)
        self._loader, self._decoded = loader, _decoded(loader, pictures, on_error, threads)
        self._tiles, self._waiting = deque[_Tile](), deque[tuple[str, int]]()  # (key, number of tiles) of each picture

    def advance(self, rows: int) -> tuple[int, int]:
        """Cache finished images and read more images; return (images in progress, tokens of the largest next tile)."""
        loader, waiting = self._loader, self._waiting
        while waiting and waiting[0][1] <= len(self.finished):
            key, count = waiting.popleft()
            states = [self.finished.popleft() for _ in range(count)]
            nothing = np.empty((0, *[0] * (2 - len(loader.shape)), *loader.shape), loader.dtype)
            loader.cache.add({key: np.stack(states) if states else nothing})
            self.left -= 1
        while len(self._tiles) < rows and (picture := next(self._decoded, None)) is not None:
            waiting.append((picture[0], len(picture[1])))
            self._tiles.extend(picture[1])
        return len(waiting), max((tile.shape.tokens for tile in list(self._tiles)[:rows]), default=0)

    def take(self, rows: int) -> list[_Tile]:
        """Remove up to `rows` tiles from the queue and return them."""
        return [self._tiles.popleft() for _ in range(min(rows, len(self._tiles)))]


def _batch(loader: FeatureLoader, tiles: Sequence[_Tile], rows: int, tokens: int) -> dict[str, np.ndarray]:
    """Return a batch of `rows` rows that begins with `tiles`; images of any size are padded to a bucket."""
    buckets = loader.preparation.image_buckets
    room = smallest(buckets, tokens) if buckets else 0
    every = loader.images.arrays(loader.preparation.usual[-1] if room else rows, room).items()
    arrays = {name: np.zeros((rows, *size) if room else size, dtype) for name, (size, dtype) in every}
    for row, tile in enumerate(tiles):
        arrays[loader.images.array][row, : len(tile.pixels)] = tile.pixels
        if room:
            arrays[GRIDS][row, : len(tile.shape.grids)] = tile.shape.grids
    return arrays


def _make_compute(cfg: ModelConfig, mesh: Mesh | None) -> Callable[[Params, dict[str, np.ndarray]], jax.Array]:
    """Return a function that computes vision features of a batch of tiles, compiled once per shape."""
    sharding = None if mesh is None else batch_sharding(mesh, 3)
    program = jax.jit(
        lambda tower, rows: tower_features(tower, cfg, rows["pixel_values"], rows.get(GRIDS)), out_shardings=sharding
    )

    def compute(tower: Params, rows: dict[str, np.ndarray]) -> jax.Array:
        dtype = jax.tree.leaves(tower)[0].dtype.name
        with step_context(mesh, dtype):
            return program(tower, place_rows(rows, mesh))

    return compute


def _decoded(
    loader: FeatureLoader, pictures: Mapping[str, Picture], on_error: str, threads: int
) -> Iterator[tuple[str, list[_Tile]]]:
    """Yield (cache key, tiles) of every image in order; threads decode images ahead."""
    if not pictures:
        return iter(())

    def tiles(picture: Picture) -> list[_Tile]:
        pixels, shape = loader.pixels(picture), loader.shape_of(picture)
        return [_Tile(tile, shape) for tile in ([pixels] if shape.tokens else pixels)]

    def decode(item: tuple[str, Picture]) -> tuple[str, list[_Tile]]:
        return item[0], _attempt(functools.partial(tiles, item[1]), [], on_error)

    source = grain.MapDataset.source(list(pictures.items())).map(decode)
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)))


def _attempt(compute: Callable[[], Any], otherwise: Any, on_error: str) -> Any:
    try:
        return compute()
    except UserError:
        if on_error == "stop":
            raise
        return otherwise


def _share(loader: FeatureLoader, pictures: Mapping[str, Picture], on_error: str) -> dict[str, Picture]:
    """Return the images whose vision features this process computes."""
    keys, turns = list(pictures), slice(process_number(), None, process_count())

    def count() -> list[int]:
        return [_attempt(functools.partial(loader.count, pictures[key]), 0, on_error) for key in keys[turns]]

    shares = from_all(count)
    needed = sum(map(sum, shares)) * int(np.prod(loader.shape)) * jnp.dtype(loader.dtype).itemsize
    on_process_zero(lambda: check_space(loader.cache.folder / "*.safetensors", needed))
    if loader.preparation.merge:
        counts = {key: shares[place % len(shares)][place // len(shares)] for place, key in enumerate(keys)}
        keys.sort(key=lambda key: -counts[key])
    return {key: pictures[key] for key in keys[turns]}
