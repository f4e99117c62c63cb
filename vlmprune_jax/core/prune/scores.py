"""Scores of layers, heads and neurons under one criterion: numbers only, in one small file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import numpy as np

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.files import checked, parse_json, read_arrays, reading, replacing
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.part import AXES, LAYERS, Key
from vlmprune_jax.core.plans.kept import axis_sizes
from vlmprune_jax.core.prune.calibration import TOKEN_TYPES
from vlmprune_jax.core.prune.criteria import scoring
from vlmprune_jax.core.prune.routing import Routing

FORMAT = 3
_TODO = "score again"

Values = Mapping[Key, np.ndarray]


class _Version(TypedDict):
    format: int


class _Options(TypedDict, total=False):
    """Criterion options in a scores file that plans read."""

    variant: str | None
    gqa: Literal["groups", "q_heads"]
    layers_removed: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None


class _Meta(_Version):
    """Metadata of a scores file."""

    criterion: str
    fingerprint: str
    options: _Options


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance scores of layers, or of units inside layers, by one criterion (low = removed first)."""

    criterion: str
    """Name of the criterion."""

    fingerprint: str
    """Fingerprint of the scored model."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the criterion."""

    values: Values = field(default_factory=dict)
    """{key: float64[units]}, scores of the units along every scored axis; layers have the axis "layers".

    With an option `layers_removed` = n, entry i of "layers" is the score of the n consecutive layers from layer i on.
    For axes with a parent, either the parents are scored ("kv_heads": whole groups of grouped-query attention), or the
    children ("q_heads"), of which equally many are then removed from every parent. Experts and their neurons may both
    be scored; the pruning method chooses.
    """

    by_token_type: Mapping[str, Values] = field(default_factory=dict)
    """{token type: values}, the same scores from calibration tokens of one type alone.

    Types are "image", "video", "prompt" and "answer"; empty if the criterion does not split its scores, or all tokens
    have one type.
    """

    routing: Routing | None = None
    """Choices of the routers (criteria for experts); not part of `save`, see `Routing.save`."""

    def __post_init__(self) -> None:
        for name, array in self._arrays().items():
            if np.isnan(array).any():
                raise UserError(
                    f"{self.criterion} scores {name} contain NaN: check weights and calibration records for NaN"
                )

    def __repr__(self) -> str:
        """Return criterion, components and number of scores as text, without the scores."""
        scored = [f"{len(array)} layers" for key, array in self.values.items() if key.axis == LAYERS]
        if self.axes:
            counts = [f"{sum(map(len, self.along(axis))):,} {AXES[axis].title}" for axis in self.axes]
            layers = {(key.component, key.layer) for key in self.values if key.layer is not None}
            scored.append(f"{' and '.join(counts)} of {len(layers)} layers")
        types = f", also by token type ({', '.join(self.by_token_type)})" if self.by_token_type else ""
        components = " and ".join(self.components)
        return f"Scores({self.name}, {components}: importance of {', '.join(scored)}{types}; model {self.fingerprint})"

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the scored components."""
        return tuple(dict.fromkeys(key.component for key in self.values))

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes inside layers with scores, such as "kv_heads"; () if only whole layers are scored."""
        return tuple(dict.fromkeys(key.axis for key in self.values if key.layer is not None))

    @property
    def name(self) -> str:
        """Name of the criterion, followed by its variant if it has several: `taylor/param_first`."""
        variant = self.options.get("variant")
        return f"{self.criterion}/{variant}" if variant else self.criterion

    @property
    def span(self) -> int | None:
        """Number of consecutive layers that an entry of "layers" scores together; None if each layer has its own."""
        return self.options.get("layers_removed")

    def along(self, axis: str) -> tuple[np.ndarray, ...]:
        """Return the scores of one axis, layer by layer (only layers that have this axis)."""
        return tuple(array for key, array in self.values.items() if key.axis == axis)

    @property
    def layers(self) -> np.ndarray:
        """Scores of whole layers, float64[n_layers]; raise UserError if the criterion scores only units of layers."""
        self.check_scored(LAYERS)
        return self.along(LAYERS)[0]

    def check_scored(self, axis: str) -> None:
        """Raise UserError unless there are scores of layers (axis "layers") or of units inside layers (other axes)."""
        if axis == LAYERS and not self.along(LAYERS):
            raise UserError(
                f"{self.criterion} does not score layers: for depth pruning, score with {scoring('layers')}"
            )
        if axis != LAYERS and not self.axes:
            raise UserError(
                f"{self.criterion} does not score heads and neurons: for width pruning, score with {scoring('widths')}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores to an `.npz` file (without pickle), atomically."""
        meta = {
            "format": FORMAT,
            "criterion": self.criterion,
            "fingerprint": self.fingerprint,
            "options": dict(self.options),
        }
        with replacing(Path(path)) as file:
            np.savez(file, allow_pickle=False, meta=np.array(json.dumps(meta)), **self._arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read a scores file written by `save`; raise UserError if it is missing or malformed."""
        missing = "no such scores file: run `vlmprune score` first"
        arrays = read_arrays(Path(path), missing=missing, todo=_TODO)
        with reading(path, _TODO):
            meta = parse_json(str(arrays.pop("meta")), f"{path}: meta", _TODO)
        written = checked(meta, _Version, f"{path}: meta", _TODO)["format"]
        if written != FORMAT:
            todo = "upgrade vlmprune-jax" if written > FORMAT else "run `vlmprune score` again"
            raise UserError(f"{path}: has format {written}, but this version of vlmprune reads {FORMAT}: {todo}")
        checked(meta, _Meta, f"{path}: meta", _TODO)
        values, by_token_type = dict[Key, np.ndarray](), dict[str, dict[Key, np.ndarray]]()
        with error_context(path):
            for name, array in arrays.items():
                key, _, token_type = name.partition("@")
                if token_type and token_type not in TOKEN_TYPES:
                    raise UserError(f"{name[:80]!r} has scores of an unknown token type: {_TODO}")
                of_type = by_token_type.setdefault(token_type, {}) if token_type else values
                of_type[Key.parse(key)] = _numbers(array, name)
            shapes = {key: array.shape for key, array in values.items()}
            for of_type in by_token_type.values():
                if {key: array.shape for key, array in of_type.items()} != shapes:
                    raise UserError(f"scores by token type and total scores have different shapes: {_TODO}")
            return cls(meta["criterion"], meta["fingerprint"], meta["options"], values, by_token_type)

    def _arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of a scores file by name: `text/layers`, `text/0/kv_heads`, `text/0/kv_heads@image`."""
        arrays = {str(key): array for key, array in self.values.items()}
        for token_type, values in self.by_token_type.items():
            arrays |= {f"{key}@{token_type}": array for key, array in values.items()}
        return arrays


def fits_model(values: Values, cfg: ModelConfig) -> bool:
    """Return True if scores have the model's sizes, and include every layer of a component that has a scored axis."""
    scored = {(key.component, key.axis) for key in values}
    sizes = axis_sizes(cfg, (name for name, _ in scored))
    expected = {key: (size,) for key, size in sizes.items() if (key.component, key.axis) in scored}
    return {key: np.shape(array) for key, array in values.items()} == expected


def _numbers(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array as float64; raise UserError unless it is one-dimensional, floating-point and not empty."""
    if array.dtype.kind != "f" or array.dtype.itemsize > 8 or array.ndim != 1 or not array.size:
        raise UserError(
            f"{name} is {array.dtype}{list(array.shape)}, expected a one-dimensional array of numbers: {_TODO}"
        )
    return np.asarray(array, np.float64)
