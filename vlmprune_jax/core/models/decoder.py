"""Decoder: embedding, causal blocks with rotary embedding, final norm and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.core.layer import layer_runs
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import Cache, Context, LayerEmbeds, Names, Pattern
from vlmprune_jax.core.models.kernels import attention_mask, cache_shape, windowed
from vlmprune_jax.core.models.layers import Leaf, Norm, Projection, declare, fake_quant_product, rope_tables
from vlmprune_jax.core.models.stack import BlockStack
from vlmprune_jax.core.sections import FakeQuant, LoraConfig


class Table(nnx.Module):
    """Matrix [vocab, embed] that serves as token embedding or output head; a head may have a bias."""

    def __init__(self, cfg: TextConfig, bias: bool = False):
        self.scale = cfg.embed_scale
        sizes = {"vocab": cfg.vocab_size, "embed": cfg.hidden_size}
        self.weight = declare(sizes, ("vocab", "embed"))
        self.bias = declare(sizes, ("vocab",)) if bias else None

    def lookup(self, ids: jax.Array) -> jax.Array:
        """Return the scaled embeddings of int[...] token ids; ids outside the vocabulary get arbitrary values."""
        rows = jnp.take(self.weight.get_value(), ids, axis=0, mode="clip")
        return rows if self.scale == 1 else rows * jnp.asarray(self.scale, rows.dtype)


class LayerInputs(nnx.Module):
    """Per-layer embeddings (Gemma): an additional input of every layer, from a token table and the first layer's input.

    One table holds the embeddings of all layers; pruning a layer also removes its entries on the table's axis `depth`.
    """

    def __init__(self, cfg: TextConfig):
        sizes = {
            "vocab": cfg.vocab_size,
            "depth": len(cfg.layers),
            "extra": cfg.block.layer_inputs,
            "embed": cfg.hidden_size,
        }
        self.table = Leaf(sizes, ("vocab", "depth", "extra"))
        self.project = Projection(sizes, ("depth", "extra"), ("embed",), bias=False)
        self.norm = Norm(sizes, "extra", **cfg.block.norm_facts)
        self.scales = cfg.block.layer_inputs**0.5, cfg.hidden_size**-0.5

    def __call__(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        """Return the embeddings float[layers, batch, seq, n]; `x`: the first layer's input, `ids`: int[batch, seq]."""
        rows = jnp.take(self.table.weight.get_value(), ids, axis=0, mode="clip")
        # each device looks up its share of the channels for all rows; only results are exchanged, never the table
        rows = constrain(constrain(rows, ("rows", None, None, "extra")), ("batch", "sequence", None, None))
        rows = rows * jnp.asarray(self.scales[0], rows.dtype)
        both = self.norm(self.project(x) * self.scales[1]) + rows
        return jnp.moveaxis(both * 2**-0.5, 2, 0)


