"""Transformer block of decoder and vision tower.

A block adds two branches to its residual stream, attention and MLP. It names what writes to the stream: the projections
"o_proj" and "down_proj" (whatever a family calls them, see `Block.writers`) and what their outputs pass on the way. The
values inside that callers can ask for are `VALUES`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.core.parts import Layer
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.core.stack import Stack
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.models.attention import for_tpu, heads_of_rows, splash_attention, xla_attention
from vlmprune_jax.models.layers import (
    Leaf,
    Norm,
    Projection,
    activation,
    compute_once,
    rotate,
    saveable,
    unit_rms,
)
from vlmprune_jax.models.random import bernoulli

STREAM = ("batch", "sequence", None)
WRITERS = ("o_proj", "down_proj")  # projections that write to the stream, in this order
READERS = ("self_attn", "mlp", *WRITERS)  # groups of matrices that read the same input
# "self_attn", "mlp": float[batch, seq, embed], inputs of both branches; "o_proj" float[batch, seq, q_heads, head] and
# "down_proj" float[batch, seq, mlp], inputs of the writers; "o_proj_out", "down_proj_out": their outputs, before what
# `Block.follow` applies; "middle": float[batch, seq, embed], the stream between attention and MLP.
VALUES = (*READERS, *(f"{name}_out" for name in WRITERS), "middle")
KEYS = "keys"
FIXED_POINT_STEPS = 16
_MLPS = {"gated": ("gate_proj", "up_proj", "down_proj"), "plain": ("fc1", "fc2")}

# (keys, values) of one run: [layer, slots, kv_heads, batch, head] each, the order in which TPUs read them for a token
# (in another, XLA copies the cache before and after the loop; on TPUs heads share rows that are padded, see
# `Decoder.empty_cache`). A block also gets its place on the first axis.
RunCache = tuple[jax.Array, jax.Array]
Cache = dict[str, RunCache]
LayerCache = tuple[jax.Array, jax.Array, jax.Array]
CACHE_AXES = (None, None, "kv_heads", "batch", None)


class Context(NamedTuple):
    """Inputs that all transformer blocks of one forward pass share: masks, rotary tables, cache position.

    `masks`: per attention window (0 = none) bool[batch, 1, seq, slots], true where a query sees a key (absent or None:
    everywhere). `ropes`: per window (cos, sin), float32[batch, seq, rotary / 2] each, of the rotary embedding (None:
    none). `valid`: bool[batch, slots], real keys; `segments`: per window int32[batch, seq], a position sees its own
    segment (kernels take both instead of masks, unless `ahead`: bool[batch, seq, seq], later keys that queries see).
    `slot`: the first cache slot that this call writes; int32[], or an int while prefilling. `dropout_key`: LoRA dropout
    is on. `shared`: per window (keys, values) for layers that have none. `layer_input`: float[batch, seq, n], for this
    layer alone.
    """

    masks: Mapping[int, jax.Array | None]
    ropes: Mapping[int, tuple[jax.Array, jax.Array]] | None = None
    ahead: jax.Array | None = None
    valid: jax.Array | None = None
    segments: Mapping[int, jax.Array] | None = None
    slot: Any = 0
    dropout_key: jax.Array | None = None
    shared: Mapping[int, tuple[jax.Array, jax.Array]] | None = None
    layer_input: jax.Array | None = None


class BlockValues(NamedTuple):
    """Intermediate values of one transformer block, as passed to a tap function.

    `before`, `after`: float[batch, seq, embed], the stream; `inputs`: the `VALUES` asked for; `params`: the block's
    own, nested. `scales`: for writers among the inputs whose output is normalised, float32[batch, seq, 1], the factor
    by which the norm multiplies it.
    """

    before: jax.Array
    after: jax.Array
    inputs: dict[str, jax.Array]
    params: dict[str, Any]
    scales: dict[str, jax.Array]


Tap = Callable[[BlockValues], Any]


class Writer(NamedTuple):
    """Parameter paths of a projection that adds to the residual stream, and of the norm and scale that follow it."""

    projection: str
    norm: str | None
    scale: str | None


class Names(NamedTuple):
    """Parameter names in a stack's blocks: residual-stream axis, input norms, and attention output projection."""

    axis: str
    norms: tuple[str, str]
    out: str


