"""Kept parts of a model by original numbers: layers with their heads and neurons, and tokens of the vocabulary."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.stack import LayerShape


@dataclass(frozen=True)
class KeptLayer:
    """Kept units of layer `index`: sorted indices of query heads, key/value heads and MLP neurons."""

    index: int
    q_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]

    @classmethod
    def whole(cls, index: int, shape: LayerShape) -> KeptLayer:
        """Return the entry of a layer from which nothing is removed."""
        return cls(index, tuple(range(shape.q_heads)), tuple(range(shape.kv_heads)), tuple(range(shape.mlp)))

    @property
    def shape(self) -> LayerShape:
        """Shape of the layer after pruning."""
        return LayerShape(len(self.q_heads), len(self.kv_heads), len(self.neurons))

    def then(self, second: KeptLayer) -> KeptLayer:
        """Combine two successive prunings of a layer (first this, then `second`) into one entry."""
        return KeptLayer(
            self.index,
            _pick(self.q_heads, second.q_heads),
            _pick(self.kv_heads, second.kv_heads),
            _pick(self.neurons, second.neurons),
        )


@dataclass(frozen=True)
class KeptStack:
    """Kept layers and units of a stack: all layer shapes before pruning, and one `KeptLayer` per kept layer."""

    layers_before: tuple[LayerShape, ...]
    layers: tuple[KeptLayer, ...]

    def __post_init__(self) -> None:
        # Windows belong to the model, not to the plan: a plan is read back from widths alone.
        object.__setattr__(self, "layers_before", tuple(LayerShape(*shape.widths) for shape in self.layers_before))
        problem = _inconsistency(self.layers_before, self.layers)
        if problem:
            raise UserError(f"prune plan: {problem}")

    @classmethod
    def whole(cls, layers: Sequence[LayerShape]) -> KeptStack:
        """Return the entry of a stack from which nothing is removed."""
        return cls(tuple(layers), tuple(KeptLayer.whole(i, shape) for i, shape in enumerate(layers)))

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """Shapes of the kept layers after pruning."""
        return tuple(layer.shape for layer in self.layers)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Original numbers of the kept layers, ascending."""
        return tuple(layer.index for layer in self.layers)

    @property
    def removed_layers(self) -> tuple[int, ...]:
        """Original numbers of the removed layers."""
        return tuple(sorted(set(range(len(self.layers_before))) - set(self.kept_layers)))

    def then(self, second: KeptStack) -> KeptStack:
        """Combine two successive prunings of a stack (first this, then `second`) into one entry."""
        return KeptStack(self.layers_before, tuple(self.layers[one.index].then(one) for one in second.layers))


# Fields of a `ModelConfig` with ids of tokens.
TOKEN_IDS = ("bos_token_id", "eos_token_ids", "pad_token_id", "image_token_id", "video_token_id")


@dataclass(frozen=True)
class KeptVocabulary:
    """Token ids (ascending) that stay in a vocabulary of `rows_before` rows; a kept token's new id is its index.

    `tokenizer`: digest of the tokenizer that the ids belong to (`data.tokenizer_files.vocabulary_digest`).
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


def _inconsistency(before: Sequence[LayerShape], layers: Sequence[KeptLayer]) -> str | None:
    """Return why a plan's kept layers and units do not fit the stack; None if they do."""
    if not layers:
        return "no layer is kept"
    indices = [layer.index for layer in layers]
    if not _increasing(indices, len(before)):
        return f"kept layers {_listed(indices)} are not increasing numbers below {len(before)}"
    for layer in layers:
        shape = before[layer.index]
        for name, units, size in (
            ("q_heads", layer.q_heads, shape.q_heads),
            ("kv_heads", layer.kv_heads, shape.kv_heads),
            ("neurons", layer.neurons, shape.mlp),
        ):
            if not units or not _increasing(units, size):
                return f"{name} of layer {layer.index} are not increasing numbers below {size}, at least one"
        group = shape.q_heads // shape.kv_heads
        heads = Counter(head // group for head in layer.q_heads)
        per_group = [heads[kv] for kv in layer.kv_heads]
        if len(set(per_group)) != 1 or sum(per_group) != len(layer.q_heads):
            return (
                f"layer {layer.index} keeps query heads {_listed(layer.q_heads)} that do not share its key/value heads "
                f"{_listed(layer.kv_heads)} evenly (groups of {group})"
            )
    return None


def _listed(indices: Sequence[int]) -> str:
    """Return the first few numbers of a list as text, for messages."""
    return str([*indices]) if len(indices) <= 64 else f"{str([*indices[:64]])[:-1]}, ... {len(indices):,} in all]"


def _increasing(indices: Sequence[int], size: int) -> bool:
    edges = [-1, *indices, size]
    return all(low < high for low, high in itertools.pairwise(edges))


def _pick(indices: Sequence[int], chosen: Sequence[int]) -> tuple[int, ...]:
    return tuple(indices[i] for i in chosen)
