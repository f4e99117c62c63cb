"""Greedy generation with a key/value cache: one prefill, then one token per step inside a compiled loop."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import decoding_mesh, gather_to_host, mesh_of, place_batch, use_mesh
from vlmprune_jax.core.models.context import Cache
from vlmprune_jax.core.models.decoder import map_cache
from vlmprune_jax.core.models.inputs import Inputs, VisualInputs, read_inputs
from vlmprune_jax.core.models.media import Media, packed_rows, with_images
from vlmprune_jax.core.models.params import place_params, unflatten
from vlmprune_jax.core.models.vlm import Model, Params, VisionLanguageModel, head_of, to_nnx


@dataclass(frozen=True)
class SharedPrefix:
    """Prompt beginnings that rows of a batch share (usually an image and the text before it), each computed once.

    `input_ids`, `attention_mask`: int[prefixes, seq], padding on either side. `rows`: int[batch], each row's prefix
    number.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    rows: np.ndarray


def generate(
    model: Model,
    input_ids: Any,
    *,
    attention_mask: Any = None,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...] | None = None,
    prefix: SharedPrefix | None = None,
    **visuals: Unpack[VisualInputs],
) -> np.ndarray:
    """Return the greedy continuation of every prompt, int32[batch, max_new_tokens].

    Args:
      model: the model; sharded parameters give a sharded computation.
      input_ids: int[batch, seq] with image positions already expanded (see `forward`).
      attention_mask: int[batch, seq], 1 = real token; padding may be on either side.
      max_new_tokens: length of the result; generation ends early once every row has ended.
      eos_token_ids: ids that end a row (default: the model's; `()`: none). The result contains the id, followed by
        padding ids (the model's, or else the first end id).
      prefix: prompt beginnings that several rows share, each computed once; all images must then be in the prefixes.
      visuals: see `forward`.

    Raises UserError for inputs that `forward` refuses, max_new_tokens below 1, or a prompt without a real token.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    mesh = mesh_of(model.params)
    shown_ids, shown_mask = (input_ids, attention_mask) if prefix is None else (prefix.input_ids, prefix.attention_mask)
    inputs = read_inputs(model.cfg, shown_ids, shown_mask, visuals, packed_rows(len(shown_ids), mesh))
    host = _host_inputs(input_ids, attention_mask, inputs, prefix)
    if prefix is not None:
        read_inputs(model.cfg, input_ids, attention_mask, {}, 1)  # refuses image tokens
    eos = model.cfg.eos_token_ids if eos_token_ids is None else tuple(eos_token_ids)
    tokens, short = list[np.ndarray](), _tokens_until_long(model.cfg, host)
    for count in (short, max_new_tokens - short) if 0 < short < max_new_tokens else (max_new_tokens,):
        arrays = place_batch(host, mesh)
        with use_mesh(mesh):
            cache, state = prefill(model.params, model.cfg, arrays, count, eos)
            new, ended = decode(model.params, model.cfg, cache, state, count, eos)[:2]
        tokens.append(gather_to_host(new))
        host["ended"] = gather_to_host(ended)
        host["ids"] = np.concatenate([host["ids"], tokens[-1]], axis=1)
        host["valid"] = np.concatenate([host["valid"], np.ones_like(tokens[-1])], axis=1)
    return np.concatenate(tokens, axis=1)


@dataclass(frozen=True)
class CompiledGeneration:
    """Compiled generation program for prompts of one shape, in which rows do not stop at end tokens.

    `peak_bytes`: device memory of the larger of the two programs (prefill, decoding), weights included.
    """

    prefill: jax.stages.Compiled
    decode: jax.stages.Compiled
    params: Params
    arrays: dict[str, Any]
    mesh: Mesh | None
    peak_bytes: int | None

    def run(self) -> tuple[float, float]:
        """Generate once; return the seconds to the first token of all rows, and from the first to the last token."""
        with use_mesh(self.mesh):
            start = time.perf_counter()
            started = jax.block_until_ready(self.prefill(self.params, self.arrays))
            first = time.perf_counter()
            jax.block_until_ready(self.decode(self.params, *started))
            return first - start, time.perf_counter() - first


def compile_generation(model: Model, input_ids: Any, *, media: Media, max_new_tokens: int) -> CompiledGeneration:
    """Compile generation for equally long prompts of one shape, for repeated timing.

    Args:
      model, input_ids, media, max_new_tokens: see `generate`.

    Raises UserError for inputs that `forward` refuses.
    """
    mesh = mesh_of(model.params)
    inputs = read_inputs(model.cfg, input_ids, None, {"media": media}, packed_rows(len(input_ids), mesh))
    arrays = place_batch(_host_inputs(input_ids, None, inputs, None), mesh)
    with use_mesh(mesh):
        lowered = prefill.lower(model.params, model.cfg, arrays, max_new_tokens, ())
        first = lowered.compile()
        shapes, places = lowered.out_info, first.output_shardings
        begun = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)
        later = decode.lower(model.params, model.cfg, *begun, max_new_tokens, ()).compile()
    sizes: Any = [program.memory_analysis() for program in (first, later)]
    peak_bytes = None
    if None not in sizes:
        inputs_and_outputs = [m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes for m in sizes]
        peak_bytes = max(size + m.temp_size_in_bytes for size, m in zip(inputs_and_outputs, sizes, strict=True))
    return CompiledGeneration(first, later, model.params, arrays, mesh, peak_bytes)


def _host_inputs(input_ids: Any, attention_mask: Any, inputs: Inputs, prefix: SharedPrefix | None) -> dict[str, Any]:
    """Return the compiled program's input arrays for these prompts, in host memory.

    "least", int32[batch, 1], is the least position of a generated token: it follows all temporal patches of a video.
    """
    order, ids, valid = _align_right(input_ids, attention_mask)
    host = {"ids": ids, "valid": valid, "ended": np.zeros(len(ids), bool), "media": inputs.media}
    rows = np.arange(len(ids))
    if prefix is not None:
        order, host["prefix_ids"], host["prefix_valid"] = _align_right(prefix.input_ids, prefix.attention_mask)
        host["rows"] = rows = np.asarray(prefix.rows, np.int32)
    if inputs.positions is not None and inputs.offsets is not None:
        host["positions"] = np.take_along_axis(inputs.positions, order[:, None], axis=2)
        least = inputs.positions.max(axis=(1, 2)) + 1
        host |= {"delta": inputs.offsets[rows, None], "least": least[rows, None]}
    return host


def _tokens_until_long(cfg: ModelConfig, host: dict[str, Any]) -> int:
    """Return how many tokens can be generated before LongRoPE switches to its long factors.

    Zero or negative if no tokens remain or the factors never change. Keys cached under the short factors are invalid
    afterwards, in all layers: as in transformers, the whole text is computed again.
    """
    if cfg.text.rope.kind != "longrope":
        return 0
    lengths = host["valid"].sum(axis=1)
    if "rows" in host:
        lengths = lengths + host["prefix_valid"].sum(axis=1)[host["rows"]]
    room = cfg.text.rope.original_max_positions - int(lengths.max())
    return room + 1 if room >= 0 else 0


def _padding(cfg: ModelConfig, eos: tuple[int, ...]) -> int:
    return cfg.pad_token_id if cfg.pad_token_id is not None else (eos[0] if eos else 0)


def _align_right(input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Move each row's real tokens to its end, so that all rows continue at the same cache position.

    Returns the order of the tokens, the ids, and the mask.
    """
    ids = np.asarray(input_ids, np.int32)
    valid = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int32)
    if (valid.sum(axis=1) == 0).any():
        raise UserError(f"row {int(np.argmin(valid.sum(axis=1)))} of the prompts contains only padding: leave it out")
    order = np.argsort(valid, axis=1, kind="stable")
    return order, np.take_along_axis(ids, order, axis=1), np.take_along_axis(valid, order, axis=1)


