"""FLOPs of the forward pass, by part of the model, and the additional FLOPs of the backward pass."""

from __future__ import annotations

import math
from collections.abc import Collection

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer, array_axes, layer_runs
from vlmprune_jax.core.models.params import param_axes, param_shapes


def weight_flops(cfg: ModelConfig, prefix: str, trained: Collection[str], passes: bool) -> int:
    """Return the FLOPs per token of all matrices under a parameter path; `passes` includes the backward pass.

    For experts, only the weights that one token uses are counted.
    """
    axes, total = param_axes(cfg), 0
    for path, size in _active_weights(cfg).items():
        is_matrix = not path.endswith("/bias") and len([axis for axis in axes[path] if axis != "layer"]) > 1
        if path.startswith(prefix) and is_matrix:
            total += 2 * size * (1 + passes + (path in trained))
    return total


def active_params(cfg: ModelConfig) -> int:
    """Return the number of parameters that the computation of one token uses."""
    return sum(_active_weights(cfg).values())


def _active_weights(cfg: ModelConfig) -> dict[str, int]:
    """Return how many weights of each parameter one token uses, by path (fewer than all for experts)."""
    axes, counts = param_axes(cfg), {path: math.prod(shape) for path, shape in param_shapes(cfg).items()}
    for path in counts:
        stack, _, rest = path.partition("/layers/")
        if rest:
            layer = layer_runs(cfg.stack(stack).layers)[int(rest.split("/")[0])].layer
            active = layer.active_sizes()
            for axis in array_axes(axes[path]):
                counts[path] = counts[path] * active.get(axis, 1) // layer.sizes.get(axis, 1)
    return counts


def head_of(cfg: ModelConfig) -> str:
    """Return the parameter path of the output head's weights."""
    return f"text/{'embed_tokens' if cfg.text.tie_embeddings else 'lm_head'}/"


def limited_row(cfg: ModelConfig, length: int, images: int, image_tokens: int) -> tuple[int, int, int]:
    """Return (length, tiles, tokens per tile) of a sequence after limiting each image to `image_tokens` tokens.

    `length` includes the typical number of tokens for each of the `images` images; the result has `image_tokens` for
    each instead. If images have one size, the result has 0 tokens per tile, and each image takes as many tiles as
    `image_tokens` allow. With `image_tokens` 0, nothing changes.
    """
    if not image_tokens:
        return length, images, 0
    per_slot = cfg.tokens_per_image
    slots = 1 if cfg.dynamic_resolution else max(image_tokens // per_slot, 1)
    tokens = image_tokens if cfg.dynamic_resolution else slots * per_slot
    return length + images * (tokens - per_slot), images * slots, image_tokens if cfg.dynamic_resolution else 0


def forward_flops(cfg: ModelConfig, *, length: int, images: int, image_tokens: int = 0) -> int:
    """Return the forward FLOPs of one sequence of `length` tokens, including `images` images or tiles.

    `image_tokens`: tokens per image instead of the typical number; changes the length (see `limited_row`).
    """
    length, slots, per_slot = limited_row(cfg, length, images, image_tokens)
    products = weight_flops(cfg, "text/layers/", (), False) + weight_flops(cfg, head_of(cfg), (), False)
    return length * products + causal_flops(cfg, length) + vision_flops(cfg, (), slots, per_slot)


def causal_flops(cfg: ModelConfig, length: int) -> int:
    """Return the forward FLOPs of attention scores and sums (no products with weights) for one causal sequence."""
    return sum(layer.mixer.mixing_flops(length) for layer in cfg.text.layers)


def vision_flops(cfg: ModelConfig, trained: Collection[str], images: int, image_tokens: int = 0) -> int:
    """Return the FLOPs of projector and vision tower for `images` images or tiles; 0 for a tower that does not run."""
    tower = cfg.vision
    if tower is None or cfg.projector is None:
        return 0
    in_tower = any(path.startswith("vision/") for path in trained)
    in_projector = in_tower or any(path.startswith("projector/") for path in trained)
    projector = weight_flops(cfg, "projector/", trained, in_projector) * (image_tokens or cfg.tokens_per_image)
    if not cfg.tower:
        return images * projector
    positions = positions_of(cfg, image_tokens)
    blocks = weight_flops(cfg, "vision/layers/", trained, in_tower) * positions
    for layer in tower.layers:
        attention = 4 * tower_pairs(cfg, layer, positions) * layer.mixer.q_heads * layer.mixer.head_dim
        blocks += attention * (3 if in_tower else 1)
    patches = weight_flops(cfg, "vision/patch_embedding/", trained, False) * (positions - tower.class_token)
    return images * (blocks + patches + projector)


def positions_of(cfg: ModelConfig, image_tokens: int = 0) -> int:
    """Return the number of vision-tower positions of an image or tile."""
    assert cfg.vision is not None
    assert cfg.projector is not None
    return (image_tokens * cfg.projector.downsample**2 or cfg.vision.grid**2) + cfg.vision.class_token


def tower_pairs(cfg: ModelConfig, shape: Layer, positions: int) -> int:
    """Return the number of query-key pairs of one image in one layer of the vision tower."""
    assert cfg.projector is not None
    side = (shape.mixer.window or positions) * cfg.projector.downsample
    return positions * min(positions, side**2)
