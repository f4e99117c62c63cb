"""Kept parts of a model by original numbers: layers with their heads and neurons, and tokens of the vocabulary."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer, keep_layers
from vlmprune_jax.core.part import AXES

Sizes = Mapping[str, int]  # {axis: number of units} of one layer
Units = Mapping[str, tuple[int, ...]]  # {axis: sorted original indices} of one layer


@dataclass(frozen=True)
class KeptLayer:
    """Heads and neurons that a prune plan keeps in one layer, by original number."""

    index: int
    """Original number of the layer."""

    kept: Units
    """Sorted original indices of the kept units, for every prunable axis of the layer ("q_heads", "mlp", ...)."""

    @classmethod
    def whole(cls, index: int, layer: Layer) -> KeptLayer:
        """Return the plan entry of a layer that keeps all its heads and neurons."""
        return cls(index, {axis: tuple(range(size)) for axis, size in layer.sizes.items()})

    @property
    def sizes(self) -> dict[str, int]:
        """Number of kept units by axis."""
        return {axis: len(indices) for axis, indices in self.kept.items()}

    def then(self, second: KeptLayer) -> KeptLayer:
        """Combine two successive prunings of a layer (first this, then `second`) into one entry."""
        return KeptLayer(self.index, {axis: _pick(self.kept[axis], chosen) for axis, chosen in second.kept.items()})


@dataclass(frozen=True)
class KeptStack:
    """Kept layers and units of one component (decoder or tower)."""

    sizes_before: tuple[Sizes, ...]
    """Sizes of all layers before pruning, by axis."""

    layers: tuple[KeptLayer, ...]
    """One entry per kept layer, ascending."""

    def __post_init__(self) -> None:
        problem = _inconsistency(self.sizes_before, self.layers)
        if problem:
            raise UserError(f"prune plan: {problem}")

    @classmethod
    def whole(cls, layers: Sequence[Layer]) -> KeptStack:
        """Return the plan entry of a component (decoder or tower) that keeps all its layers and units."""
        sizes = tuple(layer.sizes for layer in layers)
        return cls(sizes, tuple(KeptLayer.whole(i, layer) for i, layer in enumerate(layers)))

    @property
    def is_whole(self) -> bool:
        """True if the plan removes nothing from this component."""
        return self.sizes == self.sizes_before

    @property
    def sizes(self) -> tuple[Sizes, ...]:
        """Sizes of the kept layers after pruning, by axis."""
        return tuple(layer.sizes for layer in self.layers)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Original numbers of the kept layers, ascending."""
        return tuple(layer.index for layer in self.layers)

    @property
    def removed_layers(self) -> tuple[int, ...]:
        """Original numbers of the removed layers."""
        return tuple(sorted(set(range(len(self.sizes_before))) - set(self.kept_layers)))

    def of(self, layers: Sequence[Layer]) -> tuple[Layer, ...]:
        """Apply the plan to a component's `layers`: return the kept layers with their sizes after pruning."""
        kept = keep_layers(layers, self.kept_layers)
        return tuple(layer.resized(entry.sizes) for layer, entry in zip(kept, self.layers, strict=True))

    def then(self, second: KeptStack) -> KeptStack:
        """Combine two successive prunings of a component (first this, then `second`) into one entry."""
        return KeptStack(self.sizes_before, tuple(self.layers[layer.index].then(layer) for layer in second.layers))


# Fields of a `ModelConfig` with ids of tokens.
TOKEN_IDS = ("bos_token_id", "eos_token_ids", "pad_token_id", "image_token_id", "video_token_id")


