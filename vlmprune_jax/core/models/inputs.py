"""The arrays that Hugging Face processors return, by their names, as inputs of a model in packed rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import numpy as np

from vlmprune_jax.base.checks import suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.media import Media, Packed, grids_by_row, is_visual, mrope_positions, pack_sources, repack


class VisualInputs(TypedDict, total=False):
    """Arrays that a Hugging Face processor returns for images and videos, besides token ids and attention mask."""

    pixel_values: Any
    """float[images, tiles or frames, 3, H, W] in order of appearance, or rows of these, with empty slots (zeros) at the
    end of rows that have fewer images; SmolVLM's rows may also be videos."""

    pixel_attention_mask: Any
    """int of the same shape without the channels, 1 = image, 0 = padding (SmolVLM)."""

    image_grid_thw: Any
    """int[images, 3], frames, rows and columns of patches, for images of varying size; `pixel_values` are then
    [patches of all images, values]."""

    image_position_ids: Any
    """int[images, patches, 2], columns and rows of patches (-1: padding), instead of the grid, with `pixel_values`
    [images, patches, values] (Gemma 4)."""

    spatial_shapes: Any
    """int[images, 2], rows and columns of patches, with `pixel_values` [images, patches, values], row by row and then
    padding (LFM2-VL)."""

    pixel_values_videos: Any
    """Like `pixel_values`, for videos."""

    video_grid_thw: Any
    """Like `image_grid_thw`, for videos; the first number of a grid is its number of temporal patches."""

    video_position_ids: Any
    """Like `image_position_ids`, for videos; each frame counts as an image."""

    second_per_grid_ts: Any
    """float[videos], seconds from one temporal patch to the next (Qwen2.5-VL; None: 1)."""

    num_frames_per_video: Any
    """Ignored, because the token ids contain this number."""

    mm_token_type_ids: Any
    """int[batch, seq], types of tokens; only checked, because the token ids contain this information."""

    token_type_ids: Any
    """`mm_token_type_ids` under the name that Gemma 3's processor gives it."""

    media: Media
    """Inputs in packed rows instead of all arrays above, as `vp.batches` returns them."""


_IMAGES = ("pixel_values", "image_grid_thw", "image_position_ids", "spatial_shapes")
_VIDEOS = ("pixel_values_videos", "video_grid_thw", "video_position_ids")


class Inputs(NamedTuple):
    """Inputs of a model, on the host."""

    media: Media

    positions: np.ndarray | None = None
    """M-RoPE positions int32[batch, 3, seq]; None for models with one position per token."""

    offsets: np.ndarray | None = None
    """int32[batch], from the number of a row's tokens to the position of text that follows; None like `positions`."""


def read_inputs(cfg: ModelConfig, input_ids: Any, attention_mask: Any, arrays: Mapping[str, Any], packs: int) -> Inputs:
    """Check a processor's outputs, and return them as inputs of the model.

    `arrays`: by the names of `VisualInputs` and of the model's encoders. `packs`: number of packed rows of the result;
    tiles in packed rows stay as they are.

    Raises UserError for an array with an unknown name, or with a shape that does not match the model or other arrays.
    """
    media = _read_media(cfg, input_ids, attention_mask, arrays, packs)
    types = arrays.get("token_type_ids")
    _check_types(cfg, input_ids, arrays.get("mm_token_type_ids") if types is None else types)
    images = media.get("vision", Packed(None))
    if images.grid is not None:
        images = repack(cfg, input_ids, attention_mask, images, packs)
        media = {**media, "vision": images}
    if not cfg.text.rope.sections:
        return Inputs(media)
    options: dict[str, Any] = {"merge": cfg.merge, "tokens_per_second": cfg.tokens_per_second}
    grid, times, tokens = images.grid, images.times, cfg.visual_token_ids
    return Inputs(media, *mrope_positions(input_ids, attention_mask, grid, times, tokens=tokens, **options))


