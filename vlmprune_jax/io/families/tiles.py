"""Shapes of processed images and videos (tiles, patches), and settings for dividing images into tiles."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmprune_jax.base.errors import UserError

# Maximum number of tiles: far above any model's (40), and small enough to list all grids.
MAX_TILES = 1000
MAX_SIDE = 4096  # pixels per side of a tile or image (the largest real tower takes 1,536)
LANCZOS, BILINEAR, BICUBIC = 1, 2, 3  # of PIL.Image.Resampling


@dataclass(frozen=True)
class ImageShape:
    """Tile or patch grid of a prepared image, `rows` x `columns`, and its number of tiles (`slots`) in the batch.

    A slot is one entry of a batch's image array: a whole image or a tile. A tile grid may have one more slot, the last,
    for its overview. For models that take images of any size, an image is one slot, its pieces are patches, and
    `tokens` is the number of its tokens; otherwise `tokens` is 0 and every slot takes the model's `tokens_per_image`.
    If such images are cut into tiles, `pieces` are the patch grids (rows, columns) of all slots. `interval` is the time
    from one temporal patch of a video to the next (seconds; 0 for images). `pixels`: of the largest image made on the
    way.
    """

    rows: int = 1
    columns: int = 1
    slots: int = 1
    tokens: int = 0
    pieces: tuple[tuple[int, int], ...] = ()
    interval: float = 0.0
    pixels: int = field(default=0, compare=False, repr=False)

    def positions(self, per_slot: int) -> int:
        """Return an image's number of decoder tokens; `per_slot`: tokens per tile (used unless image sizes vary)."""
        return self.tokens or per_slot * self.slots

    def positions_by_mark(self, per_slot: int, marks: int) -> list[int]:
        """Return the decoder tokens that replace each of an image's `marks` placeholder tokens in the prompt."""
        if marks != len(self.pieces):
            return [self.positions(per_slot) // marks] * marks
        patches = [rows * columns for rows, columns in self.pieces]
        return [self.tokens * count // sum(patches) for count in patches]

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """Patch grid (frames, rows, columns) of every slot of an image of any size."""
        return [(1, rows, columns) for rows, columns in self.pieces or ((self.rows, self.columns),)]


@dataclass(frozen=True)
class VideoShape(ImageShape):
    """Patch grid of a video's frames, and the frame times that the prompt states.

    `rows`, `columns`: of each frame. `slots`, `tokens`: of all frames together.
    """

    times: tuple[float, ...] = ()
    """Seconds at which each temporal patch is: the mean of its first and last frame."""

    duration: float = 0.0
    """Seconds of the whole video."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patch grid (temporal patches, rows, columns) of a video of any size."""
        return (len(self.times), self.rows, self.columns)

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """Patch grid (temporal patches, rows, columns) of the video, as a list with one entry."""
        return [self.grid]


@dataclass(frozen=True)
class TilingConfig:
    """Settings that cut an image into a grid of `min_tiles` to `max_tiles` tiles of `size` x `size` pixels.

    `thumbnail` adds the whole image as one more tile. `pad` centres an image on a square first; it applies to images
    that stay one tile. `mean` and `std` normalise the tiles, `resample` is PIL's number of the filter. With `shares`
    the images of a record share `max_tiles`.
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
            raise UserError(
                f"image tiles have {self.size} pixels per side, more than the maximum of {MAX_SIDE}: correct "
                "config.json"
            )
        if not 1 <= self.min_tiles <= self.max_tiles <= MAX_TILES:
            raise UserError(
                f"image tiles: min_tiles {self.min_tiles} and max_tiles {self.max_tiles} must be 1 <= min <= max <= "
                f"{MAX_TILES}: change data.min_tiles or data.max_tiles"
            )
