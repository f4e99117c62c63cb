"""Scores of layers, heads and neurons under one criterion: numbers only, in one small file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import numpy as np

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.files import checked, parse_json, read_arrays, reading, replacing
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.part import AXES
from vlmprune_jax.core.prune.criteria import scoring
from vlmprune_jax.core.prune.routing import Routing

FORMAT = 2
MOST_UNITS = 10_000  # layers of a model, units of an axis of a layer that is no MLP
_TODO = "score again"


class _Version(TypedDict):
    format: int


class _Options(TypedDict, total=False):
    """Criterion options in a scores file that plans read."""

    variant: str | None
    gqa: Literal["groups", "q_heads"]
    layers_removed: Annotated[int, msgspec.Meta(ge=1, le=MOST_UNITS)] | None


class _Meta(_Version):
    """Metadata of a scores file."""

    criterion: str
    fingerprint: str
    options: _Options
    stack: Annotated[str, msgspec.Meta(pattern="^[a-z][a-z0-9_]*$")]
    kinds: list[Literal["image", "prompt", "answer"]]  # token types with separate scores


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance scores of a component's layers, or of units inside layers, by one criterion (low = removed first)."""

    criterion: str
    """Name of the criterion."""

    fingerprint: str
    """Fingerprint of the scored model."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the criterion."""

    importance: np.ndarray | None = None
    """float64[n_layers], scores of whole layers; None if the criterion does not score them.

    With an option `layers_removed` = n, entry i is the score of the n consecutive layers from layer i on.
    """

    units: Mapping[tuple[int, str], np.ndarray] = field(default_factory=dict)
    """{(layer, axis): float64[units]}, scores of single units; empty if the criterion does not score them.

    For axes with a parent, either the parents are scored ("kv_heads": whole groups of grouped-query attention), or the
    children ("q_heads"), of which equally many are then removed from every parent. Experts and their neurons may both
    be scored; the pruning method chooses.
    """

    stack: str = "text"
    """The scored component: the decoder "text", or the tower "vision"."""

    by_token_type: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """{token type: {"importance": ..., "units": ...}}, the same scores from calibration tokens of one type alone.

    Types are "image", "prompt" and "answer"; empty if the criterion does not split its scores, or all tokens have one
    type.
    """

    routing: Routing | None = None
    """Choices of the routers (criteria for experts); not part of `save`, see `Routing.save`."""

    def __post_init__(self) -> None:
        for name, values in self._arrays().items():
            if np.isnan(values).any():
                raise UserError(
                    f"{self.criterion} scores {name} contain NaN: check weights and calibration records for NaN"
                )

    def __repr__(self) -> str:
        """Return criterion, component and number of scores as text, without the scores."""
        layers = self.n_layers
        scored = [] if self.importance is None else [f"{layers} layers"]
        if self.units:
            counts = [
                f"{sum(len(part) for (_, name), part in self.units.items() if name == axis):,} {AXES[axis].title}"
                for axis in self.axes
            ]
            scored.append(f"{' and '.join(counts)} of {layers} layers")
        kinds = f", also by token type ({', '.join(self.by_token_type)})" if self.by_token_type else ""
        return f"Scores({self.name}, {self.stack}: importance of {', '.join(scored)}{kinds}; model {self.fingerprint})"

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes with scores, such as "kv_heads" and "mlp"; () if only whole layers are scored."""
        return tuple(dict.fromkeys(axis for _, axis in self.units))

    @property
    def n_layers(self) -> int:
        """Number of layers for which there are scores."""
        return len({i for i, _ in self.units}) if self.importance is None else len(self.importance)

    @property
    def name(self) -> str:
        """Name of the criterion, followed by its variant if it has several: `taylor/param_first`."""
        variant = self.options.get("variant")
        return f"{self.criterion}/{variant}" if variant else self.criterion

    @property
    def span(self) -> int | None:
        """Number of consecutive layers that each `importance` entry scores together; None if each layer has its own."""
        return self.options.get("layers_removed")

    def check_units(self) -> None:
        """Raise UserError if the criterion scores only layers."""
        if not self.units:
            raise UserError(
                f"{self.criterion} does not score heads and neurons: for width pruning, score with {scoring('widths')}"
            )

    def along(self, axis: str) -> tuple[np.ndarray, ...]:
        """Return the scores of one axis, layer by layer (only layers that have this axis)."""
        return tuple(part for (_, name), part in self.units.items() if name == axis)

    @property
    def heads(self) -> tuple[np.ndarray, ...] | None:
        """Scores of attention units, layer by layer: groups of heads ("kv_heads") or query heads; None if unscored."""
        return self.along("q_heads") or self.along("kv_heads") or None

    @property
    def mlp(self) -> tuple[np.ndarray, ...] | None:
        """Scores of MLP neurons, layer by layer; None if unscored."""
        return self.along("mlp") or None

    @property
    def layers(self) -> np.ndarray:
        """Scores of whole layers (`importance`); raise UserError if the criterion scores only heads and neurons."""
        if self.importance is None:
            raise UserError(
                f"{self.criterion} does not score layers: for depth pruning, score with {scoring('layers')}"
            )
        return self.importance

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores to an `.npz` file (without pickle), atomically."""
        path = Path(path)
        meta = {
            "format": FORMAT,
            "criterion": self.criterion,
            "fingerprint": self.fingerprint,
            "options": dict(self.options),
            "stack": self.stack,
            "kinds": list(self.by_token_type),
        }
        with replacing(path) as file:
            np.savez(file, allow_pickle=False, meta=np.array(json.dumps(meta)), **self._arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read a scores file written by `save`; raise UserError if it is missing or malformed."""
        where, arrays = Path(path), dict[str, np.ndarray]()
        missing = "no such scores file: run `vlmprune score` first"
        for name, array in read_arrays(where, missing=missing, todo=_TODO).items():
            most = array.size if "mlp" in name else MOST_UNITS
            arrays[name] = array if name == "meta" else _numbers(array, most, f"{path}: {name}")
        with reading(path, _TODO):
            meta = parse_json(str(arrays.pop("meta")), f"{path}: meta", _TODO)
        known = checked(meta, _Version, f"{path}: meta", _TODO)["format"]
        if known != FORMAT:
            todo = "upgrade vlmprune-jax" if known > FORMAT else "run `vlmprune score` again"
            raise UserError(f"{path}: has format {known}, but this version of vlmprune reads {FORMAT}: {todo}")
        checked(meta, _Meta, f"{path}: meta", _TODO)
        prefixes = {"": "", **{kind: f"{kind}/" for kind in meta["kinds"]}}
        sets = {kind: _parts(arrays, prefix) for kind, prefix in prefixes.items()}
        if sum(map(_count, sets.values())) != len(arrays):
            raise UserError(f"{path}: its arrays do not match the layers and axes that it declares: {_TODO}")
        total = sets.pop("")
        if any(_shapes(part) != _shapes(total) for part in sets.values()):
            raise UserError(f"{path}: scores by token type and total scores have different shapes: {_TODO}")
        with error_context(path):
            return cls(
                criterion=meta["criterion"],
                fingerprint=meta["fingerprint"],
                options=meta["options"],
                stack=meta["stack"],
                **total,
                by_token_type=sets,
            )

    def _arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of a scores file by name: `importance`, `0/kv_heads`, `image/0/kv_heads`."""
        total = {"importance": self.importance, "units": self.units}
        arrays = {}
        for prefix, parts in (("", total), *((f"{kind}/", parts) for kind, parts in self.by_token_type.items())):
            if parts.get("importance") is not None:
                arrays[f"{prefix}importance"] = parts["importance"]
            arrays |= {f"{prefix}{i}/{axis}": part for (i, axis), part in parts.get("units", {}).items()}
        return arrays


def _parts(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """Return the fields of `Scores` that a file's arrays below a prefix contain."""
    names = {name.removeprefix(prefix): name for name in arrays if name.startswith(prefix)}
    units = {}
    for name in sorted((name for name in names if re.fullmatch("[0-9]{1,5}/[a-z_]+", name)), key=_layer_first):
        layer, axis = name.split("/")
        if axis in AXES:
            units[int(layer), axis] = arrays[names[name]]
    importance = {"importance": arrays[names["importance"]]} if "importance" in names else {}
    return {**importance, "units": units}


def _layer_first(name: str) -> tuple[int, int]:
    layer, axis = name.split("/")
    return int(layer), [*AXES].index(axis) if axis in AXES else -1


def _count(parts: Mapping[str, Any]) -> int:
    return ("importance" in parts) + len(parts["units"])


def _shapes(parts: Mapping[str, Any]) -> dict[Any, Any]:
    shapes = {key: part.shape for key, part in parts["units"].items()}
    return {**shapes, "importance": np.shape(parts.get("importance", 0))}


def fits_layers(units: Mapping[tuple[int, str], Any], layers: Sequence[Layer]) -> bool:
    """Return True if scores of units have the sizes of these layers, and include every layer that has a scored axis."""
    axes = {axis for _, axis in units}
    expected = {(i, axis): size for i, layer in enumerate(layers) for axis, size in layer.sizes.items() if axis in axes}
    return {key: np.shape(part) for key, part in units.items()} == {key: (size,) for key, size in expected.items()}


def _numbers(array: np.ndarray, most: int, where: str) -> np.ndarray:
    """Return an array; raise UserError unless it is one-dimensional, floating-point and not too long."""
    if array.dtype.kind != "f" or array.dtype.itemsize > 8 or array.ndim != 1 or not 0 < array.size <= most:
        raise UserError(
            f"{where} is {array.dtype}{list(array.shape)}, expected a one-dimensional array of numbers: {_TODO}"
        )
    return np.asarray(array, np.float64)
