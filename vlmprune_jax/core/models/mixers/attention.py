"""Grouped-query attention: the mixer of `Attention` layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import CACHE_AXES, Builder, Context, LayerState, Mixed, RunCache, dropout_masks
from vlmprune_jax.core.models.kernels import (
    cache_rows,
    for_tpu,
    heads_of_rows,
    in_blocks,
    segment_attention,
    splash_attention,
    xla_attention,
)
from vlmprune_jax.core.models.layers import at_layer, rotate, unit_rms


class Attention(nnx.Module):
    """Grouped-query attention with optional rotary embedding, query and key norms, and key/value cache."""

    state_axes = (CACHE_AXES, CACHE_AXES)

    def __init__(self, build: Builder):
        facts, stream = build.part, (build.names.axis,)
        makes_keys, self.source = facts.source is None, facts.source
        makes_values = makes_keys and not facts.keys_as_values
        self.window, self.causal, self.writer = facts.window or 0, build.cfg.causal, build.names.out
        self.kv_heads = facts.kv_heads
        self.query_gain = facts.scale * facts.head_dim**0.5 or 1.0  # attention multiplies by head_dim ** -0.5
        queries = ("q_heads", "gate", "head") if facts.gated else ("q_heads", "head")
        self.q_proj, self.gated = build.projection("q_proj", queries, stream, facts.bias), facts.gated
        keys = ("kv_heads", "head")
        self.k_proj = build.projection("k_proj", keys, stream, facts.bias) if makes_keys else None
        self.v_proj = build.projection("v_proj", keys, stream, facts.bias) if makes_values else None
        setattr(self, self.writer, build.projection(self.writer, stream, ("q_heads", "head"), facts.out_bias))
        self.q_norm = build.norm("head", "rms") if facts.qk_norm else None
        self.k_norm = build.norm("head", "rms") if facts.qk_norm and makes_keys else None
        self.v_eps, self.parts = build.cfg.block.norm_eps if facts.v_norm else None, facts.rope_parts

    def _keys_and_values(
        self, x: jax.Array, ctx: Context, masks: Sequence[jax.Array | None]
    ) -> tuple[jax.Array, jax.Array]:
        if self.k_proj is None:
            shared: Any = ctx.shared
            return shared[self.source]
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

    def __call__(self, x: jax.Array, ctx: Context, state: LayerState | None) -> Mixed:
        """Run attention on float[batch, seq, embed]; later layers may reuse its keys and values (`Mixed.shared`)."""
        out_proj = getattr(self, self.writer)
        projections = (self.q_proj, self.k_proj, self.v_proj, out_proj)
        masks = dropout_masks(ctx.dropout_key, x, [module for module in projections if module is not None])
        q = self.q_proj(x, masks[0])
        gate = None
        if self.gated:
            q, gate = q[..., 0, :], q[..., 1, :]
        k, v = self._keys_and_values(x, ctx, [*masks[1:-1], None, None])
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.query_gain != 1:
            q = q * self.query_gain
        if ctx.ropes is not None:
            q = rotate(q, *ctx.ropes[self.window], self.parts)
        new, updated = (k, v), None
        if state is not None:
            updated, (k, v) = _write(state.stacked, new, state.layer, ctx.slot)
        seen = self._seen_by_kernel(q.shape[1], k.shape[1], ctx)
        if ctx.segments is not None and (for_tpu() or in_blocks(q.shape[1])):
            mixed = segment_attention(q, k, v, ctx.segments[self.window])
        elif seen and for_tpu():
            valid = None if ctx.valid is None else ctx.valid[:, :seen]
            keys, values = new if new[0].shape[1] == seen else (k[:, :seen], v[:, :seen])
            keys, values = (heads_of_rows(x, self.kv_heads, q.shape[-1]) for x in (keys, values))
            mixed = splash_attention(q, keys, values, valid, causal=self.causal, window=self.window)
        else:
            mixed = xla_attention(q, k, v, ctx.masks.get(self.window), self.kv_heads // k.shape[2])
        if gate is not None:
            mixed = mixed * jax.nn.sigmoid(gate)
        return Mixed(out_proj(mixed, masks[-1]), mixed, updated, (k, v))

    @classmethod
    def empty_state(cls, part: Any, *, length: int, slots: int, batch: int, dtype: Any) -> RunCache | None:
        """Return zero-filled keys and values of `length` equal layers; None if these layers reuse another layer's."""
        if part.source is not None:
            return None
        rows, channels = cache_rows(part.kv_heads, part.head_dim)
        size = (length, slots, rows, batch, channels)
        return jnp.zeros(size, dtype), jnp.zeros(size, dtype)


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

    updated = written(cache[0], new[0]), written(cache[1], new[1])
    keys, values = (x.transpose(2, 0, 1, 3) for x in at_layer(updated, layer))
    return updated, (keys, values)