def batch_media(cfg: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays of a batch for training or calibration that `read_inputs` takes."""
    return {name: array for name, array in arrays.items() if name in _names(cfg)}


def _names(cfg: ModelConfig) -> tuple[str, ...]:
    return (*VisualInputs.__annotations__, *(encoder.array for _, encoder in cfg.encoders))


def check_batch(cfg: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return a training batch whose images, videos and items are in packed rows under "media".

    The outputs of a processor get one packed row for each row. Raises UserError if the batch does not fit the model.
    """
    ids, inputs = arrays["input_ids"], batch_media(cfg, arrays)
    media = _read_media(cfg, ids, arrays["attention_mask"], inputs, len(ids))
    return {name: array for name, array in arrays.items() if name not in inputs} | {"media": media}


def _read_media(
    cfg: ModelConfig, input_ids: Any, attention_mask: Any, arrays: Mapping[str, Any], packs: int
) -> dict[str, Packed]:
    """Return the images and videos, and the items of other encoders, in packed rows; a processor's images in `packs`.

    Raises UserError for ids outside the vocabulary, packed rows of text, or arrays that do not fit model and tokens.
    """
    ids = np.asarray(input_ids)
    if ids.ndim != 2:
        raise UserError(f"input_ids must be int[batch, seq], got shape {ids.shape}")
    if attention_mask is not None and not np.isin(attention_mask, (0, 1)).all():
        raise UserError(
            f"attention_mask has values up to {np.max(attention_mask)}, expected 0 and 1: give every sequence of a "
            "packed row its own row"
        )
    wrong = ~is_visual(ids, cfg.visual_token_ids) & ((ids < 0) | (ids >= cfg.text.vocab_size))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UserError(
            f"input_ids[{row}, {column}] = {ids[row, column]} is outside the vocabulary of {cfg.text.vocab_size}"
        )
    for name in arrays:
        if name not in (names := _names(cfg)):
            raise UserError(f"the model has no input {name!r}{suggest(name, names)}: leave it out")
    media = dict(arrays.get("media") or {})
    media |= {
        name: Packed(np.asarray(arrays[encoder.array]))
        for name, encoder in cfg.encoders
        if arrays.get(encoder.array) is not None
    }
    images = None if "vision" in media else _read_images(cfg, ids, attention_mask, arrays, packs)
    media |= {} if images is None else {"vision": images}
    for name, encoder in cfg.encoders:
        tokens = (ids == encoder.token_id).sum(axis=1)
        shape = np.shape(media[name].values) if name in media else (len(ids), 0)
        if (tokens % encoder.tokens).any() or shape[:1] != (len(ids),) or tokens.max() > shape[1] * encoder.tokens:
            raise UserError(
                f"{encoder.array} has shape {list(shape)}, but rows of input_ids have up to {tokens.max()} {name} "
                f"tokens, {encoder.tokens} per item: pass float[rows, items, ...]"
            )
    if "vision" in media:
        _check_images(cfg, ids, attention_mask, media["vision"])
    return media


def _read_images(
    cfg: ModelConfig, ids: np.ndarray, attention_mask: Any, arrays: Mapping[str, Any], packs: int
) -> Packed | None:
    """Return a processor's images and videos together in the order of their tokens; None without images."""
    if not cfg.dynamic_resolution and arrays.get("image_grid_thw") is not None:
        raise UserError("image_grid_thw is not for this model, whose images all have one size: leave it out")
    sources = list[tuple[Packed, int]]()
    for names, token in ((_IMAGES, cfg.image_token_id), (_VIDEOS, cfg.video_token_id)):
        positions = 0 if token is None else int((ids == token).sum())
        if arrays.get(names[0]) is None:
            if positions:
                raise UserError(f"input_ids have {positions} image positions, but {names[0]} is missing: pass it")
        elif cfg.vision is None:
            raise UserError(f"{names[0]} is not for a model without a vision tower: leave it out")
        elif token is None:
            raise UserError(f"{names[0]} is not for this model: pass the frames as images in pixel_values")
        elif cfg.dynamic_resolution:
            sources.append((_read_patches(cfg, arrays, names), token))
        elif (tiles := _read_tiles(cfg, arrays, positions)).values.size:
            sources.append((tiles, token))
    if len(sources) == 1:
        return repack(cfg, ids, attention_mask, sources[0][0], packs)
    return pack_sources(cfg, ids, attention_mask, sources, packs) if sources else None


def _read_tiles(cfg: ModelConfig, arrays: Mapping[str, Any], positions: int) -> Packed:
    """Return a processor's tiles, and which of their patches are not padding; slots of zeros are left out."""
    assert cfg.vision is not None
    mask: Any = arrays.get("pixel_attention_mask")
    shape, mask_shape = np.shape(arrays["pixel_values"]), np.shape(mask)
    wanted, per_image = (cfg.vision.channels, cfg.vision.image_size, cfg.vision.image_size), cfg.tokens_per_image
    if len(shape) < 4 or shape[-3:] != wanted:
        raise UserError(f"pixel_values has shape {list(shape)}, expected [images, {', '.join(map(str, wanted))}]")
    if mask_shape not in ((), (*shape[:-3], *shape[-2:])):
        raise UserError(
            f"pixel_attention_mask has shape {list(mask_shape)} and pixel_values {list(shape)}: the shapes must be "
            "equal except for the channel axis"
        )
    tiles, real = np.asarray(arrays["pixel_values"]).reshape(-1, *wanted), None
    filled: Any = np.ones(len(tiles), bool)
    if len(shape) > 4 and len(tiles) * per_image > positions:
        filled = tiles.any(axis=(1, 2, 3))
    if filled.sum() * per_image != positions:
        raise UserError(
            f"input_ids have {positions} image positions, but the images have {filled.sum() * per_image} features: "
            f"write {per_image} ids {cfg.image_token_id} for each image"
        )
    if mask_shape:
        size, (rows, columns) = cfg.vision.patch_size, (side // cfg.vision.patch_size for side in shape[-2:])
        whole = np.asarray(mask).reshape(-1, *shape[-2:])[filled] != 0
        parts = ~whole.all(axis=(1, 2)) & whole.any(axis=(1, 2))
        if parts.any() and (cfg.vision.positions is None or not cfg.vision.positions.spreads):
            raise UserError(
                "pixel_attention_mask hides parts of images, but this model's vision tower takes only whole images"
            )
        whole = whole[:, : rows * size, : columns * size].reshape(-1, rows, size, columns, size)
        real = whole.any(axis=(2, 4))[None] if parts.any() else None
    return Packed(tiles[None, filled], real=real)


def _read_patches(cfg: ModelConfig, arrays: Mapping[str, Any], names: tuple[str, ...]) -> Packed:
    """Return a processor's images or videos of any size as one packed row."""
    assert cfg.vision is not None
    values, grid, *sides = (arrays.get(name) for name in names)
    if any(side is not None for side in sides):
        values, grid = in_cells(cfg, values, *sides)
    if grid is None:
        raise UserError(f"{names[0]} needs {names[1]}: pass both, as the processor returns them")
    values, grid = np.asarray(values, np.float32), np.asarray(grid)
    expected = [int(grid.prod(axis=-1).sum()), cfg.vision.patch_values]
    if grid.ndim != 2 or grid.shape[1] != 3 or list(values.shape) != expected:
        raise UserError(
            f"{names[0]} has shape {list(values.shape)}, expected {expected} (patches of all images, values per patch)"
            f", and {names[1]} {list(grid.shape)}, expected [images, 3]"
        )
    times = None if names == _IMAGES else arrays.get("second_per_grid_ts")
    if times is not None and np.shape(times) != (len(grid),):
        raise UserError(f"second_per_grid_ts has shape {list(np.shape(times))}, expected [{len(grid)}], one per video")
    return Packed(values[None], grid[None].astype(np.int32), times=None if times is None else np.asarray(times)[None])


def _check_images(cfg: ModelConfig, ids: np.ndarray, attention_mask: Any, images: Packed) -> None:
    """Raise UserError if images in packed rows do not fit the model, or the image tokens of their rows."""
    if cfg.vision is None:
        raise UserError("images are not for a model without a vision tower: leave them out")
    vision, shape, grid = cfg.vision, np.shape(images.values), np.shape(images.grid)
    each: tuple[int, ...] = (vision.channels, vision.image_size, vision.image_size)
    marks, tokens, cell = is_visual(ids, cfg.visual_token_ids), cfg.tokens_per_image, 1
    if not cfg.tower:
        each = cfg.feature_shape
    if cfg.dynamic_resolution:
        each, tokens, cell = (vision.patch_values,) if cfg.tower else each[1:], 1, vision.merge**2 if cfg.tower else 1
        marks = marks if attention_mask is None else marks & (np.asarray(attention_mask) != 0)
    fits = len(shape) == 2 + len(each) and shape[2:] == each and shape[0] > 0 and shape[1] % cell == 0
    fits = fits and (len(grid) == 3 and grid[::2] == (shape[0], 3) if cfg.dynamic_resolution else not grid)
    if not fits or len(ids) % shape[0]:
        raise UserError(
            f"images have shape {list(shape)} and grids {list(grid)}, expected packed rows that divide the {len(ids)} "
            f"rows: [packs, {f'multiple of {cell}' if cfg.dynamic_resolution else 'tiles'}, "
            f"{', '.join(map(str, each))}]{' and [packs, images, 3]' * cfg.dynamic_resolution}"
            f"{'' if cfg.tower else ', features (the model is without its vision tower)'}"
        )
    if cfg.dynamic_resolution:
        grids_by_row(marks, images.grid, vision.merge)
    needed, room = int(marks.reshape(shape[0], -1).sum(axis=1).max(initial=0)), shape[1] * tokens // cell
    if needed > room:
        raise UserError(
            f"images have shape {list(shape)} for {len(ids)} rows with up to {needed} image positions: a packed row "
            f"has room for {room}"
        )


def in_cells(
    cfg: ModelConfig, pixel_values: Any, position_ids: Any = None, spatial_shapes: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reorder the patches of images by merged cell; return [patches of all images, values] and grids int[images, 3].

    `pixel_values`, float[images, patches, values], has the patches row by row and then padding. Their sides are in
    `position_ids`, int[images, patches, 2], column and row of each patch (-1: padding), or in `spatial_shapes`,
    int[images, 2], numbers of rows and columns. Raises UserError unless every image is a full grid of cells.
    """
    pixels, merge = np.asarray(pixel_values, np.float32), cfg.merge
    name, stated = ("spatial_shapes", spatial_shapes) if position_ids is None else ("image_position_ids", position_ids)
    shapes = stated = np.asarray(stated)
    if position_ids is not None and stated.ndim == 3:
        shapes = stated.max(axis=1, initial=-1)[:, ::-1] + 1
    fits = pixels.ndim == 3 and shapes.shape == (len(pixels), 2) and (shapes.prod(axis=1) <= pixels.shape[1]).all()
    fits = fits and not (shapes % merge).any() and shapes.min(initial=1) > 0
    if not fits or (position_ids is not None and not np.array_equal(_row_by_row(shapes, pixels.shape[1]), stated)):
        raise UserError(
            f"{name} has shape {list(stated.shape)} and pixel_values {list(pixels.shape)}: pass both as the processor "
            f"returns them (patches of a full grid row by row, sides that are multiples of {merge}, then padding)"
        )
    patches = [image[_cell_order(rows, columns, merge)] for image, (rows, columns) in zip(pixels, shapes, strict=True)]
    return np.concatenate(patches), np.pad(shapes, ((0, 0), (1, 0)), constant_values=1)


def with_places(cfg: ModelConfig, pixels: np.ndarray, grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert patches and grids to a processor's pixel_values and image_position_ids (undoes `in_cells`)."""
    sizes = grids.prod(axis=1)
    padded = np.zeros((len(grids), sizes.max(), pixels.shape[1]), pixels.dtype)
    for image, patches, (_, rows, columns) in zip(padded, np.split(pixels, np.cumsum(sizes)[:-1]), grids, strict=True):
        image[_cell_order(rows, columns, cfg.merge)] = patches
    return padded, _row_by_row(grids[:, 1:], sizes.max())


def _cell_order(rows: int, columns: int, merge: int) -> np.ndarray:
    """Return the numbers, row by row, of an image's patches in the order of their merged cells."""
    numbers = np.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge)
    return numbers.transpose(0, 2, 1, 3).ravel()


def _row_by_row(shapes: np.ndarray, patches: int) -> np.ndarray:
    """Return the column and row of every patch, int[images, patches, 2], of images row by row; -1 for padding."""
    number, columns = np.arange(patches), np.maximum(shapes[:, 1:], 1)
    places = np.stack([number % columns, number // columns], axis=-1)
    return np.where((number < shapes.prod(axis=1)[:, None])[..., None], places, -1)


def _check_types(cfg: ModelConfig, input_ids: Any, types: Any) -> None:
    """Raise UserError for mm_token_type_ids that contradict input_ids (1: image tokens, 2: video tokens)."""
    if types is None:
        return
    ids, types = np.asarray(input_ids), np.asarray(types)
    for number, name, token in ((1, "image", cfg.image_token_id), (2, "video", cfg.video_token_id)):
        if types.shape != ids.shape or ((types == number) != (ids == token)).any():
            raise UserError(
                f"mm_token_type_ids does not mark the {name} tokens (id {token}) of input_ids by {number}: pass both "
                "as the processor returns them"
            )
