"""The CLIP vision tower (its computed part) and LLaVA's projector."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from vlmprune_jax.config import ProjectorConfig, VisionConfig
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.models.layers import LayerNorm, Projection, activation, attend, declare


class Leaf(nnx.Module):
    """A parameter that is not part of a projection or norm."""

    def __init__(self, sizes: Mapping[str, int], axes: tuple[str, ...]):
        self.weight = declare(sizes, axes)


class VisionAttention(nnx.Module):
    """Bidirectional attention with biases."""

    def __init__(self, sizes: Mapping[str, int]):
        heads, into = ("vision_heads", "vision_head"), ("vision",)
        self.q_proj = Projection(sizes, heads, into, bias=True)
        self.k_proj = Projection(sizes, heads, into, bias=True)
        self.v_proj = Projection(sizes, heads, into, bias=True)
        self.out_proj = Projection(sizes, into, heads, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class VisionMlp(nnx.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, cfg: VisionConfig, sizes: Mapping[str, int]):
        self.fc1 = Projection(sizes, ("vision_mlp",), ("vision",), bias=True)
        self.fc2 = Projection(sizes, ("vision",), ("vision_mlp",), bias=True)
        self.activation = cfg.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(activation(self.activation)(self.fc1(x)))


class VisionLayer(nnx.Module):
    """One pre-norm block, stacked for a scan."""

    def __init__(self, cfg: VisionConfig, sizes: Mapping[str, int]):
        self.layer_norm1 = LayerNorm(sizes, "vision", eps=cfg.norm_eps)
        self.self_attn = VisionAttention(sizes)
        self.layer_norm2 = LayerNorm(sizes, "vision", eps=cfg.norm_eps)
        self.mlp = VisionMlp(cfg, sizes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionTower(nnx.Module):
    """CLIP's tower up to the feature layer; blocks above it are neither loaded nor run."""

    def __init__(self, cfg: VisionConfig):
        self.cfg = cfg
        sizes = {
            "vision": cfg.hidden_size,
            "vision_heads": cfg.heads,
            "vision_head": cfg.hidden_size // cfg.heads,
            "vision_mlp": cfg.mlp,
            "channel": cfg.channels,
            "patch_row": cfg.patch_size,
            "patch_column": cfg.patch_size,
            "position": cfg.n_patches + 1,
        }
        self.class_embedding = Leaf(sizes, ("vision",))
        self.patch_embedding = Leaf(sizes, ("vision", "channel", "patch_row", "patch_column"))
        self.position_embedding = Leaf(sizes, ("position", "vision"))
        self.pre_layrnorm = LayerNorm(sizes, "vision", eps=cfg.norm_eps)
        self.layers = VisionLayer(cfg, {**sizes, "layer": cfg.n_layers})

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """float[images, 1 + patches, vision] states of float[images, channel, height, width] pixels."""
        n, channels, size, patch = pixels.shape[0], self.cfg.channels, self.cfg.image_size, self.cfg.patch_size
        grid = size // patch
        pixels = pixels[:, :, : grid * patch, : grid * patch]
        patches = pixels.reshape(n, channels, grid, patch, grid, patch).transpose(0, 2, 4, 1, 3, 5)
        weight = self.patch_embedding.weight.get_value()
        x = patches.reshape(n, grid * grid, -1) @ weight.reshape(weight.shape[0], -1).T
        cls = jnp.broadcast_to(self.class_embedding.weight.get_value()[None, None], (n, 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.position_embedding.weight.get_value()[None]
        x = constrain(self.pre_layrnorm(x), ("batch", None, None))
        graph, state = nnx.split(self.layers)
        return jax.lax.scan(lambda h, layer: (nnx.merge(graph, layer)(h), None), x, state)[0]


class Projector(nnx.Module):
    """linear_2(act(linear_1(features)))."""

    def __init__(self, cfg: ProjectorConfig, vision_size: int, hidden_size: int):
        sizes = {"vision": vision_size, "projector": hidden_size, "embed": hidden_size}
        self.linear_1 = Projection(sizes, ("projector",), ("vision",), bias=cfg.bias)
        self.linear_2 = Projection(sizes, ("embed",), ("projector",), bias=cfg.bias)
        self.activation = cfg.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(activation(self.activation)(self.linear_1(x)))
