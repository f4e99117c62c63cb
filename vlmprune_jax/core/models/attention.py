"""Grouped-query attention: the mixer of `Attention` layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import Builder, Context, LayerState, Mixed, Pattern, dropout_masks
from vlmprune_jax.core.models.kernels import (
    for_tpu,
    heads_of_rows,
    in_blocks,
    segment_attention,
    splash_attention,
    xla_attention,
)
from vlmprune_jax.core.models.layers import at_layer, rotate, unit_rms

# Keys and values. Those of a run of equal layers are [layer, slots, kv_heads, batch, head]: TPUs read them in this
# order for a token; with another order, XLA copies the cache before and after the loop.
Pair = tuple[jax.Array, jax.Array]
CACHE_AXES = (None, "slots", "kv_heads", "batch", "head")


class Attention(nnx.Module):
    """Grouped-query attention with optional rotary embedding, query and key norms, and key/value cache."""

    def __init__(self, build: Builder):
        self.part = part = build.part
        self.causal, self.writer, self.norm_eps = build.cfg.causal, build.names.out, build.cfg.block.norm_eps
        stream, keys, makes_keys = (build.names.axis,), ("kv_heads", "head"), part.source is None
        makes_values = makes_keys and not part.keys_as_values
        queries = ("q_heads", "gate", "head") if part.gated else ("q_heads", "head")
        self.q_proj = build.projection("q_proj", queries, stream, part.bias)
        self.k_proj = build.projection("k_proj", keys, stream, part.bias) if makes_keys else None
        self.v_proj = build.projection("v_proj", keys, stream, part.bias) if makes_values else None
        setattr(self, self.writer, build.projection(self.writer, stream, ("q_heads", "head"), part.out_bias))
        self.q_norm = build.norm("head", "rms") if part.qk_norm else None
        self.k_norm = build.norm("head", "rms") if part.qk_norm and makes_keys else None

    def _seen_by_kernel(self, queries: int, slots: int, ctx: Context) -> int:
        """Return how many leading cache positions the splash kernel attends to; 0 if it does not support this layer."""
        if ctx.ahead or queries == 1:
            return 0
        if slots == queries:
            return slots
        # A window behind a prefix counts real keys, and padding may lie between the prefix and its rows.
        in_kernel = isinstance(ctx.slot, int) and not (ctx.slot and self.part.window)
        return ctx.slot + queries if in_kernel else 0

    def __call__(self, x: jax.Array, ctx: Context, state: LayerState | None) -> Mixed:
        """Run attention on float[batch, seq, embed]; later layers may reuse its keys and values (`Mixed.shared`)."""
        part, pattern = self.part, ctx.patterns.get(self.part.pattern, Pattern())
        out_proj, gate = getattr(self, self.writer), None
        projections = (self.q_proj, self.k_proj, self.v_proj, out_proj)
        present = [projection for projection in projections if projection is not None]
        first, *masks, last = dropout_masks(ctx.dropout_key, x, present)
        q = self.q_proj(x, first)
        if part.gated:
            q, gate = q[..., 0, :], q[..., 1, :]
        if self.q_norm is not None:
            q = self.q_norm(q)
        if part.scale:
            q = q * (part.scale * part.head_dim**0.5)  # attention multiplies by head_dim ** -0.5
        if pattern.rope is not None:
            q = rotate(q, *pattern.rope, part.rope_parts)
        if self.k_proj is None:
            shared: Any = ctx.shared
            k, v = shared[part.source]
        else:
            k = self.k_proj(x, masks[0])
            v = k if self.v_proj is None else self.v_proj(x, masks[1])
            if self.k_norm is not None:
                k = self.k_norm(k)
            if part.v_norm:
                v = unit_rms(v, self.norm_eps)
            if pattern.rope is not None:
                k = rotate(k, *pattern.rope, part.rope_parts)
        new, updated = (k, v), None
        if state is not None:
            updated, (k, v) = _write(state.stacked, new, state.layer, ctx.slot)
        seen = self._seen_by_kernel(q.shape[1], k.shape[1], ctx)
        if pattern.segments is not None and (for_tpu() or in_blocks(q.shape[1])):
            mixed = segment_attention(q, k, v, pattern.segments)
        elif seen and for_tpu():
            valid = None if ctx.valid is None else ctx.valid[:, :seen]
            keys, values = new if new[0].shape[1] == seen else (k[:, :seen], v[:, :seen])
            keys, values = (heads_of_rows(x, part.kv_heads, q.shape[-1]) for x in (keys, values))
            mixed = splash_attention(q, keys, values, valid, causal=self.causal, window=part.window or 0)
        else:
            mixed = xla_attention(q, k, v, pattern.mask, part.kv_heads // k.shape[2])
        if gate is not None:
            mixed = mixed * jax.nn.sigmoid(gate)
        return Mixed(out_proj(mixed, last), mixed, updated, (k, v))


def _write(cache: Pair, new: Pair, layer: jax.Array, slot: Any) -> tuple[Pair, Pair]:
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
