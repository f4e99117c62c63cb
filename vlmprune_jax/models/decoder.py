"""The decoder: pre-norm attention and MLP, in sequence or in parallel, scanned over runs of equal blocks."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmprune_jax.core.config import LayerShape, LoraConfig, TextConfig, runs
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.models.attention import attention_mask, for_tpu, splash_attention, windowed, xla_attention
from vlmprune_jax.models.layers import (
    SAVEABLE,
    Axes,
    LayerNorm,
    Projection,
    RMSNorm,
    activation,
    compute_once,
    declare,
    rope_tables,
    rotate,
    saveable,
)
from vlmprune_jax.models.random import bernoulli
from vlmprune_jax.models.vocabulary import Head

STREAM = ("batch", "sequence", None)
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(SAVEABLE),
}

# Projections whose inputs a tap can ask for, in every family by these names (Phi's are called dense and fc2).
TAP_INPUTS = ("o_proj", "down_proj")

# (keys, values) of one run: [layer, batch, slots, kv_heads, head] each.
Cache = dict[str, tuple[jax.Array, jax.Array]]


class Context(NamedTuple):
    """What every block of one forward pass shares.

    `cos`, `sin`: float32[batch, seq, rotary/2]; `valid`: bool[batch, slots], real keys; `masks`: per sliding window
    (0 = none) bool[batch, 1, seq, slots], true where a query may look; `slot`: int32[], first cache slot that this call
    writes; `dropout_key` switches LoRA dropout on.
    """

    cos: jax.Array
    sin: jax.Array
    valid: jax.Array
    masks: dict[int, jax.Array]
    slot: jax.Array
    dropout_key: jax.Array | None = None


class Block(NamedTuple):
    """What a tap sees of one block.

    `before`, `after`: float[batch, seq, embed]; `inputs`: what the projections read that were asked for, "o_proj"
    float[batch, seq, q_heads, head] and "down_proj" float[batch, seq, mlp]; `params`: the block's own, nested.
    """

    before: jax.Array
    after: jax.Array
    inputs: dict[str, jax.Array]
    params: dict[str, Any]


Tap = Callable[[Block], Any]


class Attention(nnx.Module):
    """Grouped-query attention with rotary embedding; with `qk_norm` every query and key head is normed before it."""

    def __init__(self, cfg: TextConfig, shape: LayerShape, sizes: Mapping[str, int], lora: LoraConfig | None):
        def projection(name: str, out: Axes, into: Axes, bias: bool) -> Projection:
            return Projection(sizes, out, into, bias=bias, lora=_adapter(lora, name))

        self.window = shape.window or 0
        self.q_proj = projection("q_proj", ("q_heads", "head"), ("embed",), cfg.qkv_bias)
        self.k_proj = projection("k_proj", ("kv_heads", "head"), ("embed",), cfg.qkv_bias)
        self.v_proj = projection("v_proj", ("kv_heads", "head"), ("embed",), cfg.qkv_bias)
        self.out_name = output_names(cfg)[0]
        setattr(self, self.out_name, projection(self.out_name, ("embed",), ("q_heads", "head"), cfg.out_bias))
        self.q_norm = RMSNorm(sizes, "head", eps=cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(sizes, "head", eps=cfg.norm_eps) if cfg.qk_norm else None

    def __call__(self, x: jax.Array, ctx: Context, cache: tuple[jax.Array, jax.Array] | None):
        out_proj = getattr(self, self.out_name)
        dropout_masks = _dropout_masks(ctx.dropout_key, x, (self.q_proj, self.k_proj, self.v_proj, out_proj))
        q, k, v = self.q_proj(x, dropout_masks[0]), self.k_proj(x, dropout_masks[1]), self.v_proj(x, dropout_masks[2])
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, ctx.cos, ctx.sin), rotate(k, ctx.cos, ctx.sin)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, ctx.slot, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, ctx.slot, axis=1)
            cache = (k, v)
        if cache is None and for_tpu():
            mixed = splash_attention(q, k, v, ctx.valid, causal=True, window=self.window)
        else:
            mixed = xla_attention(q, k, v, ctx.masks[self.window])
        return out_proj(mixed, dropout_masks[3]), mixed, cache


class GatedMlp(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, cfg: TextConfig, sizes: Mapping[str, int], lora: LoraConfig | None):
        def projection(name: str, out: str, into: str) -> Projection:
            return Projection(sizes, (out,), (into,), bias=cfg.mlp_bias, lora=_adapter(lora, name))

        self.gate_proj = projection("gate_proj", "mlp", "embed")
        self.up_proj = projection("up_proj", "mlp", "embed")
        self.down_proj = projection("down_proj", "embed", "mlp")
        self.activation = cfg.activation

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        dropout_masks = _dropout_masks(dropout_key, x, (self.gate_proj, self.up_proj, self.down_proj))
        gate = activation(self.activation)(self.gate_proj(x, dropout_masks[0]))
        hidden = compute_once(gate * self.up_proj(x, dropout_masks[1]))
        return self.down_proj(hidden, dropout_masks[2]), hidden


class PlainMlp(nnx.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, cfg: TextConfig, sizes: Mapping[str, int], lora: LoraConfig | None):
        self.fc1 = Projection(sizes, ("mlp",), ("embed",), bias=cfg.mlp_bias, lora=_adapter(lora, "fc1"))
        self.fc2 = Projection(sizes, ("embed",), ("mlp",), bias=cfg.mlp_bias, lora=_adapter(lora, "fc2"))
        self.activation = cfg.activation

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        dropout_masks = _dropout_masks(dropout_key, x, (self.fc1, self.fc2))
        hidden = compute_once(activation(self.activation)(self.fc1(x, dropout_masks[0])))
        return self.fc2(hidden, dropout_masks[1]), hidden


class DecoderLayer(nnx.Module):
    """One block; with a `layer` size its parameters are stacked for a scan over a run of equal blocks."""

    def __init__(self, cfg: TextConfig, shape: LayerShape, length: int, lora: LoraConfig | None):
        sizes = {
            "layer": length,
            "embed": cfg.hidden_size,
            "head": cfg.head_dim,
            "q_heads": shape.q_heads,
            "kv_heads": shape.kv_heads,
            "mlp": shape.mlp,
        }
        self.input_layernorm = _norm(cfg, sizes)
        self.self_attn = Attention(cfg, shape, sizes, lora)
        self.post_attention_layernorm = None if cfg.block == "parallel" else _norm(cfg, sizes)
        self.mlp = (GatedMlp if cfg.mlp_kind == "gated" else PlainMlp)(cfg, sizes, lora)

    def __call__(
        self,
        x: jax.Array,
        ctx: Context,
        cache: tuple[jax.Array, jax.Array] | None = None,
        tap_inputs: tuple[str, ...] = (),
    ):
        """(output, cache, what `tap_inputs` read, of TAP_INPUTS, "self_attn" and "mlp"); no more than asked is kept."""
        attention_key, mlp_key = (None, None) if ctx.dropout_key is None else jax.random.split(ctx.dropout_key)
        normed = compute_once(self.input_layernorm(x))
        attended, mixed, cache = self.self_attn(normed, ctx._replace(dropout_key=attention_key), cache)
        if self.post_attention_layernorm is None:
            between = normed
            out, hidden = self.mlp(between, mlp_key)
            y = constrain(x + attended + out, STREAM)
        else:
            x = constrain(x + attended, STREAM)
            between = compute_once(self.post_attention_layernorm(x))
            out, hidden = self.mlp(between, mlp_key)
            y = constrain(x + out, STREAM)
        read = {"o_proj": mixed, "down_proj": hidden, "self_attn": normed, "mlp": between}
        return y, cache, {name: read[name] for name in tap_inputs}


def output_names(cfg: TextConfig) -> tuple[str, str]:
    """Names of a block's attention output projection and of the norm after the last block, as in Hugging Face."""
    return ("dense", "final_layernorm") if cfg.block == "parallel" else ("o_proj", "norm")


