"""Importance by token type: which layers and heads process images, and which process text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmprune_jax.prune import Scores

MOST_NAMED = 5
Parts = Mapping[str, Any]


def layer_shares(parts: Parts) -> np.ndarray:
    """Return float64[n_layers] shares of the layers in a token type's importance, adding up to 1.

    Width scores are summed over neurons, most of a layer. Infinite scores (never removed) have weight 0.
    """
    values = parts["importance"] if "importance" in parts else [np.sum(layer) for layer in parts["mlp"]]
    return _shares([np.asarray(values, np.float64)])[0]


def head_shares(parts: Parts) -> list[np.ndarray] | None:
    """Return the shares of attention heads in the sum over all layers; None without scores of heads."""
    return None if parts.get("heads") is None else _shares(parts["heads"])


def _shares(layers: Sequence[np.ndarray]) -> list[np.ndarray]:
    finite = [np.where(np.isfinite(layer), layer, 0.0) for layer in layers]
    largest = max(float(np.max(np.abs(layer))) for layer in finite) or 1.0  # scaled first: a sum may overflow
    total = sum(float(np.sum(layer / largest)) for layer in finite) or 1.0
    return [layer / largest / total for layer in finite]


def serves_vision(scores: Scores) -> str:
    """Name at most 5 layers and heads that are more important for images than for text; "" without image scores."""
    text = [parts for kind, parts in scores.by_kind.items() if kind != "image"]
    if "image" not in scores.by_kind or not text:
        return ""
    image = scores.by_kind["image"]
    leaning = _leaning([layer_shares(image)], [[layer_shares(parts)] for parts in text])[0]
    named = [f"layers {_named([(f'{i}', share) for i, share in enumerate(leaning)])}"]
    heads = head_shares(image)
    if heads is not None:
        by_layer = _leaning(heads, [head_shares(parts) or [] for parts in text])
        named.append(
            f"heads {_named([(f'{i}.{n}', s) for i, layer in enumerate(by_layer) for n, s in enumerate(layer)])}"
        )
    return (
        f"Serve vision most: {'; '.join(named)}. In brackets the image's share of what image and text, each divided by "
        "its sum over the model, have there: 0.50 is no preference. A head is named layer.head."
    )


def _leaning(image: Sequence[np.ndarray], text: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Return image / (image + mean over types of text) per layer; 0.5 where both are 0."""
    found = []
    for i, layer in enumerate(image):
        both = layer + np.mean([kind[i] for kind in text], axis=0)
        found.append(np.where(both > 0, layer / np.where(both > 0, both, 1.0), 0.5))
    return found


def _named(shares: Sequence[tuple[str, float]]) -> str:
    first = sorted(shares, key=lambda one: -one[1])[:MOST_NAMED]
    return ", ".join(f"{name} ({share:.2f})" for name, share in first if share > 0.5) or "none"
