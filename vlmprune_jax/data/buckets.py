"""The shapes that batches may have: as many compiled programs as buckets."""

from __future__ import annotations

from collections.abc import Sequence

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.data.images import Preparation


def length_buckets(data: DataSpec, cfg: ModelConfig) -> tuple[int, ...]:
    """Tokens per row that a training batch can have, ascending; () where the longest record decides.

    Raises:
      UserError: `data.length_buckets` and `data.max_length` contradict each other, or are too much for the model.
    """
    buckets, limit = data.length_buckets, data.max_length
    _check_buckets("data.length_buckets", buckets)
    cfg.check_row("data.max_length", limit or 0)
    cfg.check_row("the last of data.length_buckets", max(buckets, default=0))
    if buckets and limit not in (None, buckets[-1]):
        raise UserError(f"data.length_buckets {buckets} must end with data.max_length {limit}, the longest row")
    return buckets or ((limit,) if limit else ())


def tile_buckets(data: DataSpec, preparation: Preparation | None) -> tuple[int, ...] | None:
    """`data.tile_buckets`, or those that hold every record of a model whose `preparation` cuts images (else None)."""
    given = data.tile_buckets
    _check_buckets("data.tile_buckets", given)
    if given or preparation is None or preparation.usual == (1,):
        return given or None
    most = preparation.most(data.max_images)
    return (*(bucket for bucket in preparation.usual if bucket < most), most)


def image_buckets(data: DataSpec, preparation: Preparation | None) -> tuple[int, ...] | None:
    """`data.image_buckets`, or those that hold every image of a model that takes any size (else None).

    Raises:
      UserError: they are given for another model.
    """
    given, own = data.image_buckets, () if preparation is None else preparation.image_buckets
    _check_buckets("data.image_buckets", given)
    if given and not own:
        raise UserError(f"data.image_buckets {given} given, but this model does not take images of any size")
    return given or own or None


def _check_buckets(name: str, given: Sequence[int]) -> None:
    if given and (given[0] < 1 or list(given) != sorted(set(given))):
        raise UserError(f"{name} {given} must be positive and ascending")


def within_row(image_tokens: tuple[int, ...], length: int) -> tuple[int, ...]:
    """Of ascending `image_buckets` those that an image in a row of so many tokens may need."""
    return tuple(one for place, one in enumerate(image_tokens) if not place or image_tokens[place - 1] < length)
