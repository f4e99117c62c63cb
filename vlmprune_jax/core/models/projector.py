"""Projectors from vision tower to decoder, which may first join neighbouring patches into one feature."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from vlmprune_jax.core.models.layers import Leaf, Norm, Projection, activation, broadcast, unit_rms
from vlmprune_jax.core.projector import ProjectorConfig


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


def merged(x: jax.Array, factor: int) -> jax.Array:
    """Concatenate each `factor`^2 consecutive patches: [images, patches, n] -> [images, patches / f^2, n * f^2]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] // factor**2, -1)


def pooled(x: jax.Array, width: int) -> jax.Array:
    """Average n concatenated features of `width` channels: float[..., n * width] -> float[..., width]."""
    return x.reshape(*x.shape[:-1], -1, width).mean(axis=-2)


class Projector(nnx.Module):
    """Projector MLP linear_2(act(linear_1(features))); InternVL adds a layer norm, SmolVLM has one linear layer.

    In Gemma, it is a norm and one linear layer, applied to pooled features. A merger (Qwen-VL) normalises each patch;
    each deeper level of features (`deepstack`) has a separate merger.
    """

    def __init__(self, cfg: ProjectorConfig, vision_size: int, hidden_size: int):
        into = "shuffled" if cfg.shuffles else "vision"
        wide = vision_size * (1 if cfg.pools else cfg.downsample**2)
        sizes = {into: wide, "projector": cfg.hidden_size or hidden_size, "embed": hidden_size}
        self.linear = _linear(cfg, sizes, into) if cfg.kind in ("linear", "pool") else None
        norm = functools.partial(Norm, sizes, "vision", kind=cfg.norm, eps=cfg.norm_eps, offset=cfg.norm_offset)
        self.pool_norm = norm() if cfg.pools and not cfg.plain_norm else None
        self.pool_scale, self.pool_eps = cfg.feature_scale, cfg.norm_eps if cfg.plain_norm else None
        self.std_bias = Leaf(sizes, ("vision",)) if cfg.standardizes else None
        self.std_scale = Leaf(sizes, ("vision",)) if cfg.standardizes else None
        self.n_deepstack = cfg.deepstack
        if self.linear is not None:
            return
        merges = cfg.kind == "merger"
        if merges:
            sizes |= {"projector": wide, "vision": vision_size}
        self.patch_size = vision_size
        self.patch_norm = norm() if merges else None
        normalised = cfg.kind == "pixel_shuffle" and cfg.input_norm
        self.layer_norm = Norm(sizes, into, kind="layer", eps=cfg.norm_eps) if normalised else None
        self.linear_1 = Projection(sizes, ("projector",), (into,), bias=cfg.bias)
        self.linear_2 = Projection(sizes, ("embed",), ("projector",), bias=cfg.bias)
        if cfg.deepstack:
            self.deepstack = nnx.Dict({str(i): DeepMerger(cfg, sizes) for i in range(cfg.deepstack)})
        self.activation = cfg.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map vision features float[..., features] to decoder embeddings float[..., embed]."""
        if self.linear is not None:
            x = self._normalized(x)
            return x @ self.linear.weight.get_value() if isinstance(self.linear, Leaf) else self.linear(x)
        if self.patch_norm is not None:
            x = x[..., : self.linear_1.inputs[0]]
            patches = x.reshape(*x.shape[:-1], -1, self.patch_size)
            x = self.patch_norm(patches).reshape(x.shape)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return self.linear_2(activation(self.activation)(self.linear_1(x)))

    def _normalized(self, x: jax.Array) -> jax.Array:
        x = x if self.pool_scale == 1 else x * self.pool_scale
        if self.std_bias is not None and self.std_scale is not None:
            bias, scale = (broadcast(leaf.weight.get_value(), x.ndim) for leaf in (self.std_bias, self.std_scale))
            x = (x - bias) * scale
        if self.pool_eps is not None:
            return unit_rms(x, self.pool_eps)
        return x if self.pool_norm is None else self.pool_norm(x)

    def deepstack_features(self, x: jax.Array) -> jax.Array | None:
        """Return the features float[n, ..., embed] to add after the first n decoder layers (DeepStack), or None."""
        if not self.n_deepstack:
            return None
        _, *levels = jnp.split(x, 1 + self.n_deepstack, axis=-1)
        return jnp.stack([self.deepstack[str(i)](level) for i, level in enumerate(levels)])


def _linear(cfg: ProjectorConfig, sizes: Mapping[str, int], into: str) -> Projection | Leaf:
    if cfg.inputs_first:
        return Leaf(sizes, (into, "embed"))
    return Projection(sizes, ("embed",), (into,), bias=cfg.bias)


class DeepMerger(nnx.Module):
    """DeepStack merger linear_2(act(linear_1(norm(features)))) for the output of one middle block of the tower."""

    def __init__(self, cfg: ProjectorConfig, sizes: Mapping[str, int]):
        self.layer_norm = Norm(sizes, "shuffled", kind="layer", eps=cfg.norm_eps)
        self.linear_1 = Projection(sizes, ("projector",), ("shuffled",), bias=cfg.bias)
        self.linear_2 = Projection(sizes, ("embed",), ("projector",), bias=cfg.bias)
        self.activation = cfg.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(activation(self.activation)(self.linear_1(self.layer_norm(x))))