class Attention(nnx.Module):
    """Grouped-query attention with optional rotary embedding, query and key norms, and key/value cache."""

    def __init__(self, cfg: Stack, shape: Layer, sizes: Mapping[str, int], names: Names, lora: LoraConfig | None):
        def projection(name: str, out: tuple[str, ...], into: tuple[str, ...], bias: bool) -> Projection:
            return Projection(sizes, out, into, bias=bias, lora=_adapter(lora, name), clips=cfg.clips)

        own, head_dim = not shape.mixer.kv_shared, cfg.head_dim_of(shape)
        values = own and not (isinstance(cfg, TextConfig) and cfg.keys_as_values and shape.mixer.window is None)
        self.window, self.causal, self.out_name = shape.mixer.window or 0, cfg.causal, names.out
        self.kv_heads = shape.mixer.kv_heads
        self.query_gain = cfg.query_scale * head_dim**0.5 or 1.0  # attention multiplies by head_dim ** -0.5
        self.q_proj = projection("q_proj", ("q_heads", "head"), (names.axis,), cfg.qkv_bias)
        self.k_proj = projection("k_proj", ("kv_heads", "head"), (names.axis,), cfg.qkv_bias) if own else None
        self.v_proj = projection("v_proj", ("kv_heads", "head"), (names.axis,), cfg.qkv_bias) if values else None
        setattr(self, names.out, projection(names.out, (names.axis,), ("q_heads", "head"), cfg.out_bias))
        norm = functools.partial(Norm, sizes, "head", kind="rms", eps=cfg.norm_eps, offset=cfg.norm_offset)
        self.q_norm = norm() if cfg.qk_norm else None
        self.k_norm = norm() if cfg.qk_norm and own else None
        self.v_eps, self.parts = cfg.norm_eps if cfg.v_norm else None, cfg.rope_parts

    def _keys_and_values(
        self, x: jax.Array, ctx: Context, masks: Sequence[jax.Array | None]
    ) -> tuple[jax.Array, jax.Array]:
        if self.k_proj is None:
            assert ctx.shared is not None
            return ctx.shared[self.window]
        k = self.k_proj(x, masks[0])
        v = k if self.v_proj is None else self.v_proj(x, masks[1])
        if self.k_norm is not None:
            k = self.k_norm(k)
        if self.v_eps is not None:
            v = unit_rms(v, self.v_eps)
        return k if ctx.ropes is None else rotate(k, *ctx.ropes[self.window], self.parts), v

    def _seen_by_kernel(self, queries: int, slots: int, ctx: Context) -> int:
        """Return how many leading cache positions the splash kernel attends to; 0 if it does not support this layer."""
        if ctx.ahead is not None or queries == 1:
            return 0
        if slots == queries:
            return slots
        # A window behind a prefix counts real keys, and padding may lie between the prefix and its rows.
        known = isinstance(ctx.slot, int) and not (ctx.slot and self.window)
        return ctx.slot + queries if known else 0

    def __call__(
        self, x: jax.Array, ctx: Context, cache: LayerCache | None
    ) -> tuple[jax.Array, jax.Array, RunCache | None, tuple[jax.Array, jax.Array]]:
        """Run attention; return (output, input of the output projection, cache, (keys, values))."""
        out_proj = getattr(self, self.out_name)
        projections = (self.q_proj, self.k_proj, self.v_proj, out_proj)
        dropout_masks = _dropout_masks(ctx.dropout_key, x, [one for one in projections if one is not None])
        q = self.q_proj(x, dropout_masks[0])
        k, v = self._keys_and_values(x, ctx, [*dropout_masks[1:-1], None, None])
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.query_gain != 1:
            q = q * self.query_gain
        if ctx.ropes is not None:
            q = rotate(q, *ctx.ropes[self.window], self.parts)
        new, updated = (k, v), None
        if cache is not None:
            *stacks, layer = cache
            updated, (k, v) = _write((stacks[0], stacks[1]), new, layer, ctx.slot)
        seen = self._seen_by_kernel(q.shape[1], k.shape[1], ctx)
        if seen and for_tpu():
            segments = None if ctx.segments is None else ctx.segments[self.window]
            valid = None if ctx.valid is None else ctx.valid[:, :seen]
            keys, values = new if new[0].shape[1] == seen else (k[:, :seen], v[:, :seen])
            keys, values = (heads_of_rows(x, self.kv_heads, q.shape[-1]) for x in (keys, values))
            mixed = splash_attention(q, keys, values, valid, causal=self.causal, window=self.window, segments=segments)
        else:
            mixed = xla_attention(q, k, v, ctx.masks.get(self.window), self.kv_heads // k.shape[2])
        return out_proj(mixed, dropout_masks[-1]), mixed, updated, (k, v)


def _write(cache: RunCache, new: RunCache, layer: jax.Array, slot: Any) -> tuple[RunCache, RunCache]:
    """Write a layer's new keys and values to the cache at position `slot`; return the cache and the layer's entry.

    Only the new slots are written: a loop over layers and tokens then updates the cache in place.
    """

    def written(stack: jax.Array, x: jax.Array) -> jax.Array:
        in_row = x.shape[2] // stack.shape[2]
        # not a reshape: XLA would copy the cache before and after the loop over tokens
        x = jnp.concatenate([x[:, :, head::in_row] for head in range(in_row)], axis=-1)
        x = jnp.pad(x.transpose(1, 2, 0, 3)[None], ((0, 0),) * 4 + ((0, stack.shape[-1] - x.shape[-1]),))
        return constrain(jax.lax.dynamic_update_slice(stack, x, (layer, slot, 0, 0, 0)), CACHE_AXES)

    def own(stack: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False).transpose(2, 0, 1, 3)

    keys, values = map(written, cache, new)
    return (keys, values), (own(keys), own(values))


class Mlp(nnx.Module):
    """MLP: down(act(gate(x)) * up(x)), or fc2(act(fc1(x)))."""

    def __init__(self, cfg: Stack, sizes: Mapping[str, int], axis: str, lora: LoraConfig | None):
        self.names, self.activation = _MLPS[cfg.mlp_kind], cfg.activation
        for name in self.names:
            out, into = ((axis,), ("mlp",)) if name == self.names[-1] else (("mlp",), (axis,))
            adapter = _adapter(lora, name)
            setattr(self, name, Projection(sizes, out, into, bias=cfg.mlp_bias, lora=adapter, clips=cfg.clips))

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Run the MLP; return (output, input of the down projection)."""
        projections = [getattr(self, name) for name in self.names]
        first, *up, down = zip(projections, _dropout_masks(dropout_key, x, projections), strict=True)
        hidden = activation(self.activation)(first[0](x, first[1]))
        for projection, mask in up:
            hidden = hidden * projection(x, mask)
        hidden = compute_once(hidden)
        return down[0](hidden, down[1]), hidden


class LayerInput(nnx.Module):
    """Per-layer embeddings (Gemma): add norm(project(act(gate(x)) * layer input)) to the residual stream."""

    def __init__(self, cfg: TextConfig, sizes: Mapping[str, int]):
        sizes = {**sizes, "extra": cfg.layer_inputs}
        self.gate = Projection(sizes, ("extra",), ("embed",), bias=False)
        self.project = Projection(sizes, ("embed",), ("extra",), bias=False)
        self.norm = Norm(sizes, "embed", kind=cfg.norm, eps=cfg.norm_eps, offset=cfg.norm_offset)
        self.activation = cfg.activation

    def __call__(self, x: jax.Array, layer_input: jax.Array | None) -> jax.Array:
        assert layer_input is not None
        return self.norm(self.project(activation(self.activation)(self.gate(x)) * layer_input))


class Block(nnx.Module):
    """Transformer block; its parameters are stacked along a leading axis for a scan over `length` equal blocks.

    With `norm_place` "both" (sandwich norms):
    h = x + norm(attention(norm(x))), then h + norm(mlp(norm(h))).
    """

    def __init__(self, cfg: Stack, shape: Layer, length: int, names: Names, lora: LoraConfig | None = None):
        sizes = {
            "layer": length,
            names.axis: cfg.hidden_size,
            "head": cfg.head_dim_of(shape),
            **shape.sizes,
        }
        self.names, self.parallel = names, cfg.block == "parallel"
        self.self_attn = Attention(cfg, shape, sizes, names, lora)
        self.mlp = Mlp(cfg, sizes, names.axis, lora)
        before = names.norms[: 1 if self.parallel else 2] if cfg.norm_place != "after" else ()
        after = ("attention_output_norm", "mlp_output_norm") if cfg.norm_place != "before" else ()
        for name in (*before, *after):
            norm = Norm(sizes, names.axis, kind=cfg.norm, eps=cfg.norm_eps, offset=cfg.norm_offset)
            setattr(self, name, norm)
        scales = ("layer_scale1", "layer_scale2") if cfg.layer_scale else ()
        for name in scales:
            setattr(self, name, Leaf(sizes, (names.axis,)))
        self.extra = LayerInput(cfg, sizes) if isinstance(cfg, TextConfig) and cfg.layer_inputs else None
        scaled = isinstance(cfg, TextConfig) and cfg.layer_scalar
        self.layer_scalar = Leaf({**sizes, "unit": 1}, ("unit",)) if scaled else None
        projections = (f"self_attn/{names.out}", f"mlp/{self.mlp.names[-1]}")
        following = zip(projections, after or (None, None), scales or (None, None), strict=True)
        self._writers = tuple(Writer(*parts) for parts in following)

    @property
    def writers(self) -> dict[str, Writer]:
        """{name: projection} of the block's projections whose output is added to the residual stream."""
        return dict(zip(WRITERS, self._writers, strict=True))

    def reader_of(self, path: str) -> str:
        """Return the name of the block's intermediate value (one of `READERS`) that a weight multiplies."""
        module = path.removesuffix("/weight")
        return {writer.projection: name for name, writer in self.writers.items()}.get(module, module.split("/")[0])

    def norm_after(self, name: str) -> Norm | None:
        """Return the norm applied to the output of projection `name` before the residual sum; None if there is none."""
        path = self.writers[name].norm
        return None if path is None else getattr(self, path)

    def follow(self, name: str, out: jax.Array, statistics: jax.Array | None = None) -> jax.Array:
        """Apply norm and scale to a projection's output; return what is added to the residual stream.

        `statistics`: see `Norm.__call__`.
        """
        norm, scale = self.norm_after(name), self.writers[name].scale
        out = out if norm is None else norm(out, statistics)
        return out if scale is None else out * getattr(self, scale).weight.get_value()[None, None]

    def gain(self, name: str) -> jax.Array | None:
        """Return the constant factors on a projection's output channels (norm weights, scale); None if all are 1.

        float[embed], with a leading axis if the block's parameters are stacked; None: all are 1.
        """
        norm, scale = self.norm_after(name), self.writers[name].scale
        factors = [] if norm is None else [norm.gain]
        factors += [] if scale is None else [getattr(self, scale).weight.get_value()]
        return functools.reduce(operator.mul, factors) if factors else None

    @property
    def scalar(self) -> jax.Array | None:
        """Learned factor on the block's output, float[1, 1, 1]; None means 1."""
        return None if self.layer_scalar is None else self.layer_scalar.weight.get_value()[None, None]

    def before_extra(self, y: jax.Array, layer_input: jax.Array | None, start: jax.Array) -> jax.Array:
        """Return the residual stream before per-layer embeddings (Gemma), recovered from the block's output `y`.

        A fixed point of the per-layer branch, whose size its norm bounds, by iteration from `start`.
        """
        y = y if self.scalar is None else y / self.scalar
        if self.extra is None:
            return y
        extra = self.extra
        return jax.lax.fori_loop(0, FIXED_POINT_STEPS, lambda _, x: y - extra(x, layer_input), start)

    def __call__(
        self,
        x: jax.Array,
        ctx: Context,
        cache: LayerCache | None = None,
        want: tuple[str, ...] = (),
    ) -> tuple[jax.Array, RunCache | None, dict[str, Any]]:
        """Run the block; return (output, cache, {name: intermediate value} for the names in `want`)."""
        attention_key, mlp_key = (None, None) if ctx.dropout_key is None else jax.random.split(ctx.dropout_key)
        norms = [getattr(self, name, None) for name in self.names.norms]
        attention_input = x if norms[0] is None else compute_once(norms[0](x))
        inner = ctx._replace(dropout_key=attention_key)
        attended, mixed, updated, keys = self.self_attn(attention_input, inner, cache)
        middle = x + self.follow("o_proj", attended)
        if self.parallel:
            mlp_input = attention_input
        else:
            middle = constrain(middle, STREAM)
            mlp_input = middle if norms[1] is None else compute_once(norms[1](middle))
        out, hidden = self.mlp(mlp_input, mlp_key)
        y = constrain(middle + self.follow("down_proj", out), STREAM)
        if self.extra is not None:
            y = constrain(y + self.extra(y, ctx.layer_input), STREAM)
        if self.scalar is not None:
            y = y * self.scalar
        arrays = (attention_input, mlp_input, mixed, hidden, attended, out, middle)
        values: dict[str, Any] = {**dict(zip(VALUES, arrays, strict=True)), KEYS: keys}
        return y, updated, {name: values[name] for name in want}


def _adapter(lora: LoraConfig | None, name: str) -> LoraConfig | None:
    return lora if lora is not None and name in lora.targets else None


def _dropout_masks(key: jax.Array | None, x: jax.Array, projections: Sequence[Projection]) -> list[jax.Array | None]:
    """Return the LoRA dropout mask of each projection, bool[batch, seq, *inputs]; False drops an input.

    One draw for all of them, behind a barrier. XLA copies the generator's 20 rounds into every consumer otherwise: 30
    copies in a 7B step, whose compilation for TPUs took 241 CPU seconds instead of the 80 without dropout.
    """
    sizes = [math.prod(one.inputs) if key is not None and one.dropout else 0 for one in projections]
    if key is None or not any(sizes):
        return [None] * len(projections)
    rate = max(one.dropout for one in projections)
    drawn = saveable(compute_once(bernoulli(key, 1 - rate, (x.shape[0], x.shape[1], sum(sizes)))))
    parts = jnp.split(constrain(drawn, STREAM), np.cumsum(sizes)[:-1].tolist(), axis=-1)
    return [
        part.reshape(*x.shape[:2], *one.inputs) if size else None
        for part, size, one in zip(parts, sizes, projections, strict=True)
    ]
