"""Views of a plan's kept units, by layer and as token ids, and the check of kept units; no jax."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.part import AXES, LAYERS, VOCAB, Key

Sizes = Mapping[str, int]  # {axis: number of units} of one layer
Units = Mapping[str, tuple[int, ...]]  # {axis: sorted original indices} of one layer
TOKENS = Key("text", None, VOCAB)


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


@dataclass(frozen=True)
class KeptStack:
    """View of the layers and units that a plan keeps of one component (decoder or tower), `PrunePlan.stacks`."""

    sizes_before: tuple[Sizes, ...]
    """Sizes of all layers before pruning, by axis."""

    layers: tuple[KeptLayer, ...]
    """One entry per kept layer, ascending."""

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

    def _renumbered(self, name: str, ids: Any) -> Any:
        if isinstance(ids, tuple):
            return tuple(self._renumbered(name, i) for i in ids)
        if ids is None or not 0 <= ids < self.rows_before:
            return ids
        if ids not in self.new_ids:
            raise UserError(f"prune plan: token {ids}, the model's {name}, is not kept: make a plan that keeps it")
        return self.new_ids[ids]


def axis_sizes(cfg: ModelConfig, components: Iterable[str]) -> dict[Key, int]:
    """Return the number of units along every prunable axis of these components."""
    sizes = dict[Key, int]()
    for name in dict.fromkeys(components):
        layers = cfg.stack(name).layers
        sizes[Key(name, None, LAYERS)] = len(layers)
        sizes |= {TOKENS: cfg.text.vocab_size} if name == TOKENS.component else {}
        sizes |= {Key(name, i, axis): size for i, layer in enumerate(layers) for axis, size in layer.sizes.items()}
    return sizes


def inconsistency(before: Mapping[Key, int], kept: Mapping[Key, Sequence[int]]) -> str | None:
    """Return why kept units do not fit the sizes before pruning; None if they do."""
    names = dict.fromkeys(key.component for key in before)
    components = {
        name: {key.layer for key in before if key.component == name and key.layer is not None} for name in names
    }
    if TOKENS.component not in components:
        return f"components are {', '.join(components)}, expected text among them"
    for name, numbers in components.items():
        count = before.get(Key(name, None, LAYERS), 0)
        if len(numbers) != count or max(numbers, default=-1) != count - 1:
            return f"layers of the {name} stack are not numbered 0, 1, 2, ... up to {count - 1}"
    if unknown := kept.keys() - before.keys():
        return f"kept axes {', '.join(sorted(map(str, unknown)))} are missing in sizes_before"
    left = {name: set(kept.get(Key(name, None, LAYERS), numbers)) for name, numbers in components.items()}
    for key, indices in kept.items():
        if not len(indices) or not (np.diff(indices, prepend=-1, append=before[key]) > 0).all():
            title = {LAYERS: "layers", VOCAB: "tokens"}.get(key.axis) or AXES[key.axis].title
            return (
                f"{key}: kept {title} {_listed(indices)} are not increasing numbers below {before[key]:,}, at least one"
            )
        if key.layer is not None and key.layer not in left[key.component]:
            return f"{key} has kept units, but layer {key.layer} is removed"
    return next((problem for key in before if (problem := _split_families(key, before, kept))), None)


def _split_families(key: Key, before: Mapping[Key, int], kept: Mapping[Key, Sequence[int]]) -> str | None:
    """Return why units of a child axis and of its parent axis do not go together; None if they do."""
    axis = AXES.get(key.axis)
    if axis is None or not axis.parent:
        return None
    owner, title = key._replace(axis=axis.parent), AXES[axis.parent].title
    size, owners = before[key], before.get(owner, 0)
    if not owners or size % owners:
        return f"layer {key.layer} has {size:,} {axis.title} but {owners:,} {title}, expected a divisor of {size:,}"
    if key not in kept and owner not in kept:
        return None
    children, parents = kept.get(key, range(size)), kept.get(owner, range(owners))
    owning, counts = np.unique(np.asarray(children) // (size // owners), return_counts=True)
    if np.array_equal(owning, parents) and (counts == counts[0]).all():
        return None
    return (
        f"layer {key.layer} keeps {axis.title} {_listed(children)} that do not share its {title} {_listed(parents)} "
        f"evenly (groups of {size // owners})"
    )


def _listed(indices: Sequence[int]) -> str:
    """Format a list of numbers for messages; long lists are shortened to the first 64."""
    indices = np.asarray(indices).tolist()
    return str(indices) if len(indices) <= 64 else f"{str(indices[:64])[:-1]}, ... {len(indices):,} in all]"