class Decoder(BlockStack):
    """Language-model decoder: token embedding, transformer blocks, final norm and output head."""

    cfg: TextConfig

    def __init__(self, cfg: TextConfig, lora: LoraConfig | None = None, fake_quant: FakeQuant | None = None):
        # parameters are named as in Hugging Face's classes, those of parallel blocks as in Phi's
        out, self.norm_name = ("dense", "final_layernorm") if cfg.block.parallel else ("o_proj", "norm")
        super().__init__(cfg, Names("embed", ("input_layernorm", "post_attention_layernorm"), out), lora)
        if fake_quant is not None:
            for _, part in nnx.iter_modules(self.layers):
                if isinstance(part, Projection):
                    part.product = fake_quant_product(fake_quant)
        self.embed_tokens = Table(cfg)
        sizes = {"embed": cfg.hidden_size}
        setattr(self, self.norm_name, Norm(sizes, "embed", **cfg.block.norm_facts))
        self.lm_head = None if cfg.tie_embeddings else Table(cfg, cfg.head_bias)
        self.extra_inputs = LayerInputs(cfg) if cfg.block.layer_inputs else None

    def final_norm(self, x: jax.Array) -> jax.Array:
        """Apply the decoder's final norm to `x`."""
        return getattr(self, self.norm_name)(x)

    def context(
        self,
        mask: jax.Array,
        positions: jax.Array | None = None,
        *,
        slot: Any = 0,
        dropout_key: jax.Array | None = None,
    ) -> Context:
        """Return masks and rotary tables for queries at `positions`, whose keys are cached from `slot` on.

        `mask`: [batch, slots], 1 = real key; without a cache, the slots are the positions of the sequence. `positions`:
        int[batch, seq], by default counted along the mask; or int[batch, 3, seq], see `rope_tables`; or int[batch, 2,
        seq], with the number of each token's image (0: none) as second row, if image tokens attend to later tokens of
        their image (`Attention.sees_images`).
        """
        if positions is None:
            positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        valid, ahead = mask.astype(bool), None
        seen = attention_mask(valid, positions.shape[-1], slot)
        if positions.shape[1:-1] == (2,):  # image numbers are passed even if no layer of this stack needs them
            positions, image = positions[:, 0], positions[:, 1]
            keys = jnp.pad(image, ((0, 0), (0, mask.shape[1] - image.shape[1])))
            ahead = ~seen & valid[:, None] & (keys[:, None] == image[..., None]) & (image[..., None] > 0)
        patterns = dict[Any, Pattern]()
        for mixer in {mixer.pattern: mixer for mixer in self.cfg.attentions}.values():
            allowed = windowed(seen, mixer.window or 0)
            if ahead is not None and mixer.sees_images:  # sliding windows limit earlier keys only
                allowed |= ahead
            rope = rope_tables(mixer.rope or self.cfg.rope, mixer.rotated, positions)
            patterns[mixer.pattern] = Pattern(allowed[:, None], rope)
        return Context(patterns, ahead is not None, valid, slot=slot, dropout_key=dropout_key)

    def context_of(self, x: jax.Array, arrays: Mapping[str, Any]) -> Context:
        """Return masks and rotary tables for a batch with "attention_mask" and optionally "position_ids"."""
        return self.context(arrays["attention_mask"], arrays.get("position_ids"))

    def __call__(
        self,
        x: jax.Array,
        ctx: Context,
        *,
        states: Sequence[int] = (),
        cache: Cache | None = None,
        remat: str = "none",
        layer_embeds: LayerEmbeds = LayerEmbeds(),
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Run all blocks on float[batch, seq, embed]; return hidden states after the final norm, and auxiliary values.

        `states`: indices into the Hugging Face hidden-state tuple (0 = embeddings, n_layers = after the final norm) ->
        aux["states"]. `cache` -> aux["cache"], updated. See `BlockStack.pass_through`.
        """
        n_layers = len(self.cfg.layers)
        keep = [i - 1 for i in states if 0 < i < n_layers]
        passed = self.pass_through(x, ctx, keep=keep, cache=cache, remat=remat, layer_embeds=layer_embeds)
        final = self.final_norm(passed.last)
        hidden_states = {0: x, n_layers: final} | {i + 1: passed.kept[slot] for slot, i in enumerate(keep)}
        return final, {"cache": passed.cache, "states": tuple(hidden_states[i] for i in states)}

    def empty_cache(self, batch: int, slots: int, dtype: Any) -> Cache:
        """Return the empty (zero-filled) state of all mixers, such as a key/value cache of `slots` tokens."""
        cache = Cache()
        for run, (numbers, layer) in enumerate(layer_runs(self.cfg.layers)):
            for array in layer.mixer.state(slots):
                shape = len(numbers), *cache_shape({**array.sizes, "batch": batch})
                empty = jnp.zeros(shape, np.promote_types(dtype, np.float32) if array.wide else dtype)
                cache[str(run)] = (*cache.get(str(run), ()), empty)
        return cache


def map_cache(cfg: TextConfig, function: Callable[..., Any], *caches: Cache) -> Cache:
    """Apply `function(named axes, *arrays)` to every array of caches with the same structure."""
    runs, result = layer_runs(cfg.layers), Cache()
    for run, states in caches[0].items():
        axes = [(None, *array.sizes) for array in runs[int(run)].layer.mixer.state(1)]
        result[run] = tuple(map(function, axes, states, *(cache[run] for cache in caches[1:])))
    return result