def on_decoding_mesh(model: Model, sizes: Sequence[int] = ()) -> Model:
    """Reshard a model from its training mesh to the mesh for generation; models without a mesh are unchanged.

    `sizes`: (data, fsdp, tensor) of the mesh for generation; by default, this function chooses them.
    """
    n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    mesh = decoding_mesh(model.cfg, mesh_of(model.params), n_bytes, sizes)
    if mesh is None or mesh == mesh_of(model.params):
        return model
    return model.replace(params=unflatten(place_params(model, mesh)))


class DecodingState(NamedTuple):
    """State of generation between two tokens, except the key/value cache.

    `token`: int32[batch], the last token, not yet in the cache. `ended`: bool[batch], True for rows that have ended.
    `slots`: bool[batch, slots], True for cache slots of real tokens, including new tokens. `position`: int32[batch, 1],
    position of the first new token.
    """

    token: jax.Array
    ended: jax.Array
    slots: jax.Array
    position: jax.Array


@functools.partial(jax.jit, static_argnames=("cfg", "max_new_tokens", "eos"))
def prefill(
    params: Params, cfg: ModelConfig, arrays: dict[str, Any], max_new_tokens: int, eos: tuple[int, ...]
) -> tuple[Cache, DecodingState]:
    """Run the prompts and choose every row's first token; return the cache and the decoding state.

    `arrays`: prompts moved to the right end of their rows, the images of the prompts, and optionally a shared prefix.
    """
    module = to_nnx(Model(params, cfg))
    valid = arrays["valid"]
    batch, length = valid.shape
    cache, before = _prefill_prefix(module, arrays)
    start = before.shape[1]
    past = jnp.concatenate([before, valid], axis=1)
    slots = jnp.concatenate([past, jnp.ones((batch, max_new_tokens), past.dtype)], axis=1).astype(bool)
    positions = jnp.maximum(jnp.cumsum(past, axis=1) - 1, 0)
    n_real = positions[:, -1:] + 1
    query_positions = positions[:, start:]
    if "delta" in arrays:  # images take fewer positions than tokens
        n_real = jnp.maximum(n_real + arrays["delta"], arrays["least"])
        query_positions = arrays["positions"] if start == 0 else query_positions + arrays["delta"]
    elif start == 0:
        shown = "vision" in arrays.get("media", {})
        query_positions = with_images(cfg, shown, query_positions, arrays["ids"], valid)
    x, layer_embeds = module.embed(arrays["ids"], None if start else arrays.get("media"))
    empty = module.text.empty_cache(batch, length + max_new_tokens, x.dtype)
    cache = empty if cache is None else map_cache(cfg.text, _append_slots, cache, empty)
    context = module.text.context(slots, query_positions, slot=start)
    hidden, aux = module.text(x, context, cache=cache, layer_embeds=layer_embeds)
    token, ended = _choose(params, cfg, hidden, arrays["ended"], eos)
    return aux["cache"], DecodingState(token, ended, slots, n_real)