def _norm(cfg: TextConfig, sizes: Mapping[str, int]) -> RMSNorm | LayerNorm:
    return (RMSNorm if cfg.norm == "rms" else LayerNorm)(sizes, "embed", eps=cfg.norm_eps)


class Table(nnx.Module):
    """A `[vocab, embed]` matrix: the input embedding, or the output head (which may have a bias)."""

    def __init__(self, cfg: TextConfig, bias: bool = False):
        sizes = {"vocab": cfg.vocab_size, "embed": cfg.hidden_size}
        self.weight = declare(sizes, ("vocab", "embed"))
        self.bias = declare(sizes, ("vocab",)) if bias else None

    def lookup(self, ids: jax.Array) -> jax.Array:
        """Rows of int[...] ids; sentinels outside the vocabulary give an arbitrary row (they are overwritten)."""
        return jnp.take(self.weight.get_value(), ids, axis=0, mode="clip")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., vocab] of [..., embed]."""
        return Head(self.weight.get_value(), None if self.bias is None else self.bias.get_value()).logits(hidden)


class Decoder(nnx.Module):
    """Embedding, runs of blocks, final norm and head."""

    def __init__(self, cfg: TextConfig, lora: LoraConfig | None):
        self.cfg = cfg
        self.embed_tokens = Table(cfg)
        self.layers = nnx.Dict(
            {str(r): DecoderLayer(cfg, shape, length, lora) for r, (_, length, shape) in enumerate(runs(cfg.layers))}
        )
        self.norm_name = output_names(cfg)[1]
        setattr(self, self.norm_name, _norm(cfg, {"embed": cfg.hidden_size}))
        self.lm_head = None if cfg.tie_embeddings else Table(cfg, cfg.head_bias)

    def final_norm(self, x: jax.Array) -> jax.Array:
        """The norm after the last block."""
        return getattr(self, self.norm_name)(x)

    def context(
        self, positions: jax.Array, valid: jax.Array, slot: Any = 0, dropout_key: jax.Array | None = None
    ) -> Context:
        """Context of a forward at int[batch, seq] positions, which are slots `slot ...` of [batch, slots] `valid` keys.

        Without a cache the slots are the sequence. Positions may be int[batch, 3, seq], see `rope_tables`.
        """
        cos, sin = rope_tables(self.cfg.rope, self.cfg.rotary_dim, positions)
        valid = valid.astype(bool)
        mask = attention_mask(valid, positions.shape[-1], slot)
        masks = {
            size: windowed(mask, size)[:, None] for size in sorted({shape.window or 0 for shape in self.cfg.layers})
        }
        return Context(cos, sin, valid, masks, jnp.asarray(slot, jnp.int32), dropout_key)

    def run_parts(self, run: str) -> tuple[Callable[..., Any], nnx.State]:
        """One run as `(apply, state)`: `apply(slice of state, x, ctx, cache=None, tap_inputs=())` is one block.

        It returns (x, cache, {name: what the projection read} of `tap_inputs`).

        `state` has a leading layer axis; scanning it, or differentiating block by block, is up to the caller.
        """
        graph, state = nnx.split(self.layers[run])

        def apply(layer_state: nnx.State, x: jax.Array, ctx: Context, cache=None, tap_inputs: tuple[str, ...] = ()):
            return nnx.merge(graph, layer_state)(x, ctx, cache, tap_inputs)

        return apply, state

    def __call__(
        self,
        x: jax.Array,
        ctx: Context,
        *,
        states: tuple[int, ...] = (),
        tap: Tap | None = None,
        tap_inputs: tuple[str, ...] = (),
        cache: Cache | None = None,
        remat: str = "none",
        added: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Run all blocks on float[batch, seq, embed]; returns the final-norm state and what was asked for.

        `states`: indices into the Hugging Face hidden-state tuple (0 = embeddings, n_layers = after the final norm) ->
        aux["states"]. `tap(Block)` is evaluated per block inside the scan -> aux["tap"], a list with what each gave;
        the last block's `after` is the final-norm state, as in that tuple. `tap_inputs`: of TAP_INPUTS, what the tap
        looks at. `cache` -> aux["cache"], updated. `added`: float[n, batch, seq, embed], what is added to the outputs
        of the first n blocks (DeepStack, Meng et al. 2024), whatever their number in an unpruned model.
        """
        n_layers = len(self.cfg.layers)
        middle = [i for i in states if 0 < i < n_layers]
        slots = [middle.index(i + 1) if i + 1 in middle else len(middle) for i in range(n_layers)]
        saved = jnp.zeros((len(middle) + 1, *x.shape), x.dtype) if middle else None
        before, last, taps, caches = x, x, list[Any](), {}
        for run, (start, length, shape) in enumerate(runs(self.cfg.layers)):
            apply, state = self.run_parts(str(run))
            sizes = {"o_proj": (shape.q_heads, self.cfg.head_dim), "down_proj": (shape.mlp,)}
            read = {name: jnp.zeros((*x.shape[:2], *sizes[name]), x.dtype) for name in tap_inputs}
            (before, last, saved, read), (tapped, new_cache) = jax.lax.scan(
                _body(apply, ctx, tap, tap_inputs, remat, added),
                (before, last, saved, read),
                (
                    state,
                    jnp.arange(start, start + length),
                    jnp.asarray(slots[start : start + length]),
                    (cache or {}).get(str(run)),
                ),
            )
            taps += [jax.tree.map(operator.itemgetter(i), tapped) for i in range(length)]
            caches[str(run)] = new_cache
        final = self.final_norm(last)
        aux: dict[str, Any] = {"cache": caches} if cache is not None else {}
        if states:
            found = {0: x, n_layers: final}
            if saved is not None:
                found |= {i: saved[slot] for slot, i in enumerate(middle)}
            aux["states"] = tuple(found[i] for i in states)
        if tap is not None:
            params = jax.tree.map(operator.itemgetter(-1), nnx.to_pure_dict(state))
            aux["tap"] = [*taps[:-1], tap(Block(before, final, read, params))]
        return final, aux

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., vocab] of final-norm states."""
        return (self.lm_head or self.embed_tokens).logits(hidden)

    def empty_cache(self, batch: int, slots: int, dtype: Any) -> Cache:
        """Zeroed key/value cache."""
        cache: Cache = {}
        for run, (_, length, shape) in enumerate(runs(self.cfg.layers)):
            size = (length, batch, slots, shape.kv_heads, self.cfg.head_dim)
            cache[str(run)] = (jnp.zeros(size, dtype), jnp.zeros(size, dtype))
        return cache


def _body(
    apply: Callable[..., Any],
    ctx: Context,
    tap: Tap | None,
    tap_inputs: tuple[str, ...],
    remat: str,
    added: jax.Array | None,
) -> Callable[..., Any]:
    def block(state: nnx.State, x: jax.Array, index: jax.Array, cache: Any):
        key = None if ctx.dropout_key is None else jax.random.fold_in(ctx.dropout_key, index)
        return apply(state, x, ctx._replace(dropout_key=key), cache, tap_inputs)

    if remat not in REMAT_POLICIES:
        raise UserError(f"remat {remat!r} is not one of {', '.join(REMAT_POLICIES)}")
    if remat != "none":
        block = jax.checkpoint(block, policy=REMAT_POLICIES[remat])

    def body(carry: Any, layer: Any):
        (_, x, saved, _), (state, index, slot, cache) = carry, layer
        y, cache, read = block(state, x, index, cache)
        if added is not None:
            y = jax.lax.cond(index < len(added), lambda y: y + at_layer(added, index), lambda y: y, y)
        if saved is not None:
            saved = jax.lax.dynamic_update_index_in_dim(saved, y, slot, axis=0)
        tapped = tap(Block(x, y, read, nnx.to_pure_dict(state))) if tap else None
        return (x, y, saved, read), (tapped, cache)

    return body


def at_layer(added: jax.Array, index: Any) -> jax.Array:
    """float[batch, seq, embed]: what is added behind a block, of float[n, batch, seq, embed]."""
    return jax.lax.dynamic_index_in_dim(added, index, keepdims=False)


def _adapter(lora: LoraConfig | None, name: str) -> LoraConfig | None:
    return lora if lora is not None and name in lora.targets else None


def _dropout_masks(key: jax.Array | None, x: jax.Array, projections: Sequence[Projection]) -> list[jax.Array | None]:
    """Adapter dropout: bool[batch, seq, *inputs] of every projection, false where an input is dropped (None: nowhere).

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
