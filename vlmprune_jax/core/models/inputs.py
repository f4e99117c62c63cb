"""The arrays that Hugging Face processors and batches hold, by their names, as inputs of a model in packed rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import numpy as np

from vlmprune_jax.base.checks import suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.media import Packed, merge_of, pack, repack, visuals_by_row
from vlmprune_jax.core.models.positions import AXES, grids_by_row, is_visual, mrope_positions


class VisualInputs(TypedDict, total=False):
    """Arrays that a Hugging Face processor returns for images and videos, besides token ids and attention mask."""

    pixel_values: Any
    """float[images, tiles or frames, 3, H, W] in order of appearance, or [batch, slots, 3, H, W] by row, with empty
    slots (zeros) at the end of rows that have fewer images; SmolVLM's rows may also be videos."""

    pixel_attention_mask: Any
    """int of the same shape without the channels, 1 = image, 0 = padding (SmolVLM)."""

    image_grid_thw: Any
    """int[images, 3], frames, rows and columns of patches, for images of varying size; `pixel_values` are then
    [patches of all images, values], as processors return them (or both in packed rows, see `patch_rows`)."""

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


TYPE_IDS = {"mm_token_type_ids", "token_type_ids"}
_IMAGES = ("pixel_values", "image_grid_thw", "image_position_ids", "spatial_shapes")
_VIDEOS = ("pixel_values_videos", "video_grid_thw", "video_position_ids")


class Inputs(NamedTuple):
    """Inputs of a model, on the host."""

    images: Packed | None
    items: dict[str, np.ndarray]
    """Inputs of other encoders, by the names of their arrays."""

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
    items, arrays = _encoder_items(cfg, input_ids, arrays)
    for name in arrays:
        if name not in VisualInputs.__annotations__:
            raise UserError(
                f"the model has no input array {name!r}{suggest(name, VisualInputs.__annotations__)}: leave it out"
            )
    ids = check_ids(cfg, input_ids, attention_mask)
    images = read_images(cfg, ids, attention_mask, arrays)
    types = arrays.get("token_type_ids")
    _check_types(cfg, ids, arrays.get("mm_token_type_ids") if types is None else types)
    if images is not None and (cfg.dynamic_resolution or len(images.values) == 1):
        images = repack(cfg, ids, attention_mask, images, packs)
    if not cfg.text.rope.sections:
        return Inputs(images, items)
    grid, times = (None, None) if images is None else (images.grid, images.times)
    options: dict[str, Any] = {"merge": merge_of(cfg), "tokens_per_second": cfg.tokens_per_second}
    return Inputs(
        images, items, *mrope_positions(ids, attention_mask, grid, times, tokens=cfg.visual_token_ids, **options)
    )


def check_ids(cfg: ModelConfig, input_ids: Any, attention_mask: Any) -> np.ndarray:
    """Return the ids as an array; raise UserError for ids outside the vocabulary, or packed rows of text."""
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
    return ids


def read_images(cfg: ModelConfig, ids: np.ndarray, attention_mask: Any, arrays: Mapping[str, Any]) -> Packed | None:
    """Return a processor's images and videos together in the order of their tokens; None without images.

    Arrays that list the images of all rows become one packed row. Raises UserError if they do not fit model and tokens.
    """
    if not cfg.dynamic_resolution and arrays.get("image_grid_thw") is not None:
        raise UserError("image_grid_thw is not for this model, whose images all have one size: leave it out")
    images, videos = (arrays.get(names[0]) for names in (_IMAGES, _VIDEOS))
    if videos is not None and cfg.video_token_id is None:
        raise UserError("pixel_values_videos is not for this model: pass the frames as images in pixel_values")
    if images is None and videos is None:
        for name, token in (("pixel_values", cfg.image_token_id), ("pixel_values_videos", cfg.video_token_id)):
            if token is not None and (positions := int((ids == token).sum())):
                raise UserError(f"input_ids have {positions} image positions, but {name} is missing: pass it")
        return None
    if cfg.vision is None:
        raise UserError("pixel_values is not for a model without a vision tower: leave it out")
    if not cfg.dynamic_resolution:
        return _read_tiles(cfg, ids, images, arrays.get("pixel_attention_mask"))
    if images is None or videos is None:
        return _read_patches(cfg, ids, attention_mask, arrays, _IMAGES if videos is None else _VIDEOS, None)
    sources = [
        _read_patches(cfg, ids, attention_mask, arrays, names, token)
        for names, token in ((_IMAGES, cfg.image_token_id), (_VIDEOS, cfg.video_token_id))
    ]
    by_source = [
        visuals_by_row(cfg, ids, attention_mask, source, (token or 0,))
        for source, token in zip(sources, (cfg.image_token_id, cfg.video_token_id), strict=True)
    ]
    rows = [sorted([*of_images, *of_videos]) for of_images, of_videos in zip(*by_source, strict=True)]
    return pack(cfg, rows, len(sources[1].values), sources[1])


