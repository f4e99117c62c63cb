"""What a family says about images that are cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmprune_jax.core.errors import UserError

# Far above any model's (40), and few enough to list all grids: a config.json may name any number.
MAX_TILES = 1000
MAX_SIDE = 4096  # of a tile, or of any image that a tower takes (1,536 in the largest)
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


@dataclass(frozen=True)
class TilingConfig:
    """How images become tiles of `size` x `size` pixels: `min_tiles` to `max_tiles` in a grid, and perhaps a thumbnail.

    `pad` centres an image on a square first; it is for images that stay one tile (tiles are square already). `mean` and
    `std` normalise the tiles, `resample` is PIL's number of the filter. The images of a record may share `max_tiles`.
    """

    size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    pad: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int
    shares: bool

    def __post_init__(self) -> None:
        if self.size > MAX_SIDE:
            raise UserError(f"image tiles of {self.size} pixels a side: at most {MAX_SIDE}; is config.json damaged?")
        if not 1 <= self.min_tiles <= self.max_tiles <= MAX_TILES:
            raise UserError(
                f"image tiles: min_tiles {self.min_tiles} and max_tiles {self.max_tiles} must be 1 <= min <= max <= "
                f"{MAX_TILES}; change data.min_tiles or data.max_tiles"
            )


def whole_number(value: Any, name: str, where: str, least: int = 1) -> int:
    """A whole number of at least `least` in the field `name` of a file, or a UserError that names both."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(
            f"{where}: {name} is {value!r}, expected a whole number from {least}; restore it from the model's source"
        )
    return int(value)
