"""Greedy generation with a key/value cache: one prefill, then one token per step inside a compiled loop."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.config import ModelConfig
from vlmprune_jax.errors import UserError
from vlmprune_jax.models.decoder import attention_mask
from vlmprune_jax.models.vlm import Model, Params, check_inputs, mesh_of, place_batch, to_nnx


def generate(
    model: Model,
    input_ids: Any,
    *,
    pixel_values: Any = None,
    attention_mask: Any = None,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Greedy continuation of every prompt: int32[batch, max_new_tokens].

    Args:
      model: the model; sharded parameters give a sharded computation.
      input_ids: int[batch, seq] with image positions already expanded (see `forward`).
      pixel_values: [images, 3, H, W] in order of appearance, or [batch, slots, 3, H, W] per row.
      attention_mask: int[batch, seq], 1 = real token; padding may be on either side.
      max_new_tokens: length of the result; generation ends early once every row has ended.
      eos_token_ids: ids that end a row (default: the model's; `()` never ends). The id itself is kept, then come
        padding ids (the model's, or else the first end id).

    Raises:
      UserError: see `forward`; max_new_tokens below 1.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    check_inputs(model.cfg, input_ids, pixel_values)
    ids = np.asarray(input_ids, np.int32)
    valid = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int32)
    if (valid.sum(axis=1) == 0).any():
        raise UserError(f"row {int(np.argmin(valid.sum(axis=1)))} of the prompts is all padding")
    # Real tokens to the right, so that every row continues from the last slot. A stable sort keeps their order, and
    # with it the order of images.
    order = np.argsort(valid, axis=1, kind="stable")
    ids, valid = np.take_along_axis(ids, order, axis=1), np.take_along_axis(valid, order, axis=1)
    eos = model.cfg.eos_token_ids if eos_token_ids is None else tuple(eos_token_ids)
    mesh = mesh_of(model.params)
    arrays = place_batch({"ids": ids, "pixels": pixel_values, "valid": valid}, mesh)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        tokens = _generate(model.params, model.cfg, arrays["ids"], arrays["pixels"], arrays["valid"], max_new_tokens, eos)
    return np.asarray(tokens)


@functools.partial(jax.jit, static_argnames=("cfg", "max_new_tokens", "eos"))
def _generate(
    params: Params,
    cfg: ModelConfig,
    ids: jax.Array,
    pixels: jax.Array | None,
    valid: jax.Array,
    max_new_tokens: int,
    eos: tuple[int, ...],
) -> jax.Array:
    module = to_nnx(Model(params, cfg))
    batch, length = ids.shape
    x, _ = module.embed(ids, pixels)
    slots = jnp.concatenate([valid, jnp.ones((batch, max_new_tokens), valid.dtype)], axis=1).astype(bool)
    window = cfg.text.sliding_window
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    context = module.text.context(positions, attention_mask(slots, length, 0, window))
    cache = module.text.empty_cache(batch, length + max_new_tokens, x.dtype)
    hidden, aux = module.text(x, context, cache=cache)
    padding = cfg.pad_token_id if cfg.pad_token_id is not None else (eos[0] if eos else 0)
    n_real = positions[:, -1:] + 1

    def choose(hidden: jax.Array, ended: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = jnp.argmax(module.text.logits(hidden[:, -1]), axis=-1).astype(jnp.int32)
        token = jnp.where(ended, jnp.int32(padding), token)
        return token, ended | (token[:, None] == jnp.asarray(eos, jnp.int32)[None, :]).any(axis=1)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        i, token, ended, tokens, cache = state
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], i, axis=1)
        embedded = module.text.embed_tokens.lookup(token[:, None])
        mask = attention_mask(slots, 1, length + i, window)
        context = module.text.context(n_real + i, mask, slot=length + i)
        hidden, aux = module.text(embedded, context, cache=cache)
        token, ended = choose(hidden, ended)
        return i + 1, token, ended, tokens, aux["cache"]

    token, ended = choose(hidden, jnp.zeros((batch,), bool))
    tokens = jnp.full((batch, max_new_tokens), padding, jnp.int32)
    state = (jnp.int32(0), token, ended, tokens, aux["cache"])
    # The last token needs no forward pass of its own, hence max_new_tokens - 1 steps and one final write.
    i, token, _, tokens, _ = jax.lax.while_loop(
        lambda state: (state[0] < max_new_tokens - 1) & ~state[2].all(), step, state
    )
    return jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], i, axis=1)