def _choose(
    params: Params, cfg: ModelConfig, hidden: jax.Array, ended: jax.Array, eos: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Return each row's most likely next token, int32[batch], and bool[batch], True for rows that have ended."""
    token = jnp.argmax(head_of(params, cfg).logits(hidden[:, -1]), axis=-1).astype(jnp.int32)
    token = jnp.where(ended, jnp.int32(_padding(cfg, eos)), token)
    return token, ended | (token[:, None] == jnp.asarray(eos, jnp.int32)[None, :]).any(axis=1)


@functools.partial(jax.jit, static_argnames=("cfg", "max_new_tokens", "eos"), donate_argnames=("cache",))
def decode(
    params: Params, cfg: ModelConfig, cache: Cache, state: DecodingState, max_new_tokens: int, eos: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, Cache]:
    """Generate all tokens after the first, updating the key/value cache in place.

    Returns the tokens int32[batch, max_new_tokens], bool[batch] (True for rows that have ended), and the cache.
    """
    module = to_nnx(Model(params, cfg))
    slots, position = state.slots, state.position
    batch, first = slots.shape[0], slots.shape[1] - max_new_tokens

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, token, ended, tokens, cache = carry
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], i, axis=1)
        context = module.text.context(slots, position + i, slot=first + i)
        x, layer_embeds = module.embed(token[:, None])
        hidden, aux = module.text(x, context, cache=cache, layer_embeds=layer_embeds)
        token, ended = _choose(params, cfg, hidden, ended, eos)
        return i + 1, token, ended, tokens, aux["cache"]

    tokens = jnp.full((batch, max_new_tokens), _padding(cfg, eos), jnp.int32)
    # The last token needs no forward pass of its own, hence max_new_tokens - 1 steps and one final write.
    i, token, ended, tokens, cache = jax.lax.while_loop(
        lambda carry: (carry[0] < max_new_tokens - 1) & ~carry[2].all(),
        step,
        (jnp.int32(0), state.token, state.ended, tokens, cache),
    )
    return jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], i, axis=1), ended, cache


def _prefill_prefix(module: VisionLanguageModel, arrays: dict[str, Any]) -> tuple[Cache | None, jax.Array]:
    """Run the shared prompt beginnings; return every row's cache, and a mask int[batch, prefix seq]."""
    if "rows" not in arrays:
        return None, jnp.zeros((arrays["valid"].shape[0], 0), arrays["valid"].dtype)
    valid, rows = arrays["prefix_valid"], arrays["rows"]
    ids, media = arrays["prefix_ids"], arrays.get("media", {})
    x, layer_embeds = module.embed(ids, media)
    cache = module.text.empty_cache(valid.shape[0], valid.shape[1], x.dtype)
    positions = with_images(module.cfg, "vision" in media, arrays.get("positions"), ids, valid)
    _, aux = module.text(x, module.text.context(valid, positions), cache=cache, layer_embeds=layer_embeds)

    def select_rows(axes: Sequence[str | None], state: jax.Array) -> jax.Array:
        return state[(slice(None),) * axes.index("batch") + (rows,)]

    return map_cache(module.cfg.text, select_rows, aux["cache"]), valid[rows]


def _append_slots(axes: Sequence[str | None], state: jax.Array, empty: jax.Array) -> jax.Array:
    return jnp.concatenate([state, empty], axis=axes.index("slots")) if "slots" in axes else state
