"""Routing of calibration tokens to experts: sums by layer, expert and token type, and the choices, in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import MAX_ARRAYS_BYTES, checked, parse_json, read_arrays, reading, replacing
from vlmprune_jax.core.channels import Experts
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.core.prune.activations import LayerValues, Tokens, grouped, layer_sums
from vlmprune_jax.core.prune.calibration import PADDING, TOKEN_TYPES, TYPES, calibration_batches
from vlmprune_jax.core.prune.fingerprints import fingerprint
from vlmprune_jax.core.prune.stream import on_devices

ROUTING = "routing.npz"  # name of the file
SUMS = ("tokens", "g", "f", "ff", "gf", "largest")
_TODO = "score again"
_MOST_CHOICES = MAX_ARRAYS_BYTES // 2  # bytes


class _Meta(TypedDict):
    """Metadata of a routing file."""

    format: Literal[1]
    fingerprint: str
    made_from: str


@dataclass(frozen=True, eq=False)
class Routing:
    """Choices of a model's routers for calibration tokens; all criteria for experts are functions of the sums."""

    fingerprint: str
    """Fingerprint of the model."""

    sums: Mapping[int, np.ndarray]
    """{layer: float64[token types, sums, experts]}; row 0 is of type 1 in `calibration.TOKEN_TYPES`, sums are `SUMS`.

    Over the tokens that an expert computes: their number, gates as used, norms and squared norms of outputs before the
    gate, gates times norms, and the largest of these products.
    """

    choices: Mapping[int, np.ndarray]
    """{layer: uint16[tokens, experts per token]}, experts of the first calibration tokens, as many as fit the file."""

    token_types: np.ndarray
    """uint8[tokens], the types of these tokens (`calibration.TOKEN_TYPES`)."""

    made_from: str = ""
    """Hash of the settings and records, with which the score stage recognises its own file."""

    @property
    def occurring(self) -> list[str]:
        """Names of the token types that occur."""
        first = next(iter(self.sums.values()))
        return [name for name, number in TOKEN_TYPES.items() if first[number - 1, 0].any()]

    def affected(self, layer: int, kept: Collection[int]) -> dict[str, float]:
        """Return the share of each type's tokens that lose at least one of their experts if only `kept` are left.

        The output of all other tokens is unchanged if gates are divided by their sum and the layer's input is the same.
        """
        lost = np.any(~np.isin(self.choices[layer], list(kept)), axis=1)
        each = {name: lost[self.token_types == number] for name, number in TOKEN_TYPES.items()}
        return {name: float(tokens.mean()) for name, tokens in each.items() if len(tokens)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the routing to an `.npz` file (without pickle), atomically."""
        meta = json.dumps({"format": 1, "fingerprint": self.fingerprint, "made_from": self.made_from})
        arrays = {f"{i}/sums": array for i, array in self.sums.items()}
        arrays |= {f"{i}/choices": array for i, array in self.choices.items()}
        with replacing(Path(path)) as file:
            np.savez(file, allow_pickle=False, meta=np.array(meta), token_types=self.token_types, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Routing:
        """Read a file written by `save`; raise UserError if it is missing or malformed."""
        arrays = read_arrays(Path(path), missing="no such file: run `vlmprune score` first", todo=_TODO)
        with reading(path, _TODO):
            meta = parse_json(str(arrays.pop("meta")), f"{path}: meta", _TODO)
            checked(meta, _Meta, f"{path}: meta", _TODO)
            types = _array(arrays.pop("token_types"), (None,), "uint8")
            layers = [int(name.split("/")[0]) for name in arrays if name.endswith("/sums")]
            sums = {i: _array(arrays.pop(f"{i}/sums"), (len(TOKEN_TYPES), len(SUMS), None), "float64") for i in layers}
            choices = {i: _array(arrays.pop(f"{i}/choices"), (len(types), None), "uint16") for i in layers}
            if arrays or not layers or any(choices[i].max(initial=0) >= sums[i].shape[2] for i in layers):
                raise ValueError("the arrays of sums and of choices do not match")
            if unknown := sorted({*types.tolist()} - {*TOKEN_TYPES.values()}):
                raise ValueError(f"token_types has {unknown[0]}, expected one of {[*TOKEN_TYPES.values()]}")
            if not len(types) or not all(array.any() for array in sums.values()):
                raise ValueError("it has no tokens")
        return cls(meta["fingerprint"], sums, choices, types, meta["made_from"])

    @classmethod
    def of_plan(cls, path: Path, plan: PrunePlan) -> Routing | None:
        """Read the routing of the model that a plan is for; None if there is no file, or the plan removes no experts.

        Raises UserError if the file is malformed or of another model.
        """
        stack = plan.stacks["text"]
        before = {i: sizes["experts"] for i, sizes in enumerate(stack.sizes_before) if "experts" in sizes}
        if not path.exists() or all(layer.sizes.get("experts") == before.get(layer.index) for layer in stack.layers):
            return None
        routing = cls.load(path)
        if routing.fingerprint != plan.fingerprint:
            raise UserError(
                f"{path}: is of another model (fingerprint {routing.fingerprint}, the plan is for {plan.fingerprint}): "
                "remove the file, and score again with --overwrite"
            )
        if before != {i: array.shape[2] for i, array in routing.sums.items()}:
            raise UserError(
                f"{path}: has other layers or numbers of experts than the plan's model: remove the file, and score "
                "again with --overwrite"
            )
        return routing


def _array(array: np.ndarray, shape: tuple[int | None, ...], dtype: str) -> np.ndarray:
    """Return an array; raise ValueError for another dtype or shape (None: any size), or for NaN."""
    fits = len(array.shape) == len(shape) and all(size in (None, n) for size, n in zip(shape, array.shape, strict=True))
    if not fits or array.dtype.name != dtype or not np.isfinite(array).all():
        raise ValueError(f"an array is {array.dtype}{list(array.shape)}, expected finite {dtype} of shape {shape}")
    return array


def measure_routing(model: Model, batches: Iterable[Any], *, progress: Callable[[int], None] | None = None) -> Routing:
    """Run the decoder on all batches and return which experts its routers choose.

    Raises UserError if a layer has no experts, or the batches do not fit the model.
    """
    channels = [layer.channel for layer in model.cfg.text.layers]
    mixtures = [channel for channel in channels if isinstance(channel, Experts)]
    if len(mixtures) < len(channels):
        raise UserError(next(channel for channel in channels if channel not in mixtures).lacks)
    room = _MOST_CHOICES // sum(2 * channel.top_k for channel in mixtures)  # tokens
    model, ways = on_devices(model), np.ones((1, len(TYPES)), np.float32)
    sums, choices, types = dict[int, np.ndarray](), dict[int, list[np.ndarray]](), list[np.ndarray]()
    for group in grouped(model, "text", calibration_batches(batches, model.cfg, labels=False)):
        computed = layer_sums(model, "text", group, ("routed",), _route, {}, ways)
        for (batch,), layers in zip(group, computed, strict=True):
            real = np.flatnonzero(batch.token_types != PADDING)[: max(room - sum(map(len, types)), 0)]
            types.append(batch.token_types.reshape(-1)[real].astype(np.uint8))
            for i, layer in enumerate(layers):
                (new,), (experts,) = layer["sums"], layer["experts"]
                total = sums.get(i, np.zeros_like(new))
                largest = np.maximum(total[:, -1:], new[:, -1:])  # the last row is no sum
                sums[i] = np.concatenate([total[:, :-1] + new[:, :-1], largest], axis=1)
                choices.setdefault(i, []).append(experts.reshape(-1, experts.shape[-1])[real].astype(np.uint16))
            if progress is not None:
                progress(len(types))
    return Routing(fingerprint(model), sums, {i: np.concatenate(x) for i, x in choices.items()}, np.concatenate(types))


def _route(layer: LayerValues, tokens: Tokens) -> dict[str, jax.Array]:
    """Return the chosen experts int[batch, seq, k], and sums float32[token types, sums, experts], of one layer."""
    routed: Any = layer.inputs["routed"]
    g, f = routed.gates.astype(jnp.float32), routed.norms.astype(jnp.float32)
    values = jnp.stack([jnp.ones_like(f), g, f, f * f, g * f])
    zeros = jnp.zeros((len(TOKEN_TYPES) + 1, len(layer.params["mlp/router/weight"])), jnp.float32)
    # padding, whose values may be anything, has a row of its own
    places = tokens.token_type[..., None], routed.experts
    sums = [*jax.vmap(lambda value: zeros.at[places].add(value))(values), zeros.at[places].max(g * f)]
    return {"experts": routed.experts, "sums": jnp.stack(sums, axis=1)[1:]}
