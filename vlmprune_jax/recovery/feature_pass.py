"""The pass that fills a cache with the features of a frozen vision tower, once per image."""

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

from vlmprune_jax.core.config import ImageShape, ModelConfig
from vlmprune_jax.core.errors import Stopped, UserError
from vlmprune_jax.data.feature_loader import FeatureLoader, Picture
from vlmprune_jax.data.images import GRIDS
from vlmprune_jax.distributed.mesh import from_all, on_process_zero
from vlmprune_jax.hf.disk.atomic import check_space
from vlmprune_jax.models.vlm import Params, tower_features
from vlmprune_jax.recovery.step import batch_sharding, local_rows, place_rows, step_context


def feature_identity(
    cfg: ModelConfig, weights: Mapping[str, str], preparation: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """What features depend on beside the image: the tower and its weights (a digest and their dtype), what is selected
    of its states, how images become arrays, and the dtype of the computation.
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
    """Add the features of these pictures, by their keys, to the loader's cache.

    Every process calls it with the same pictures and computes those of its share; all of them run one program together,
    or one for each of the sizes that images of any size are padded to, the largest of them first: each is compiled
    once, in turn, and nothing waits for it but this pass. What is finished is
    published also when `progress` stops the pass.

    Args:
      tower: the parameters below "vision", on the mesh.
      batch_size: tiles that all devices take at a time.
      on_error: "stop" at a picture that cannot be read, or "skip" it: it has no tiles in the cache.
      progress: called with the number of pictures done.

    Raises:
      UserError: an image cannot be read, the disk is full, or the processes do not see the same folder.
    """
    mine = _share(loader, pictures, on_error)
    decoded = _decoded(loader, mine, on_error, threads)
    rows, waiting = deque[_Tile](), deque[tuple[str, int]]()  # tiles, and how many each picture has
    finished, local = deque[np.ndarray](), batch_size // jax.process_count()
    compute = _make_compute(cfg, mesh)
    cast = jax.tree.map(lambda x: x.astype(loader.dtype), tower)
    left = len(mine)

    def advance() -> tuple[int, int]:
        """Put away whole pictures and read others; returns how many this process has in hand, and the tokens that the
        next ones of any size need.
        """
        nonlocal left
        while waiting and waiting[0][1] <= len(finished):
            key, count = waiting.popleft()
            states = [finished.popleft() for _ in range(count)]
            nothing = np.empty((0, *[0] * (2 - len(loader.shape)), *loader.shape), loader.dtype)
            loader.cache.add({key: np.stack(states) if states else nothing})
            left -= 1
        while len(rows) < local and (found := next(decoded, None)) is not None:
            waiting.append((found[0], len(found[1])))
            rows.extend(found[1])
        return len(waiting), max((tile.shape.tokens for tile in list(rows)[:local]), default=0)

    try:
        while True:
            hands = from_all(advance)
            if not any(in_hand for in_hand, _ in hands):
                break
            progress(len(pictures) - min(left * jax.process_count(), len(pictures)))
            taken = [rows.popleft() for _ in range(min(local, len(rows)))]
            batch = _batch(loader, taken, local, max(tokens for _, tokens in hands))
            states = local_rows(compute(cast, batch))
            finished.extend(one[: tile.shape.tokens or None] for one, tile in zip(states, taken, strict=False))
        progress(len(pictures))
    except Stopped:
        loader.cache.publish()
        raise
    loader.cache.publish()


class _Tile(NamedTuple):
    """Pixels of a tile, or patches of an image of any size, and what its picture becomes."""

    pixels: np.ndarray
    shape: ImageShape


def _batch(loader: FeatureLoader, tiles: Sequence[_Tile], rows: int, tokens: int) -> dict[str, np.ndarray]:
    """Tiles as the first of so many rows; images of any size are padded to a bucket that holds so many tokens."""
    room = next((bucket for bucket in loader.preparation.image_buckets if bucket >= tokens), 0)
    arrays = {name: np.zeros(size, dtype) for name, (size, dtype) in loader.images.arrays(rows, room).items()}
    for row, tile in enumerate(tiles):
        arrays[loader.images.array][row, : len(tile.pixels)] = tile.pixels
        if GRIDS in arrays:
            arrays[GRIDS][row] = tile.shape.grid
    return arrays


def _make_compute(cfg: ModelConfig, mesh: Mesh | None) -> Callable[[Params, dict[str, np.ndarray]], jax.Array]:
    """`tower_features` of this process's rows, as one program over the mesh for each of their shapes."""
    where = None if mesh is None else batch_sharding(mesh, 3)
    program = jax.jit(
        lambda tower, rows: tower_features(tower, cfg, rows["pixel_values"], rows.get(GRIDS)), out_shardings=where
    )

    def compute(tower: Params, rows: dict[str, np.ndarray]) -> jax.Array:
        dtype = jax.tree.leaves(tower)[0].dtype.name
        with step_context(mesh, dtype):
            return program(tower, place_rows(rows, mesh))

    return compute


def _decoded(
    loader: FeatureLoader, pictures: Mapping[str, Picture], on_error: str, threads: int
) -> Iterator[tuple[str, list[_Tile]]]:
    """(key, tiles) of the pictures in order, read ahead in threads."""
    if not pictures:
        return iter(())

    def tiles(picture: Picture) -> list[_Tile]:
        pixels = loader.pixels(picture)
        return [_Tile(one, loader.shape_of(picture)) for one in pixels]

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
    """The pictures that this process computes, those of any size by size, so that batches hold like ones.

    Raises:
      UserError: there is no room for all features on the disk, or an image cannot be read.
    """
    keys, turns = list(pictures), slice(jax.process_index(), None, jax.process_count())

    def count() -> list[int]:
        return [_attempt(functools.partial(loader.count, pictures[key]), 0, on_error) for key in keys[turns]]

    shares = from_all(count)
    needed = sum(map(sum, shares)) * int(np.prod(loader.shape)) * jnp.dtype(loader.dtype).itemsize
    on_process_zero(lambda: check_space(loader.cache.folder / "*.safetensors", needed))
    if loader.preparation.merge:
        counts = {key: shares[place % len(shares)][place // len(shares)] for place, key in enumerate(keys)}
        keys.sort(key=lambda key: -counts[key])
    return {key: pictures[key] for key in keys[turns]}
