"""Shapes of batches: one compiled program per bucket."""

from __future__ import annotations

from collections.abc import Sequence

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.data.images import Preparation


def length_buckets(data: DataSpec, cfg: ModelConfig) -> tuple[int, ...]:
    """Return the possible row lengths of a training batch, ascending; () if the longest record decides.

    Raises UserError if `data.length_buckets` and `data.max_length` contradict each other, or are too long for the
    model.
    """
    buckets, limit = data.length_buckets, data.max_length
    _check_buckets("data.length_buckets", buckets)
    cfg.check_row("data.max_length", limit or 0)
    cfg.check_row("the last of data.length_buckets", max(buckets, default=0))
    if buckets and limit not in (None, buckets[-1]):
        raise UserError(f"data.length_buckets={buckets} must end with data.max_length={limit}")
    return buckets or ((limit,) if limit else ())


def tile_buckets(data: DataSpec, preparation: Preparation | None) -> tuple[int, ...] | None:
    """Return `data.tile_buckets`, or defaults that hold every record of a model with tiles (else None)."""
    buckets = data.tile_buckets
    _check_buckets("data.tile_buckets", buckets)
    if buckets or preparation is None or preparation.usual == (1,):
        return buckets or None
    most = preparation.most(data.max_images)
    return (*(bucket for bucket in preparation.usual if bucket < most), most)


def image_buckets(data: DataSpec, preparation: Preparation | None) -> tuple[int, ...] | None:
    """Return `data.image_buckets`, or defaults that hold every image of a model for any size (else None).

    Raises UserError if they are set for a model whose images have one size.
    """
    buckets, own = data.image_buckets, () if preparation is None else preparation.image_buckets
    _check_buckets("data.image_buckets", buckets)
    if buckets and not own:
        raise UserError(f"data.image_buckets={buckets} is set, but this model's images have one size: unset it")
    return buckets or own or None


def _check_buckets(name: str, buckets: Sequence[int]) -> None:
    if buckets and (buckets[0] < 1 or list(buckets) != sorted(set(buckets))):
        raise UserError(f"{name}={buckets} must be positive and ascending")


def within_row(image_tokens: tuple[int, ...], length: int) -> tuple[int, ...]:
    """Return the ascending `image_buckets` that an image in a row of `length` tokens may need."""
    return tuple(bucket for i, bucket in enumerate(image_tokens) if not i or image_tokens[i - 1] < length)
