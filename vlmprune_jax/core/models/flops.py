"""Numbers of weights and FLOPs of a model, computed from the sizes of the axes that its parameters declare."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer, array_axes, layer_runs
from vlmprune_jax.core.models.params import param_axes, param_shapes


@dataclass(frozen=True)
class Polynomial:
    """Number of weights as a function of axis sizes, exact for all sizes.

    No weight has an axis twice, so each weight is a product of sizes and a constant.
    """

    terms: tuple[tuple[tuple[str, ...], int], ...]
    """Pairs (axes, coefficient)."""

    def __call__(self, sizes: Mapping[str, Any]) -> Any:
        """Return the number of weights for these axis sizes, which are numbers or arrays that broadcast together."""
        return sum(coefficient * math.prod(sizes[axis] for axis in axes) for axes, coefficient in self.terms)


Weights = Mapping[str, tuple[Polynomial, bool]]  # {path: (number of weights, True for a matrix)}


@functools.lru_cache(maxsize=64)
def _declared(cfg: ModelConfig) -> tuple[Mapping[tuple[str, Layer], Weights], Weights]:
    """Return the weights of a layer by component and `Layer.kind`, and those beside layers."""
    axes, shapes = param_axes(cfg), param_shapes(cfg)

    def weights(prefix: str, resizable: Collection[str]) -> Weights:
        result = {}
        for path in (path for path in axes if path.startswith(prefix)):
            names, sizes = axes[path], zip(axes[path], shapes[path], strict=True)
            constant = math.prod(size for axis, size in sizes if axis not in ("layer", *resizable))
            factors = tuple(axis for axis in array_axes(names) if axis in resizable)
            matrix = not path.endswith("/bias") and len([axis for axis in names if axis != "layer"]) > 1
            result[path.removeprefix(prefix)] = Polynomial(((factors, constant),)), matrix
        return result

    of_layers = {
        (name, layer.kind): weights(f"{name}/layers/{run}/", layer.sizes)
        for name, stack in cfg.stacks.items()
        for run, (_, layer) in enumerate(layer_runs(stack.layers))
    }
    return of_layers, {path: weight for path, weight in weights("", ["depth"]).items() if "/layers/" not in path}


def _weights(cfg: ModelConfig) -> tuple[Mapping[tuple[str, Layer], Weights], Weights]:
    """Return `_declared` of the smallest model with the same kinds of layers, which is traced once for all widths."""
    for name, stack in cfg.stacks.items():
        numbered = getattr(stack, "deepstack", ())
        kinds = list[Layer]()
        for layer in (layer.kind for layer in (stack.layers if numbered else dict.fromkeys(stack.layers))):
            least = {axis.name: part.least(axis.name) for part in layer.parts for axis in part.axes if not axis.parent}
            kinds.append(layer.resized(layer.completed(least)))
        if not numbered:
            kinds = [*dict.fromkeys(kinds)]
            kinds += kinds[-1:] * (cfg.deepstack - len(kinds))  # features enter as many layers
        cfg = cfg.with_layers(kinds, name)
    return _declared(cfg)


@dataclass(frozen=True)
class Costs:
    """Parameter counts of the layers of one component."""

    kinds: Mapping[Layer, Polynomial]
    """Counts as polynomials, by `Layer.kind`."""

    def at(self, layer: Layer) -> Polynomial:
        """Return the parameter count of layers of this kind, as a polynomial in the sizes of their prunable axes."""
        return self.kinds[layer.kind]

    def of(self, layer: Layer) -> int:
        """Return the number of parameters of a layer, from the sizes of its axes."""
        return int(self.at(layer)(layer.sizes))

    def price(self, layer: Layer, axis: str) -> int:
        """Return the number of parameters of one unit of an axis, including the units of child axes in it."""
        fewer = layer.completed({axis: layer.sizes[axis] - 1})
        return self.of(layer) - int(self.at(layer)({**layer.sizes, **fewer}))


def layer_costs(cfg: ModelConfig, stack: str = "text") -> Costs:
    """Return the parameter costs of a component's layers.

    The counts include a layer's share of parameters that all layers have in common (axis `depth`).
    """
    of_layers, beside = _weights(cfg)
    of_stack = [polynomial.terms[0] for path, (polynomial, _) in beside.items() if path.startswith(f"{stack}/")]
    shared = sum(coefficient for axes, coefficient in of_stack if axes)
    kinds = dict[Layer, Polynomial]()
    for kind in (layer for name, layer in of_layers if name == stack):
        terms = Counter[tuple[str, ...]]({(): shared})
        for polynomial, _ in of_layers[stack, kind].values():
            terms.update(dict(polynomial.terms))
        kinds[kind] = Polynomial(tuple(terms.items()))
    return Costs(kinds)


def weight_counts(cfg: ModelConfig, tokens: int | None = None) -> dict[str, tuple[int, bool]]:
    """Return {parameter path: (number of weights, True for a matrix)}.

    `tokens`: count only the weights that so many tokens can use (of experts, fewer than all).
    """
    of_layers, beside = _weights(cfg)
    counts = {}
    for path, (polynomial, matrix) in beside.items():
        stack = cfg.stacks.get(path.split("/")[0])
        counts[path] = polynomial({"depth": 0 if stack is None else len(stack.layers)}), matrix
    for name, stack in cfg.stacks.items():
        for run, (numbers, layer) in enumerate(layer_runs(stack.layers)):
            sizes = layer.sizes if tokens is None else layer.active_sizes(tokens)
            for path, (polynomial, matrix) in of_layers[name, layer.kind].items():
                counts[f"{name}/layers/{run}/{path}"] = len(numbers) * int(polynomial(sizes)), matrix
    return counts


def weight_flops(cfg: ModelConfig, prefix: str, trained: Collection[str], passes: bool) -> int:
    """Return the FLOPs per token of all matrices under a parameter path; `passes` includes the backward pass.

    For experts, only the weights that one token uses are counted.
    """
    weights = {path: count for path, (count, matrix) in weight_counts(cfg, 1).items() if matrix}
    paths = [path for path in weights if path.startswith(prefix)]
    return sum(2 * weights[path] * (1 + passes + (path in trained)) for path in paths)


def active_params(cfg: ModelConfig, tokens: int | None = 1) -> int:
    """Return the number of parameters that the computation of so many tokens uses; None = all parameters."""
    return sum(count for count, _ in weight_counts(cfg, tokens).values())


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
    side = cfg.projector.downsample
    positions = (image_tokens * side**2 or tower.grid**2) + tower.class_token
    blocks = weight_flops(cfg, "vision/layers/", trained, in_tower) * positions
    for mixer in (layer.mixer for layer in tower.layers):
        keys = min(positions, ((mixer.window or positions) * side) ** 2)  # that a patch attends to
        blocks += 4 * positions * keys * mixer.q_heads * mixer.head_dim * (3 if in_tower else 1)
    patches = weight_flops(cfg, "vision/patch_embedding/", trained, False) * (positions - tower.class_token)
    return images * (blocks + patches + projector)
