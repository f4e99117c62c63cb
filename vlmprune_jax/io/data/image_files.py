"""Decoding of image files and images inside data sets, with errors that name the file and the record."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.base.files import IMAGE_FORMATS, open_image
from vlmprune_jax.io.data.media import StoredImage

_CRISP = 96  # pixels per side up to which thumbnails are stored without loss
# Decoders warn of metadata, which is not used, and of sizes, which `max_pixels` limits; real problems raise errors.
# Silenced for the whole process, because warning filters are not per thread.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError, OSError):  # libtiff prints to stderr; not every build has it
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


def thumbnail(
    image: Path | StoredImage, record: str, *, side: int, max_pixels: int
) -> tuple[bytes, str, tuple[int, int]]:
    """Return (encoded JPEG or PNG, format, (width, height)) of an image reduced to sides of at most `side` pixels.

    Raises UserError naming the file and the record; also for an image of more than `max_pixels`.
    """
    with opened_image(image, record, max_pixels) as opened:
        opened.draft("RGB", (side, side))  # decodes a JPEG at reduced size
        small = to_rgb(opened)
        small.thumbnail((side, side))
    kind = "png" if max(small.size) <= _CRISP else "jpeg"
    encoded = io.BytesIO()
    small.save(encoded, kind, **({} if kind == "png" else {"quality": 80}))
    return encoded.getvalue(), kind, small.size


def read_rgb(image: Path | StoredImage, record: str, max_pixels: int) -> Image.Image:
    """Return a decoded image in RGB; raise UserError naming the file and the record, also above `max_pixels`."""
    with opened_image(image, record, max_pixels) as opened:
        return to_rgb(opened)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB."""
    if image.mode == "P" and "transparency" in image.info:
        # same colours as a direct conversion, without PIL's warning about transparent palettes
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def opened_image(path: Path | StoredImage, record: str, max_pixels: int | None = None) -> Iterator[Image.Image]:
    """Context that opens an image and reads its header; errors inside it name the file and the record."""
    try:
        with open_image(path if isinstance(path, Path) else path.read_bytes()) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise UserError(
                    f"{path}: image of {image.width}x{image.height} pixels exceeds the limit of {max_pixels} pixels: "
                    "shrink it or raise data.max_image_pixels"
                )
            yield image
    except UserError as error:
        raise UserError(f"{path} (record {record}): {str(error).removeprefix(f'{path}: ')}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} (record {record}): image is far too large ({error}): shrink it") from error
    except Exception as error:  # PIL decoders raise OSError, ValueError, SyntaxError, struct.error, ... by format
        problem = f"none of {', '.join(IMAGE_FORMATS)}" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise UserError(f"{path} (record {record}): not a readable image ({problem}): replace the file") from error
