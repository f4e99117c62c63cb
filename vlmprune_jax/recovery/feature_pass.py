"""The pass that fills a cache with the features of a frozen vision tower, once per image."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.config import ModelConfig
from vlmprune_jax.data.feature_loader import FeatureLoader, Picture
from vlmprune_jax.distributed.mesh import from_all, on_process_zero
from vlmprune_jax.errors import Stopped, UserError
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

    Every process calls it with the same pictures and computes those of its share; all of them run one program together.
    What is finished is published also when `progress` stops the pass.

    Args:
      tower: the parameters below "vision", on the mesh.
      batch_size: tiles that all devices take at a time.
      on_error: "stop" at a picture that cannot be read, or "skip" it: it has no tiles in the cache.
      progress: called with the number of pictures done.

    Raises:
      UserError: an image cannot be read, the disk is full, or the processes do not see the same folder.
    """
    mine = dict(list(pictures.items())[jax.process_index() :: jax.process_count()])
    _check_space(loader, list(mine.values()), on_error)
    decoded = _decoded(loader, mine, on_error, threads)
    rows, waiting = deque[np.ndarray](), deque[tuple[str, int]]()  # tiles, and how many each picture has
    finished, local = deque[np.ndarray](), batch_size // jax.process_count()
    compute = _make_compute(cfg, mesh)
    cast = jax.tree.map(lambda x: x.astype(loader.dtype), tower)
    left = len(mine)

    def advance() -> int:
        """Put away whole pictures and read others; returns how many this process has in hand."""
        nonlocal left
        while waiting and waiting[0][1] <= len(finished):
            key, count = waiting.popleft()
            states = [finished.popleft() for _ in range(count)]
            loader.cache.add({key: np.stack(states) if states else np.empty((0, *loader.shape), loader.dtype)})
            left -= 1
        while len(rows) < local and (found := next(decoded, None)) is not None:
            waiting.append((found[0], len(found[1])))
            rows.extend(found[1])
        return len(waiting)

    try:
        while any(from_all(advance)):
            progress(len(pictures) - min(left * jax.process_count(), len(pictures)))
            taken = [rows.popleft() for _ in range(min(local, len(rows)))]
            empty = np.zeros((local - len(taken), *loader.images.shape), np.float32)
            batch = np.concatenate([np.stack(taken), empty]) if taken else empty
            finished.extend(local_rows(compute(cast, batch))[: len(taken)])
        progress(len(pictures))
    except Stopped:
        loader.cache.publish()
        raise
    loader.cache.publish()


def _make_compute(cfg: ModelConfig, mesh: Mesh | None) -> Callable[[Params, np.ndarray], jax.Array]:
    """`tower_features` of this process's rows, as one program over the mesh."""
    where = None if mesh is None else batch_sharding(mesh, 3)
    program = jax.jit(lambda tower, pixels: tower_features(tower, cfg, pixels), out_shardings=where)

    def compute(tower: Params, rows: np.ndarray) -> jax.Array:
        dtype = jax.tree.leaves(tower)[0].dtype.name
        with step_context(mesh, dtype):
            return program(tower, place_rows({"pixels": rows}, mesh)["pixels"])

    return compute


def _decoded(
    loader: FeatureLoader, pictures: Mapping[str, Picture], on_error: str, threads: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(key, pixels) of the pictures in order, read ahead in threads."""
    if not pictures:
        return iter(())
    nothing = np.empty((0, *loader.images.shape), np.float32)

    def decode(item: tuple[str, Picture]) -> tuple[str, np.ndarray]:
        return item[0], _attempt(functools.partial(loader.pixels, item[1]), nothing, on_error)

    source = grain.MapDataset.source(list(pictures.items())).map(decode)
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)))


def _attempt(compute: Callable[[], Any], otherwise: Any, on_error: str) -> Any:
    try:
        return compute()
    except UserError:
        if on_error == "stop":
            raise
        return otherwise


def _check_space(loader: FeatureLoader, pictures: Sequence[Picture], on_error: str) -> None:
    def tiles() -> int:
        return sum(_attempt(functools.partial(loader.count, picture), 0, on_error) for picture in pictures)

    needed = sum(from_all(tiles)) * int(np.prod(loader.shape)) * jnp.dtype(loader.dtype).itemsize
    on_process_zero(lambda: check_space(loader.cache.folder / "*.safetensors", needed))
