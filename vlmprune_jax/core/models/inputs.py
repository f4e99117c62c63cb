"""Checks of a call's inputs: ids and images must fit the model and each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, cast

import numpy as np

from vlmprune_jax.base.checks import suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import IGNORED, ModelConfig
from vlmprune_jax.core.models.patch_rows import check_patches, check_types, joined
from vlmprune_jax.core.models.positions import is_visual


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


def visual_inputs(
    cfg: ModelConfig, input_ids: Any, attention_mask: Any, inputs: VisualInputs
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Check a processor's outputs; return the images and videos as `joined` does, and the mask of their pixels.

    The mask is None if it hides no pixel. Raises UserError for an array with an unknown name, or with a shape that does
    not match the model or the other arrays.
    """
    for name in inputs:
        if name not in VisualInputs.__annotations__:
            raise UserError(
                f"the model has no input array {name!r}{suggest(name, VisualInputs.__annotations__)}: leave it out"
            )
    visuals = joined(cfg, input_ids, attention_mask, inputs)
    if not cfg.dynamic_resolution and np.ndim(visuals["pixel_values"]) == 5:
        visuals["pixel_values"] = _filled_slots(cfg, np.asarray(input_ids), np.asarray(visuals["pixel_values"]))
    check_inputs(
        cfg,
        input_ids,
        visuals["pixel_values"],
        image_grid_thw=visuals["image_grid_thw"],
        attention_mask=attention_mask,
    )
    types = inputs.get("token_type_ids")
    check_types(cfg, input_ids, inputs.get("mm_token_type_ids") if types is None else types)
    return visuals, needed_mask(cfg, inputs.get("pixel_values"), inputs.get("pixel_attention_mask"))


def split_encoder_inputs(
    cfg: ModelConfig, input_ids: Any, arrays: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], VisualInputs]:
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
    return items, cast(VisualInputs, {name: array for name, array in arrays.items() if name not in cfg.encoder_arrays})


def _filled_slots(cfg: ModelConfig, ids: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Flatten pixels [videos, slots, 3, H, W] to a list of frames; return pixels of one entry per batch row unchanged.

    Slots of zeros are empty (reference: transformers' `SmolVLMModel.get_image_features`).
    """
    filled, positions = pixels.any(axis=(2, 3, 4)), int((ids == cfg.image_token_id).sum())
    if len(ids) % max(len(pixels), 1) == 0:
        needed = (ids == cfg.image_token_id).reshape(len(pixels), -1).sum(axis=1)
        if (needed == filled.sum(axis=1) * cfg.tokens_per_image).all():
            return pixels
    return pixels[filled] if positions == filled.sum() * cfg.tokens_per_image else pixels


def needed_mask(cfg: ModelConfig, pixel_values: Any, pixel_attention_mask: Any) -> np.ndarray | None:
    """Return `pixel_attention_mask`; None if it hides no pixel, or `in_cells` has already removed the hidden pixels.

    Raises UserError if the shapes of mask and pixels differ, or the vision tower can only read whole images.
    """
    if pixel_attention_mask is None or cfg.dynamic_resolution:
        return None
    mask, pixels = np.asarray(pixel_attention_mask), np.shape(pixel_values)
    if mask.shape != (*pixels[:-3], *pixels[-2:]):
        raise UserError(
            f"pixel_attention_mask has shape {list(mask.shape)} and pixel_values {list(pixels)}: the shapes must be "
            "equal except for the channel axis"
        )
    hides = mask.reshape(-1, mask.shape[-2] * mask.shape[-1]) == 0
    if not (hides.any(axis=1) & ~hides.all(axis=1)).any():
        return None
    if cfg.vision is None or cfg.vision.positions is None or not cfg.vision.positions.spreads:
        raise UserError(
            "pixel_attention_mask hides parts of images, but this model's vision tower takes only whole images"
        )
    return mask


def check_inputs(
    cfg: ModelConfig,
    input_ids: Any,
    pixel_values: Any,
    vision_features: Any = None,
    image_grid_thw: Any = None,
    attention_mask: Any = None,
) -> None:
    """Raise UserError for ids outside the vocabulary, packed rows, or image tokens that do not match the images."""
    ids = np.asarray(input_ids)
    if ids.ndim != 2:
        raise UserError(f"input_ids must be int[batch, seq], got shape {ids.shape}")
    if attention_mask is not None and not np.isin(attention_mask, (0, 1)).all():
        raise UserError(
            f"attention_mask has values up to {np.max(attention_mask)}, expected 0 and 1: give every sequence of a "
            "packed row its own row"
        )
    is_image = is_visual(ids, cfg.visual_token_ids)
    wrong = ~is_image & ((ids < 0) | (ids >= cfg.text.vocab_size))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UserError(
            f"input_ids[{row}, {column}] = {ids[row, column]} is outside the vocabulary of {cfg.text.vocab_size}"
        )
    if image_grid_thw is not None and not cfg.dynamic_resolution:
        raise UserError("image_grid_thw is not for this model, whose images all have one size: leave it out")
    if vision_features is not None or not cfg.tower:
        _check_features(cfg, len(ids), np.shape(vision_features))
    elif pixel_values is None:
        for name, token in (("pixel_values", cfg.image_token_id), ("pixel_values_videos", cfg.video_token_id)):
            if positions := int((ids == (IGNORED if token is None else token)).sum()):
                raise UserError(f"input_ids have {positions} image positions, but {name} is missing: pass it")
    elif cfg.vision is None:
        raise UserError("pixel_values is not for a model without a vision tower: leave it out")
    elif cfg.dynamic_resolution:
        check_patches(cfg, ids, attention_mask, pixel_values, image_grid_thw)
    else:
        _check_pixels(cfg, is_image, np.shape(pixel_values))


def _check_features(cfg: ModelConfig, rows: int, shape: tuple[int, ...]) -> None:
    each = cfg.feature_shape[1:] if cfg.dynamic_resolution else cfg.feature_shape
    if cfg.tower or len(shape) != 2 + len(each) or shape[2:] != each or not shape[0] or rows % shape[0]:
        raise UserError(
            f"vision_features has shape {list(shape)}, expected [{rows}, "
            f"{'tokens' if cfg.dynamic_resolution else 'images'}, {', '.join(map(str, each))}], or packed rows "
            f"that divide the {rows} (only for a model without its vision tower; otherwise pass pixel_values)"
        )


def _check_pixels(cfg: ModelConfig, is_image: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise UserError if the number of images in pixel_values does not match the image tokens in input_ids."""
    assert cfg.vision is not None
    wanted, per_image = (cfg.vision.channels, cfg.vision.image_size, cfg.vision.image_size), cfg.tokens_per_image
    if len(shape) not in (4, 5) or shape[-3:] != wanted:
        raise UserError(f"pixel_values has shape {list(shape)}, expected [images, {', '.join(map(str, wanted))}]")
    positions, packs = int(is_image.sum()), shape[0] if len(shape) == 5 else 1
    divides = packs > 0 and len(is_image) % packs == 0
    most = int(is_image.reshape(packs, -1).sum(axis=1).max(initial=0)) if divides else positions
    if len(shape) == 5 and (not divides or most > shape[1] * per_image):
        raise UserError(
            f"pixel_values has shape {list(shape)} for {len(is_image)} rows with up to {most} image positions: a row "
            f"has room for {shape[1] * per_image} ({per_image} per image)"
        )
    if len(shape) == 4 and positions not in (0, shape[0] * per_image):
        raise UserError(
            f"input_ids have {positions} image positions, but the images have {shape[0] * per_image} features: write "
            f"{per_image} ids {cfg.image_token_id} for each image"
        )
