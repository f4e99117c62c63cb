"""Projectors from vision tower to decoder, which may first join neighbouring patches into one feature."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from vlmprune_jax.core.config import ProjectorConfig
from vlmprune_jax.core.models.layers import Leaf, Norm, Projection, activation, broadcast, unit_rms


def pixel_shuffle(x: jax.Array, factor: int, version: str) -> jax.Array:
    """Concatenate `factor` x `factor` neighbouring patches to one longer feature (pixel shuffle of InternVL 1.5).

    float[images, grid * grid, vision] -> float[images, (grid / factor)^2, vision * factor^2]. In version "v2", output
    cell (r, c) concatenates the input cells of its square, row by row; in "v1", the output cells are transposed.
    """
    n, positions, width = x.shape
    grid = round(positions**0.5)
    small = grid // factor
    x = x.reshape(n, small, factor, small, factor, width)
    x = x.transpose(0, 1, 3, 2, 4, 5) if version == "v2" else x.transpose(0, 3, 1, 2, 4, 5)
    return x.reshape(n, small * small, factor * factor * width)


def pooled(x: jax.Array, width: int) -> jax.Array:
    """Average n concatenated features of `width` channels: float[..., n * width] -> float[..., width]."""
    return x.reshape(*x.shape[:-1], -1, width).mean(axis=-2)


class TwoLayers(nnx.Module):
    """Two linear layers, linear_2(act(linear_1(features))), with an optional layer norm before them."""

    def __init__(self, cfg: ProjectorConfig, sizes: Mapping[str, int], into: str, norm: bool):
        self.layer_norm = Norm(sizes, into, kind="layer", eps=cfg.norm_eps) if norm else None
        self.linear_1 = Projection(sizes, ("projector",), (into,), bias=cfg.bias)
        self.linear_2 = Projection(sizes, ("embed",), ("projector",), bias=cfg.bias)
        self.activation = cfg.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map vision features float[..., features] to decoder embeddings float[..., embed]."""
        x = x if self.layer_norm is None else self.layer_norm(x)
        return self.linear_2(activation(self.activation)(self.linear_1(x)))


class Projector(TwoLayers):
    """Projector from vision features to decoder embeddings; see `ProjectorConfig` for its kinds.

    A merger (Qwen-VL) normalises each patch; each deeper level of features (`deepstack`) has a separate merger, whose
    layer norm follows the joining of patches.
    """

    def __init__(self, cfg: ProjectorConfig, vision_size: int, hidden_size: int):
        into = "shuffled" if cfg.shuffles else "vision"
        wide = vision_size * (1 if cfg.pools else cfg.downsample**2)
        sizes = {into: wide, "projector": cfg.hidden_size or hidden_size, "embed": hidden_size}
        norm = functools.partial(Norm, sizes, "vision", kind=cfg.norm, eps=cfg.norm_eps, offset=cfg.norm_offset)
        self.cfg, self.vision_size = cfg, vision_size
        self.pool_norm = norm() if cfg.pools and not cfg.plain_norm else None
        self.std_bias = Leaf(sizes, ("vision",)) if cfg.standardizes else None
        self.std_scale = Leaf(sizes, ("vision",)) if cfg.standardizes else None
        if cfg.kind in ("linear", "pool"):
            whole = Leaf(sizes, (into, "embed")) if cfg.inputs_first else None
            self.linear: Projection | Leaf | None = whole or Projection(sizes, ("embed",), (into,), bias=cfg.bias)
            return
        self.linear, merges = None, cfg.kind == "merger"
        if merges:
            sizes |= {"projector": wide, "vision": vision_size}
        self.patch_norm = norm() if merges else None
        super().__init__(cfg, sizes, into, norm=cfg.kind == "pixel_shuffle" and cfg.input_norm)
        if cfg.deepstack:
            self.deepstack = nnx.Dict({str(i): TwoLayers(cfg, sizes, into, norm=True) for i in range(cfg.deepstack)})

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map vision features float[..., features] to decoder embeddings float[..., embed]."""
        if self.linear is not None:
            x = x if self.cfg.feature_scale == 1 else x * self.cfg.feature_scale
            if self.std_bias is not None and self.std_scale is not None:
                bias, scale = (broadcast(leaf.weight.get_value(), x.ndim) for leaf in (self.std_bias, self.std_scale))
                x = (x - bias) * scale
            if self.cfg.plain_norm:
                x = unit_rms(x, self.cfg.norm_eps)
            elif self.pool_norm is not None:
                x = self.pool_norm(x)
            return x @ self.linear.weight.get_value() if isinstance(self.linear, Leaf) else self.linear(x)
        if self.patch_norm is not None:
            x = x[..., : self.linear_1.inputs[0]]
            x = self.patch_norm(x.reshape(*x.shape[:-1], -1, self.vision_size)).reshape(x.shape)
        return super().__call__(x)

    def deepstack_features(self, x: jax.Array) -> jax.Array | None:
        """Return the features float[n, ..., embed] to add after the first n decoder layers (DeepStack), or None."""
        if not self.cfg.deepstack:
            return None
        _, *levels = jnp.split(x, 1 + self.cfg.deepstack, axis=-1)
        return jnp.stack([self.deepstack[str(i)](level) for i, level in enumerate(levels)])