@dataclass(frozen=True)
class KeptVocabulary:
    """Token ids (ascending) that stay in a vocabulary of `rows_before` rows; a kept token's new id is its index.

    `tokenizer`: digest of the tokenizer that the ids belong to (`export.tokenizer.vocabulary_digest`).
    """

    rows_before: int
    kept: tuple[int, ...]
    tokenizer: str

    def __post_init__(self) -> None:
        if not self.kept or not _increasing(self.kept, self.rows_before):
            raise UserError(
                f"prune plan: kept tokens {_listed(self.kept)} are not ascending ids below {self.rows_before:,}, the "
                "size of the vocabulary: plan again"
            )

    @functools.cached_property
    def new_ids(self) -> dict[int, int]:
        """Mapping {old token id: new token id} of the kept tokens."""
        return {old: new for new, old in enumerate(self.kept)}

    @functools.cached_property
    def digest(self) -> str:
        """Digest of tokenizer and kept token ids (16 hex digits), used in cache keys."""
        return hashlib.sha256(f"{self.tokenizer} {self.kept}".encode()).hexdigest()[:16]

    def apply_to(self, cfg: ModelConfig) -> ModelConfig:
        """Return the model config with the new token ids; negative ids such as LLaVA's -200 are unchanged.

        Raises UserError if the vocabulary has another size, or a token that the model itself uses is not kept.
        """
        if cfg.text.vocab_size != self.rows_before:
            raise UserError(
                f"plan of another model: the plan's vocabulary has {self.rows_before:,} rows, this model's "
                f"{cfg.text.vocab_size:,}: plan again for this model"
            )
        changes = {name: self._renumbered(name, getattr(cfg, name)) for name in TOKEN_IDS}
        text = dataclasses.replace(cfg.text, vocab_size=len(self.kept))
        return dataclasses.replace(cfg, text=text, **changes)

    def then(self, second: KeptVocabulary) -> KeptVocabulary:
        """Combine two successive trimmings of a vocabulary; raise UserError if their sizes disagree."""
        if second.rows_before != len(self.kept):
            raise UserError(
                "the plans cannot be composed: the second plan is for another vocabulary than the first plan leaves"
            )
        return dataclasses.replace(self, kept=_pick(self.kept, second.kept))

    def _renumbered(self, name: str, ids: Any) -> Any:
        if isinstance(ids, tuple):
            return tuple(self._renumbered(name, i) for i in ids)
        if ids is None or not 0 <= ids < self.rows_before:
            return ids
        if ids not in self.new_ids:
            raise UserError(f"prune plan: token {ids}, the model's {name}, is not kept: make a plan that keeps it")
        return self.new_ids[ids]


def _inconsistency(before: Sequence[Sizes], layers: Sequence[KeptLayer]) -> str | None:
    """Return why a plan's kept layers and units do not fit the component; None if they do."""
    if not layers:
        return "no layer is kept"
    indices = [layer.index for layer in layers]
    if not _increasing(indices, len(before)):
        return f"kept layers {_listed(indices)} are not increasing numbers below {len(before)}"
    if problem := next((f"layer {i} {problem}" for i, sizes in enumerate(before) if (problem := _misfit(sizes))), None):
        return problem
    for layer in layers:
        sizes = before[layer.index]
        if layer.kept.keys() != sizes.keys():
            return f"layer {layer.index} has axes {', '.join(layer.kept)}, expected {', '.join(sizes)}"
        kept = {axis: np.asarray(layer.kept[axis]) for axis in sizes}
        for axis, size in sizes.items():
            if not len(kept[axis]) or not _increasing(kept[axis], size):
                return (
                    f"{AXES[axis].title} of layer {layer.index} are not increasing numbers below {size}, at least one"
                )
            parent = AXES[axis].parent
            problem = parent and _split_families(axis, kept[axis], kept[parent], size // sizes[parent])
            if problem:
                return f"layer {layer.index} {problem}"
    return None


def _misfit(sizes: Sizes) -> str | None:
    """Return why no layer has these axes and sizes; None if a layer can."""
    for name, size in sizes.items():
        if name not in AXES:
            return f"has an unknown axis {name[:64]!r} (known: {', '.join(AXES)})"
        axis, parents = AXES[name], sizes.get(AXES[name].parent, 0)
        if axis.parent and (not parents or size % parents):
            owners = f"{parents:,} {AXES[axis.parent].title}"
            return f"has {size:,} {axis.title} but {owners}, expected a divisor of {size:,}"
    return None


def _split_families(axis: str, children: np.ndarray, parents: np.ndarray, group: int) -> str | None:
    """Return why kept parents (key/value heads) own unequal numbers of kept children (query heads); None if equal."""
    owners, counts = np.unique(children // group, return_counts=True)
    if np.array_equal(owners, parents) and (counts == counts[0]).all():
        return None
    title, parent = AXES[axis].title, AXES[AXES[axis].parent].title
    return (
        f"keeps {title} {_listed(children)} that do not share its {parent} {_listed(parents)} evenly "
        f"(groups of {group})"
    )


def _listed(indices: Sequence[int] | np.ndarray) -> str:
    """Format a list of numbers for messages; long lists are shortened to the first 64."""
    indices = np.asarray(indices).tolist()
    return str(indices) if len(indices) <= 64 else f"{str(indices[:64])[:-1]}, ... {len(indices):,} in all]"


def _increasing(indices: Sequence[int] | np.ndarray, size: int) -> bool:
    return bool((np.diff(indices, prepend=-1, append=size) > 0).all())


def _pick(indices: Sequence[int], chosen: Sequence[int]) -> tuple[int, ...]:
    return tuple(indices[i] for i in chosen)