def _read_tiles(cfg: ModelConfig, ids: np.ndarray, pixel_values: Any, pixel_attention_mask: Any) -> Packed:
    """Return tiles [tiles, channel, height, width] or by packed row, and which of their patches are not padding."""
    assert cfg.vision is not None
    shape, mask = np.shape(pixel_values), pixel_attention_mask
    masks_fit = mask is None or np.shape(mask) == (*shape[:-3], *shape[-2:])
    if len(shape) == 5:  # rows of images, or SmolVLM's videos; slots of zeros are empty
        filled, needed = np.asarray(pixel_values).any(axis=(2, 3, 4)), ids == cfg.image_token_id
        by_row = shape[0] > 0 and len(ids) % shape[0] == 0
        fits = by_row and (needed.reshape(shape[0], -1).sum(axis=1) == filled.sum(axis=1) * cfg.tokens_per_image).all()
        if not fits and masks_fit and needed.sum() == filled.sum() * cfg.tokens_per_image:
            pixel_values, mask = (None if x is None else np.asarray(x)[filled] for x in (pixel_values, mask))
    shape = np.shape(pixel_values)
    check_tiles(cfg, ids, shape)
    if not masks_fit:
        raise UserError(
            f"pixel_attention_mask has shape {list(np.shape(mask))} and pixel_values {list(shape)}: the shapes must be "
            "equal except for the channel axis"
        )
    values, real = (
        (pixel_values, mask) if len(shape) == 5 else (pixel_values[None], None if mask is None else mask[None])
    )
    if real is None or not ((hides := np.asarray(real) == 0).any(axis=(2, 3)) & ~hides.all(axis=(2, 3))).any():
        return Packed(values)
    if cfg.vision.positions is None or not cfg.vision.positions.spreads:
        raise UserError(
            "pixel_attention_mask hides parts of images, but this model's vision tower takes only whole images"
        )
    patch, (rows, columns) = cfg.vision.patch_size, (side // cfg.vision.patch_size for side in shape[-2:])
    whole = ~hides[..., : rows * patch, : columns * patch]
    return Packed(values, real=whole.reshape(*whole.shape[:2], rows, patch, columns, patch).any(axis=(3, 5)))


def check_tiles(cfg: ModelConfig, ids: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise UserError if the number of images in pixel_values does not match the image tokens in input_ids."""
    assert cfg.vision is not None
    wanted, per_image = (cfg.vision.channels, cfg.vision.image_size, cfg.vision.image_size), cfg.tokens_per_image
    if len(shape) not in (4, 5) or shape[-3:] != wanted:
        raise UserError(f"pixel_values has shape {list(shape)}, expected [images, {', '.join(map(str, wanted))}]")
    is_image = is_visual(ids, cfg.visual_token_ids)
    positions, packs = int(is_image.sum()), shape[0] if len(shape) == 5 else 1
    divides = packs > 0 and len(is_image) % packs == 0
    most = int(is_image.reshape(packs, -1).sum(axis=1).max(initial=0)) if divides else positions
    if len(shape) == 5 and (not divides or most > shape[1] * per_image):
        raise UserError(
            f"pixel_values has shape {list(shape)} for {len(is_image)} rows with up to {most} image positions: a row "
            f"has room for {shape[1] * per_image} ({per_image} per image)"
        )
    if len(shape) == 4 and positions != shape[0] * per_image:
        raise UserError(
            f"input_ids have {positions} image positions, but the images have {shape[0] * per_image} features: write "
            f"{per_image} ids {cfg.image_token_id} for each image"
        )


def _read_patches(
    cfg: ModelConfig,
    ids: np.ndarray,
    attention_mask: Any,
    arrays: Mapping[str, Any],
    names: tuple[str, ...],
    token: int | None,
) -> Packed:
    """Return images or videos of any size in packed rows, whose tokens have the id `token` (None: any)."""
    assert cfg.vision is not None
    values, grid = in_cells(cfg, *(arrays.get(name) for name in names))
    if grid is None:
        raise UserError(f"{names[0]} needs {names[1]}: pass both, as the processor returns them")
    values, grid = np.asarray(values, np.float32), np.asarray(grid)
    listed, width = values.ndim == grid.ndim == 2, cfg.vision.patch_values
    values, grid = (values[None], grid[None]) if listed else (values, grid)
    if values.ndim != 3 or grid.shape[:1] + grid.shape[2:] != (len(values), AXES) or len(ids) % max(len(values), 1):
        raise UserError(
            f"{names[0]} has shape {list(values.shape)} and {names[1]} {list(grid.shape)}, expected [patches, {width}] "
            f"and [images, 3], or packed rows [packs, patches, {width}] and [packs, images, 3] that divide the "
            f"{len(ids)} rows of the batch"
        )
    valid = True if attention_mask is None else np.asarray(attention_mask) != 0
    grids_by_row(is_visual(ids, cfg.visual_token_ids if token is None else (token,)) & valid, grid, cfg.vision.merge)
    most, cell = int(grid.prod(axis=2).sum(axis=1).max(initial=0)), cfg.vision.merge**2
    if values.shape[2] != width or (listed and most != values.shape[1]):
        raise UserError(
            f"{names[0]} has shape {list(values.shape[1:])}, expected [{most}, {width}] (patches of {names[1]}, values "
            "per patch)"
        )
    if most > values.shape[1] or values.shape[1] % cell:
        raise UserError(
            f"{names[0]} has {values.shape[1]} patches in a packed row, expected at least {most} (the images of "
            f"{names[1]}) and a multiple of {cell}"
        )
    times = arrays.get("second_per_grid_ts")
    if times is None or (names == _IMAGES and token is not None):
        return Packed(values, grid.astype(np.int32))
    times = np.asarray(times)[None] if listed else np.asarray(times)
    if times.shape != grid.shape[:2]:
        raise UserError(
            f"second_per_grid_ts has shape {list(times.shape)}, expected {list(grid.shape[:2])}: one number per video"
        )
    return Packed(values, grid.astype(np.int32), times=times)


def images_of(arrays: Mapping[str, Any]) -> Packed | None:
    """Return the images, or in their place the cached features, of a batch for training or calibration."""
    values = arrays.get("pixel_values")
    values = arrays.get("vision_features") if values is None else values
    return None if values is None else Packed(values, arrays.get("image_grid_thw"))


def encode_inputs(cfg: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `encode` beside the ids, from a batch for training or calibration."""
    names = ("attention_mask", "position_ids")
    inputs = {name: arrays.get(name) for name in names}
    return inputs | {"images": images_of(arrays), "items": cfg.encoder_inputs(arrays)}


def as_arrays(images: Packed) -> dict[str, Any]:
    """Return images in packed rows as arrays of a batch (undoes `images_of`)."""
    return {"pixel_values": images.values} | ({} if images.grid is None else {"image_grid_thw": images.grid})


def check_batch(cfg: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return a training batch in which the images and videos of a processor share packed rows.

    Raises UserError if the batch does not fit the model.
    """
    ids, mask = check_ids(cfg, arrays["input_ids"], arrays["attention_mask"]), arrays["attention_mask"]
    features, pixels = (arrays.get(name, ()) for name in ("vision_features", "pixel_values"))
    if "vision_features" in arrays or not cfg.tower:
        _check_features(cfg, len(ids), np.shape(features))
        return dict(arrays)
    if np.ndim(pixels) == 5:
        check_tiles(cfg, ids, np.shape(pixels))
        return dict(arrays)
    images = read_images(cfg, ids, mask, arrays)
    if images is None or ("pixel_values_videos" not in arrays and np.shape(pixels) == np.shape(images.values)):
        return dict(arrays)
    visuals = {*VisualInputs.__annotations__}
    return {name: array for name, array in arrays.items() if name not in visuals} | as_arrays(images)


def _encoder_items(
    cfg: ModelConfig, input_ids: Any, arrays: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays of a batch that the model's encoders read, and the others.

    Raises UserError if an array does not have an item for every `Encoder.tokens` tokens of a row.
    """
    items, ids = dict[str, np.ndarray](), np.asarray(input_ids)
    for name, encoder in cfg.encoders:
        needed, rest = np.divmod((ids == encoder.token_id).sum(axis=-1), encoder.tokens)
        array = np.asarray(arrays.get(encoder.array, np.zeros((len(ids), 0))))
        if rest.any() or array.shape[:1] != ids.shape[:1] or needed.max(initial=0) > array.shape[1]:
            raise UserError(
                f"{encoder.array} has shape {list(array.shape)}, but rows of input_ids have up to "
                f"{int((ids == encoder.token_id).sum(axis=-1).max(initial=0))} {name} tokens, {encoder.tokens} per "
                "item: pass float[rows, items, ...]"
            )
        if array.size:
            items[encoder.array] = array
    return items, {name: array for name, array in arrays.items() if name not in cfg.encoder_arrays}


def in_cells(
    cfg: ModelConfig, pixel_values: Any, image_grid_thw: Any, image_position_ids: Any, spatial_shapes: Any = None
) -> tuple[Any, Any]:
    """Reorder the patches of all images by merged cell; return [patches, values] and image grids int[images, 3].

    `image_position_ids`: int[images, patches, 2], column and row of each patch (-1: padding). `spatial_shapes`:
    int[images, 2], numbers of rows and columns. Without either, pixels and grids are returned unchanged.

    Raises UserError if the positions are not a complete grid of cells, or their number differs from the patches'.
    """
    if spatial_shapes is not None:
        image_position_ids = _row_by_row(np.asarray(spatial_shapes), np.shape(pixel_values))
    if image_position_ids is None:
        return pixel_values, image_grid_thw
    pixels, places, merge = np.asarray(pixel_values, np.float32), np.asarray(image_position_ids), merge_of(cfg)
    if image_grid_thw is not None or pixels.ndim != 3 or places.shape != (*pixels.shape[:2], 2):
        raise UserError(
            f"image_position_ids has shape {list(places.shape)} and pixel_values {list(pixels.shape)}: pass both as "
            "the processor returns them, without image_grid_thw"
        )
    patches, grids = [], []
    for image, at in zip(pixels, places, strict=True):
        real = (at >= 0).all(axis=1)
        columns, rows = (int(at[real, axis].max(initial=-1)) + 1 for axis in (0, 1))
        order = np.lexsort((at[real, 0], at[real, 1]))
        if real.sum() != rows * columns or rows % merge or columns % merge or rows < 1:
            raise UserError(
                f"image_position_ids of an image have {int(real.sum())} patches in {rows} rows and {columns} columns: "
                f"expected a full grid whose sides are multiples of {merge}"
            )
        cells = image[real][order].reshape(rows // merge, merge, columns // merge, merge, -1)
        patches.append(cells.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1))
        grids.append((1, rows, columns))
    return np.concatenate(patches), np.array(grids)


def _row_by_row(shapes: np.ndarray, pixels: tuple[int, ...]) -> np.ndarray:
    """Return the column and row of every patch of images whose patches come row by row, then padding (-1)."""
    if len(pixels) != 3 or shapes.shape != (pixels[0], 2) or (shapes.prod(axis=1) > pixels[1]).any():
        raise UserError(
            f"spatial_shapes has shape {list(shapes.shape)} and pixel_values {list(pixels)}: pass both as the "
            "processor returns them"
        )
    at, columns = np.arange(pixels[1])[None], np.maximum(shapes[:, 1:], 1)
    places = np.stack([at % columns, at // columns], axis=-1)
    return np.where((at < shapes.prod(axis=1)[:, None])[..., None], places, -1)


def with_places(cfg: ModelConfig, pixels: np.ndarray, grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert patches and grids to a processor's pixel_values and image_position_ids (undoes `in_cells`)."""
    sizes, merge = grids.prod(axis=1), merge_of(cfg)
    padded = np.zeros((len(grids), sizes.max(), pixels.shape[1]), pixels.dtype)
    places = np.full((*padded.shape[:2], 2), -1, np.int64)
    image_patches = np.split(pixels, np.cumsum(sizes)[:-1])
    for at, (_, rows, columns) in enumerate(grids):
        cells = image_patches[at].reshape(rows // merge, columns // merge, merge, merge, -1)
        padded[at, : sizes[at]] = cells.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
        places[at, : sizes[at]] = np.indices((rows, columns))[::-1].reshape(2, -1).T
    return padded, places


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


def _check_features(cfg: ModelConfig, rows: int, shape: tuple[int, ...]) -> None:
    each = cfg.feature_shape[1:] if cfg.dynamic_resolution else cfg.feature_shape
    if cfg.tower or len(shape) != 2 + len(each) or shape[2:] != each or not shape[0] or rows % shape[0]:
        raise UserError(
            f"vision_features has shape {list(shape)}, expected [{rows}, "
            f"{'tokens' if cfg.dynamic_resolution else 'images'}, {', '.join(map(str, each))}], or packed rows "
            f"that divide the {rows} (only for a model without its vision tower; otherwise pass pixel_values)"
        )
