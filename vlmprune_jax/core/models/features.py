"""Vision features: computing them with the tower, and inserting them at image tokens of the decoder's input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.projector import merged, pixel_shuffle, pooled
from vlmprune_jax.core.models.stack import fill
from vlmprune_jax.core.models.vision import VisionTower


def features_of(tower: VisionTower, cfg: ModelConfig, images: Packed) -> jax.Array:
    """Return the images' vision features, the input of the projector: [tiles, tokens, features] or in packed rows."""
    projector = cfg.projector
    if images.grid is not None:
        factor = 1 if projector is None else projector.downsample
        levels = [merged(level, factor) for level in tower.levels(images)]
        if projector is not None and projector.pools:
            levels = [pooled(level, tower.cfg.hidden_size) for level in levels]
        return jnp.concatenate(levels, axis=-1)
    states = tower(images)
    if cfg.feature_select == "patch":
        states = states[:, 1:]
    if projector is not None and (projector.shuffles or projector.pools):
        joined = pixel_shuffle(states, projector.downsample, projector.shuffle_version)
        states = pooled(joined, states.shape[-1]) if projector.pools else joined
    return states


def tower_features(tower: dict[str, Any], cfg: ModelConfig, images: Packed) -> jax.Array:
    """Compute `VisionLanguageModel.vision_features` with the vision tower's parameters only."""
    vision = cfg.vision
    assert vision is not None
    module = fill(nnx.eval_shape(lambda: VisionTower(vision)), tower)
    return features_of(module, cfg, images._replace(values=images.values.astype(jax.tree.leaves(tower)[0].dtype)))


def splice(x: jax.Array, is_image: jax.Array, features: jax.Array, packs: int) -> jax.Array:
    """Replace the embeddings at image positions (bool[batch, seq]) of `x` by vision features, in order.

    The features come in `packs` packed rows, each of which serves equally many rows of the batch.
    """
    flat = features.reshape(packs, -1, x.shape[-1])
    marks = is_image.reshape(packs, -1)
    index = jnp.clip(jnp.cumsum(marks, axis=1) - 1, 0, flat.shape[1] - 1)
    placed = jnp.take_along_axis(flat, index[..., None], axis=1).reshape(x.shape)
    return jnp.where(is_image[..., None], placed, x)
