"""Selection of trained parameters: ordered regexes over parameter paths, LoRA adapters, optimizer groups."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Container, Iterable, Sequence

import jax
import jax.numpy as jnp

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import mesh_of
from vlmprune_jax.core.models.params import Flat, flatten, init_params, layer_axes, param_axes, place_params, unflatten
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.recovery.config import MAIN, Rule, resolve_rules
from vlmprune_jax.core.sections import LoraConfig

LORA_SUFFIXES = ("lora_a", "lora_b")


def assign_groups(paths: Sequence[str], trainable: str | Sequence[Rule]) -> dict[str, str]:
    """Return {path: optimizer group ("main" or "projector")} of the trained parameters; all others stay frozen.

    `trainable` is the name of a preset, or rules `(regex, True | False | group)`; a regex must match the full path.
    Raises UserError if a preset or group is unknown, a regex is malformed or matches nothing, or nothing is trained.
    """
    rules = resolve_rules(trainable)
    for pattern, _ in () if isinstance(trainable, str) else rules:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise UserError(f"recover.trainable: regex {pattern!r} matches no parameter {_suggest(pattern, paths)}")
    groups: dict[str, str] = {}
    for path in paths:
        value = next((value for pattern, value in rules if re.fullmatch(pattern, path)), False)
        if value is not False:
            groups[path] = MAIN if value is True else value
    if not groups:
        hint = "its adapters are missing" if trainable == "lora" else _suggest(str(rules[0][0]), paths)
        raise UserError(f"recover.trainable: {trainable!r} selects no parameter of this model: {hint}")
    return groups


def _suggest(pattern: str, paths: Sequence[str]) -> str:
    plain = re.sub(r"[\\.*+?^$()\[\]|]", "", pattern)
    close = difflib.get_close_matches(plain, paths, n=3, cutoff=0.3) or list(paths)[:3]
    return f"(it must match a full path; similar paths: {', '.join(close)})"


def partition(flat: Flat, trained: Container[str]) -> tuple[Flat, Flat]:
    """Split flat params into (trained, frozen) dictionaries; `trained`: paths of the trained parameters."""
    return {p: x for p, x in flat.items() if p in trained}, {p: x for p, x in flat.items() if p not in trained}


def decays(path: str) -> bool:
    """Return True if weight decay applies to a parameter (not to biases and norm weights, as in transformers)."""
    owner, leaf = path.split("/")[-2:]
    return leaf != "bias" and "norm" not in owner


def with_lora(cfg: ModelConfig, lora: LoraConfig) -> ModelConfig:
    """Return the config with LoRA adapters on the decoder projections in `lora.targets`.

    Raises UserError if the model already has adapters, or a target is not a projection of the decoder.
    """
    if cfg.lora is not None:
        raise UserError("recover.lora: the model already has LoRA adapters: merge them first (merge_lora)")
    projections = projection_names(cfg)
    unknown = ", ".join(target for target in lora.targets if target not in projections)
    if unknown:
        choices = ", ".join(projections)
        raise UserError(f"recover.lora.targets: {unknown} is not a projection of the decoder: use {choices}")
    return dataclasses.replace(cfg, lora=dataclasses.replace(lora, targets=lora.targets or tuple(projections)))


def add_lora(model: Model, lora: LoraConfig, key: jax.Array) -> Model:
    """Add LoRA adapters that leave outputs unchanged: A Kaiming-uniform, B zero (as in peft).

    Adapters have the dtype and sharding of the weight to which they are added.
    """
    flat, cfg = flatten(model.params), with_lora(model.cfg, lora)
    added = [path for path in param_axes(cfg) if path.endswith(LORA_SUFFIXES)]
    dtype = flat[added[0].rpartition("/")[0] + "/weight"].dtype
    leaves = place_params(Model(init_params(cfg, key, dtype, paths=added), cfg), mesh_of(model.params))
    return model.replace(params=unflatten({**flat, **leaves}), cfg=cfg)


def projection_names(cfg: ModelConfig) -> list[str]:
    """Return the names of the decoder's projections, such as q_proj (Phi: dense, fc1, fc2)."""
    paths = [name.split("/") for name in layer_axes(cfg)]
    return sorted({path[-2] for path in paths if path[-1] == "weight" and "norm" not in path[-2]})


def merge_lora(model: Model) -> Model:
    """Merge LoRA adapters into the weights (weight + alpha/rank * B A); `cfg.lora` becomes None."""
    lora = model.cfg.lora
    if lora is None:
        return model
    flat, axes = flatten(model.params), param_axes(model.cfg)
    merged = {path: leaf for path, leaf in flat.items() if not path.endswith(LORA_SUFFIXES)}
    for path in (p for p in flat if p.endswith("lora_a")):
        owner = path.rpartition("/")[0]
        weight = flat[f"{owner}/weight"]
        a, b = (jnp.asarray(flat[f"{owner}/{name}"], jnp.float32) for name in LORA_SUFFIXES)
        apart = axes[path].index("rank")  # leading axes, of layers and perhaps of experts
        batch = tuple(range(apart))
        contracted = ((b.ndim - 1,), (apart,))
        delta = jax.lax.dot_general(b, a, (contracted, (batch, batch)), precision=jax.lax.Precision.HIGHEST)
        total = jnp.asarray(weight, jnp.float32) + delta * (lora.alpha / lora.rank)
        merged[f"{owner}/weight"] = total.astype(weight.dtype)
    return model.replace(params=unflatten(merged), cfg=dataclasses.replace(model.cfg, lora=None))


def unchanged(before: Model, after: Model, trained: Iterable[str]) -> bool:
    """Return True if two models have bitwise equal parameters at these paths, after merging adapters.

    The comparison ends at the first difference.
    """
    paths = {f"{p.rpartition('/')[0]}/weight" if p.endswith(LORA_SUFFIXES) else p for p in trained}
    old, new = flatten(before.params), flatten(after.params)
    return all(bool(jnp.array_equal(old[path], new[path])) for path in sorted(paths))
