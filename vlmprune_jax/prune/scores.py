"""Scores of layers, heads and neurons under one criterion: numbers only, in one small file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import numpy as np

from vlmprune_jax.core.errors import UserError, error_context
from vlmprune_jax.core.files import checked, parse_json, read_arrays, reading, replacing
from vlmprune_jax.prune.criteria import scoring

FORMAT = 1
MOST_UNITS = 10_000  # layers of a model, heads of a layer
_TODO = "score again"
_PARTS = ("importance", "heads", "mlp")


class _Version(TypedDict):
    format: int


class _Options(TypedDict, total=False):
    """Criterion options in a scores file that plans and reports read."""

    variant: str | None
    gqa: Literal["groups", "q_heads"]
    layers_removed: Annotated[int, msgspec.Meta(ge=1, le=MOST_UNITS)] | None


class _Meta(_Version):
    """Metadata of a scores file.

    `layers`: number of layers with width scores; `stack`: absent in files of older versions, which scored the decoder;
    `kinds`: token types with scores of their own.
    """

    criterion: str
    fingerprint: str
    options: _Options
    layers: Annotated[int, msgspec.Meta(ge=0, le=MOST_UNITS)]
    stack: NotRequired[Literal["text", "vision"]]
    kinds: NotRequired[list[Literal["image", "prompt", "answer"]]]


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance scores of a stack's layers, or heads and neurons, by one criterion; low scores are pruned first.

    `stack`: the decoder, "text", or the tower, "vision". `importance`: float64[n_layers], or None if the criterion does
    not score whole layers; with an option `layers_removed`, entry i is of that many consecutive layers from layer i on.
    `by_kind`: the same over calibration tokens of one type alone, "image", "prompt" or "answer" -> some of importance,
    heads and mlp; empty if the criterion does not split, or all tokens are of one type. `heads[i]`: float64[kv_heads]
    (whole groups of grouped-query attention) or float64[q_heads] of layer i, as `options["gqa"]` says; `mlp[i]`:
    float64[neurons]. Both None if the criterion does not score widths.
    """

    criterion: str
    fingerprint: str
    options: Mapping[str, Any] = field(default_factory=dict)
    importance: np.ndarray | None = None
    heads: tuple[np.ndarray, ...] | None = None
    mlp: tuple[np.ndarray, ...] | None = None
    stack: str = "text"
    by_kind: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in self._arrays().items():
            if np.isnan(values).any():
                raise UserError(
                    f"{self.criterion} scores {name} contain NaN: check weights and calibration records for NaN"
                )

    def __repr__(self) -> str:
        """Return criterion, stack and type of scores as text, without numbers."""
        heads, neurons = (None if part is None else sum(map(len, part)) for part in (self.heads, self.mlp))
        layers = len(self.heads or ()) if self.importance is None else len(self.importance)
        unit = "heads" if self.options.get("gqa") == "q_heads" else "head groups"
        scored = [
            f"{layers} layers" if heads is None else f"{heads:,} {unit} and {neurons:,} neurons of {layers} layers"
        ]
        if heads is not None and self.importance is not None:
            scored.insert(0, f"{layers} layers")
        kinds = f", also by token type ({', '.join(self.by_kind)})" if self.by_kind else ""
        return f"Scores({self.name}, {self.stack}: importance of {', '.join(scored)}{kinds}; model {self.fingerprint})"

    @property
    def name(self) -> str:
        """Name of the criterion, followed by its variant if it has several: `taylor/param_first`."""
        variant = self.options.get("variant")
        return f"{self.criterion}/{variant}" if variant else self.criterion

    @property
    def span(self) -> int | None:
        """Number of consecutive layers that each `importance` entry scores together; None if each layer has its own."""
        return self.options.get("layers_removed")

    @property
    def widths(self) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Scores of (heads, neurons); raise UserError if the criterion scores only layers."""
        if self.heads is None or self.mlp is None:
            raise UserError(
                f"{self.criterion} does not score heads and neurons: for width pruning, score with {scoring('widths')}"
            )
        return self.heads, self.mlp

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
            "layers": 0 if self.heads is None else len(self.heads),
            "stack": self.stack,
            "kinds": list(self.by_kind),
        }
        with replacing(path) as file:
            np.savez(file, allow_pickle=False, meta=np.array(json.dumps(meta)), **self._arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read a scores file written by `save`; raise UserError if it is missing or malformed."""
        where, arrays = Path(path), dict[str, np.ndarray]()
        missing = "no such scores file: run `vlmprune score` first"
        for name, array in read_arrays(where, missing=missing, todo=_TODO).items():
            most = array.size if "mlp_" in name else MOST_UNITS
            arrays[name] = array if name == "meta" else _numbers(array, most, f"{path}: {name}")
        with reading(path, _TODO):
            meta = parse_json(str(arrays.pop("meta")), f"{path}: meta", _TODO)
        if checked(meta, _Version, f"{path}: meta", _TODO)["format"] != FORMAT:
            raise UserError(
                f"{path}: has format {meta['format']}, but this version of vlmprune reads {FORMAT}: score again"
            )
        checked(meta, _Meta, f"{path}: meta", _TODO)
        names = {f"{kind}_{i}" for kind in ("heads", "mlp") for i in range(meta["layers"])}
        sets = {kind: _below(arrays, f"{kind}/") for kind in ("", *meta.get("kinds", ()))}
        whole = sets.pop("")
        if whole.keys() - {"importance"} != names:
            raise UserError(f"{path}: its arrays do not match the {meta['layers']} layers that it declares: {_TODO}")
        if any({n: a.shape for n, a in one.items()} != {n: a.shape for n, a in whole.items()} for one in sets.values()):
            raise UserError(f"{path}: scores by token type and total scores have different shapes: {_TODO}")
        with error_context(path):
            return cls(
                criterion=meta["criterion"],
                fingerprint=meta["fingerprint"],
                options=meta["options"],
                stack=meta.get("stack", "text"),
                **_parts(whole, meta["layers"]),
                by_kind={kind: _parts(one, meta["layers"]) for kind, one in sets.items()},
            )

    def _arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of a scores file by name: `importance`, `heads_0`, `image/heads_0`."""
        whole = {name: getattr(self, name) for name in _PARTS}
        arrays = {}
        for prefix, parts in (("", whole), *((f"{kind}/", parts) for kind, parts in self.by_kind.items())):
            if parts.get("importance") is not None:
                arrays[f"{prefix}importance"] = parts["importance"]
            for name in ("heads", "mlp"):
                arrays |= {f"{prefix}{name}_{i}": part for i, part in enumerate(parts.get(name) or ())}
        return arrays


def _below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays of one token type, with the prefix removed from their names."""
    if prefix == "/":
        return {name: array for name, array in arrays.items() if "/" not in name}
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _parts(arrays: Mapping[str, np.ndarray], layers: int) -> dict[str, Any]:
    """Return the fields of `Scores` that a file's arrays contain."""
    found: dict[str, Any] = {"importance": arrays["importance"]} if "importance" in arrays else {}
    for name in ("heads", "mlp") if layers else ():
        found[name] = tuple(arrays[f"{name}_{i}"] for i in range(layers))
    return found


def _numbers(array: np.ndarray, most: int, where: str) -> np.ndarray:
    """Return an array; raise UserError unless it is one-dimensional, floating-point and not too long."""
    if array.dtype.kind != "f" or array.dtype.itemsize > 8 or array.ndim != 1 or not 0 < array.size <= most:
        raise UserError(
            f"{where} is {array.dtype}{list(array.shape)}, expected a one-dimensional array of numbers: {_TODO}"
        )
    return np.asarray(array, np.float64)
