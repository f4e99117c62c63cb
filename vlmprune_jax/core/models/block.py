"""Transformer block of decoder and vision tower: norms around a mixer and a channel mixer, and their sums."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from vlmprune_jax.base.checks import ModuleRegistry, check_returned
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import Dense, Experts, ExpertsAndShared, ExpertsBesideDense
from vlmprune_jax.core.layer import Layer, Stack
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.mixers import Attention, DeltaNet, ShortConv
from vlmprune_jax.core.models import attention, channels, recurrent
from vlmprune_jax.core.models.context import (
    BRANCHES,
    KEYS,
    STREAM,
    VALUES,
    WRITERS,
    Builder,
    Context,
    LayerState,
    Mixed,
    Names,
)
from vlmprune_jax.core.models.layers import Leaf, Norm, Projection, activation, compute_once
from vlmprune_jax.core.part import Part
from vlmprune_jax.core.sections import LoraConfig

FIXED_POINT_STEPS = 16
# Projection that writes to the residual stream -> the names of the norm and of the scale that follow it, if any.
FOLLOWING = {"o_proj": ("attention_output_norm", "layer_scale1"), "down_proj": ("mlp_output_norm", "layer_scale2")}
# Class of a mixer's or channel mixer's config -> its module. Users add kinds by `vlmprune_jax.parts[Mine] = ...`.
PARTS: ModuleRegistry[Any] = ModuleRegistry(
    "parts",
    Part,
    nnx.Module,
    {
        Attention: attention.Attention,
        DeltaNet: recurrent.DeltaNet,
        ShortConv: recurrent.ShortConv,
        Dense: channels.Mlp,
        Experts: channels.Moe,
        ExpertsBesideDense: channels.MoeBesideDense,
        ExpertsAndShared: channels.MoeAndShared,
    },
)


class LayerInput(nnx.Module):
    """Per-layer embeddings (Gemma): add norm(project(act(gate(x)) * layer input)) to the residual stream."""

    def __init__(self, cfg: Stack, sizes: Mapping[str, int]):
        sizes = {**sizes, "extra": cfg.block.layer_inputs}
        self.gate = Projection(sizes, ("extra",), ("embed",), bias=False)
        self.project = Projection(sizes, ("embed",), ("extra",), bias=False)
        self.norm = Norm(sizes, "embed", **cfg.block.norm_facts)
        self.activation = cfg.channel.activation

    def __call__(self, x: jax.Array, layer_input: jax.Array | None) -> jax.Array:
        assert layer_input is not None
        return self.norm(self.project(activation(self.activation)(self.gate(x)) * layer_input))


class Block(nnx.Module):
    """Transformer block; its parameters are stacked along a leading axis for a scan over `length` equal blocks.

    With `norm_place` "both" (sandwich norms):
    h = x + norm(attention(norm(x))), then h + norm(mlp(norm(h))).
    """

    def __init__(self, cfg: Stack, layer: Layer, length: int, names: Names, lora: LoraConfig | None = None):
        sizes = {"layer": length, names.axis: cfg.hidden_size, **layer.sizes, **layer.fixed_sizes}
        self.names, self.parallel = names, cfg.block.parallel
        self.parts: tuple[Any, ...] = layer.parts
        build = Builder(None, cfg, sizes, names, lora)
        for part in layer.parts:
            setattr(self, part.module, PARTS[type(part)](build._replace(part=part)))
        for name in names.norms[: 1 if self.parallel else 2] if cfg.block.norm_place != "after" else ():
            setattr(self, name, build.norm(names.axis))
        for norm, scale in FOLLOWING.values():
            if cfg.block.norm_place != "before":
                setattr(self, norm, build.norm(names.axis))
            if cfg.block.layer_scale:
                setattr(self, scale, Leaf(sizes, (names.axis,)))
        self.extra = LayerInput(cfg, sizes) if cfg.block.layer_inputs else None
        self.layer_scalar = Leaf({**sizes, "unit": 1}, ("unit",)) if cfg.block.layer_scalar else None

    @property
    def writers(self) -> dict[str, str]:
        """{name: parameter path} of the projections whose output is added to the residual stream."""
        paths = (f"{part.module}/{getattr(self, part.module).writer}" for part in self.parts)
        return dict(zip(WRITERS, paths, strict=True))

    def reader_of(self, path: str) -> str:
        """Return the input (one of `READERS`) that the block's weight at `path` multiplies; "" if there is none."""
        module: str = path.removesuffix("/weight")
        names: dict[str, str] = dict(zip((part.module for part in self.parts), BRANCHES, strict=True))
        names |= {writer: name for name, writer in self.writers.items()}
        return names.get(module, names.get(module.split("/")[0], ""))

    def norm_after(self, name: str) -> Norm | None:
        """Return the norm applied to the output of projection `name` before the residual sum; None if there is none."""
        return getattr(self, FOLLOWING[name][0], None)

    def follow(self, name: str, out: jax.Array, statistics: jax.Array | None = None) -> jax.Array:
        """Apply the norm and scale after projection `name` to its output; the result is added to the residual stream.

        `statistics`: see `Norm.__call__`.
        """
        norm, scale = self.norm_after(name), getattr(self, FOLLOWING[name][1], None)
        out = out if norm is None else norm(out, statistics)
        return out if scale is None else out * scale.weight.get_value()[None, None]

    def gain(self, name: str) -> jax.Array | None:
        """Return the constant factors on a projection's output channels (norm weights, scale); None if all are 1.

        The factors are float[embed], with a leading layer axis if the block's parameters are stacked.
        """
        norm, scale = self.norm_after(name), getattr(self, FOLLOWING[name][1], None)
        factors = [] if norm is None else [norm.gain]
        factors += [] if scale is None else [scale.weight.get_value()]
        return functools.reduce(operator.mul, factors) if factors else None

    @property
    def scalar(self) -> jax.Array | None:
        """Learned factor on the block's output, float[1, 1, 1]; None means 1."""
        return None if self.layer_scalar is None else self.layer_scalar.weight.get_value()[None, None]

    def before_extra(self, y: jax.Array, layer_input: jax.Array | None, start: jax.Array) -> jax.Array:
        """Recover the residual stream to which per-layer embeddings (Gemma) were added, from the block's output `y`.

        It is found by fixed-point iteration that begins at `start`. The norm in the per-layer branch limits the size of
        what the branch adds, whatever its input.
        """
        y = y if self.scalar is None else y / self.scalar
        if self.extra is None:
            return y
        extra = self.extra
        return jax.lax.fori_loop(0, FIXED_POINT_STEPS, lambda _, x: y - extra(x, layer_input), start)

    def __call__(
        self, x: jax.Array, ctx: Context, state: LayerState | None = None, capture: tuple[str, ...] = ()
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        """Run the block; return (output, the mixer's state, {name: intermediate value} for the names in `capture`)."""
        keys = (None, None) if ctx.dropout_key is None else jax.random.split(ctx.dropout_key)
        mixer, channel = (getattr(self, part.module) for part in self.parts)
        norms = [getattr(self, name, None) for name in self.names.norms]
        mixer_input = x if norms[0] is None else compute_once(norms[0](x))
        mixed, shape = mixer(mixer_input, ctx._replace(dropout_key=keys[0]), state), list(x.shape)
        fits = isinstance(mixed, Mixed) and getattr(mixed.out, "shape", None) == x.shape
        check_returned(type(mixer).__call__, mixed, fits, f"a models.context.Mixed whose out has shape {shape}")
        middle = x + self.follow("o_proj", mixed.out)
        if self.parallel:
            channel_input = mixer_input
        else:
            middle = constrain(middle, STREAM)
            channel_input = middle if norms[1] is None else compute_once(norms[1](middle))
        pair = channel(channel_input, ctx._replace(dropout_key=keys[1], stream=middle))
        fits = isinstance(pair, tuple) and len(pair) == 2 and getattr(pair[0], "shape", None) == x.shape
        expected = f"the pair (output of shape {shape}, input of its projection {channel.writer})"
        check_returned(type(channel).__call__, pair, fits, expected)
        out, hidden = pair
        y = constrain(middle + self.follow("down_proj", out), STREAM)
        if self.extra is not None:
            y = constrain(y + self.extra(y, ctx.layer_input), STREAM)
        if self.scalar is not None:
            y = y * self.scalar
        arrays = (mixer_input, channel_input, mixed.written, hidden, mixed.out, out, middle)
        values: dict[str, Any] = {**dict(zip(VALUES, arrays, strict=False)), KEYS: mixed.shared}
        values[self.parts[1].hidden] = values.pop("down_proj")
        if not values.keys() >= {*capture}:
            raise UserError(self.parts[1].lacks)
        return y, mixed.state, {name: values[name] for name in capture}
