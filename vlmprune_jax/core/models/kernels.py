"""Attention over `[batch, seq, heads, head]`: XLA's on any device, the splash kernel on TPUs.

Splash attention (jax.experimental.pallas.ops.tpu) keeps softmax tiles on the chip; XLA writes float32 scores
[batch, heads, seq, seq] to memory, which at 4,096 tokens are 2 GiB a row and layer of a 7B model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from vlmprune_jax.core.mesh.mesh import row_ways
from vlmprune_jax.core.mesh.rules import spec
from vlmprune_jax.core.models.layers import SAVEABLE, saveable, widen

# Tiles are multiples of the 128 lanes of a vector register; 512 is what MaxText and Levanter run with by default.
LANES, _LARGEST_BLOCK = 128, 512
# A score that softmax turns to 0, finite so that a query that sees no key has an arbitrary finite output.
_HIDDEN = float(-0.7 * np.finfo(np.float32).max)


def for_tpu() -> bool:
    """Return True if the function being traced is compiled for a TPU.

    The mesh in use (`jax.set_mesh`) decides, because it may be a topology for which programs are only compiled. Without
    a mesh, the default backend decides.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "tpu"


def cache_shape(sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a cached array with these sizes by axis, as the devices of the mesh in use store it.

    On TPUs, small key/value heads share a row: as many as fit and let rows divide evenly over the mesh axis `tensor`.
    Rows are padded to a full vector. The compiler would store unpadded rows in a different order than decoding reads
    them, and copy the cache before and after decoding.
    """
    if "kv_heads" not in sizes or not for_tpu():
        return tuple(sizes.values())
    kv_heads, head = sizes["kv_heads"], sizes["head"]
    per_device = kv_heads // jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    in_row = max(n for n in range(1, max(LANES // head, 1) + 1) if per_device % n == 0)
    return tuple({**sizes, "kv_heads": kv_heads // in_row, "head": -(-in_row * head // LANES) * LANES}.values())


def heads_of_rows(x: jax.Array, heads: int, head: int) -> jax.Array:
    """Unpack cache rows, which hold one or more heads and padding, to keys or values [batch, slots, heads, head]."""
    return x[..., : heads // x.shape[2] * head].reshape(*x.shape[:2], heads, head)


def xla_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, in_row: int = 1
) -> jax.Array:
    """Return softmax attention computed with XLA operations, with float32 scores.

    `mask`: bool[batch, 1, queries, keys], True if a query attends to a key. `k` and `v` may be the rows of a cache,
    each with `in_row` heads and padding; queries are then 0 at the channels of other heads.

    The small arrays (queries, keys, values) are scaled and transposed, so that only softmax passes over the large
    scores. With jax.nn's attention, XLA:CPU transposes the scores, forward and backward (6 % of a step of
    SmolLM2-135M).
    """
    batch, queries, heads, head = q.shape
    scaled = (q * head**-0.5).reshape(batch, queries, k.shape[2], -1, head).transpose(0, 2, 3, 1, 4)
    by_head = (batch, k.shape[2], in_row, -1, queries)
    eye = np.eye(in_row, dtype=bool)[:, None, None, :, None]
    if in_row > 1:
        scaled = jnp.where(eye, scaled.reshape(*by_head, 1, head), 0).reshape(*scaled.shape[:-1], in_row * head)
    if k.shape[-1] > scaled.shape[-1]:
        scaled = jnp.pad(scaled, ((0, 0),) * 4 + ((0, k.shape[-1] - scaled.shape[-1]),))
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    dtype = np.promote_types(k.dtype, np.float32)
    scores = jnp.einsum("bkgth,bksh->bkgts", scaled, k, preferred_element_type=dtype)
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, _HIDDEN)
    mixed = jnp.einsum("bkgts,bksh->bkgth", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    mixed = mixed[..., : in_row * head]
    if in_row > 1:
        mixed = jnp.where(eye, mixed.reshape(*by_head, in_row, head), 0).sum(axis=-2).reshape(*scores.shape[:-1], head)
    return saveable(mixed.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, head))


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None = None,
    *,
    causal: bool,
    window: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Return softmax attention computed by the TPU splash kernel, with float32 scores per tile.

    `q`: the queries of the last `queries` of `seq` slots (all slots, or the slots after a prefix in a cache). `valid`:
    bool[batch, seq], keys that are not padding; a query without any such key has an arbitrary finite output. `causal`:
    a query attends to no later key, and with a `window` only to that many slots, its own included. (`windowed` counts
    real keys instead, which is the same if padding is at the ends of a row.) Heads are split over `tensor`, and rows
    over (data, fsdp) of the mesh in use if their number is divisible. `interpret` runs the kernel on a CPU.
    """
    batch, queries, seq = *q.shape[:2], k.shape[1]
    q_block, kv_block = _block(queries), _block(seq)
    n_queries, n_keys = -(-queries // q_block) * q_block, -(-seq // kv_block) * kv_block
    pad = n_keys - seq
    if valid is None and pad:
        valid = jnp.ones((batch, seq), bool)
    keys = None if valid is None else jnp.pad(valid.astype(jnp.int32), ((0, 0), (0, pad)))

    mask: Any = splash.FullMask((n_queries, n_keys))
    if causal and 0 < window < n_keys:
        mask = splash.LocalMask((n_queries, n_keys), (window - 1, 0), seq - queries)
    elif causal:
        mask = splash.CausalMask((n_queries, n_keys), seq - queries)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array | None) -> jax.Array:
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=splash.BlockSizes(q_block, kv_block, kv_block, q_block, kv_block, kv_block, q_block, kv_block),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=SAVEABLE,  # else the backward pass runs the kernel once more (remat "dots")
            interpret=interpret,
        )

        def row(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array | None) -> jax.Array:
            # All queries, padding included, get the same segment number: the result then equals xla_attention's.
            ones = jnp.ones(q.shape[1], jnp.int32)
            return kernel(q, k, v, None if keys is None else splash.SegmentIds(ones, keys))

        return jax.vmap(row)(q, k, v, keys)

    return _on_devices(local, q, k, v, keys, n_queries, n_keys)


def _on_devices(
    attention: Callable[..., jax.Array], q: Any, k: Any, v: Any, keys: Any, n_queries: int, n_keys: int
) -> jax.Array:
    """Run the function `attention` on every device for its rows and heads.

    It gets scaled queries, keys and values [batch, heads, positions, head], padded to `n_queries` and `n_keys`
    positions, and its rows of `keys`, int32[batch, n_keys].
    """
    scaled = q * q.shape[-1] ** -0.5
    queries, k, v = (
        jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)
        for x, length in ((scaled, n_queries), (k, n_keys), (v, n_keys))
    )
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        rows = "batch" if len(q) % row_ways(mesh) == 0 else None
        heads, pairs = spec((rows, "q_heads", None, None)), spec((rows, "kv_heads", None, None))
        specs = (heads, pairs, pairs, spec((rows, None)))
        attention = jax.shard_map(attention, in_specs=specs, out_specs=heads, check_vma=False)
    return attention(queries, k, v, keys).swapaxes(1, 2)[:, : q.shape[1]]


def in_blocks(positions: int) -> bool:
    """Return True if attention within segments is computed in blocks, without a mask, for rows of this length."""
    return positions > _LARGEST_BLOCK


def segment_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Return softmax attention of every position to the positions of its own segment, with float32 scores.

    `segments`: int[batch, seq], ascending except for windows within one image. Scores are computed for one block of
    queries and one block of keys at a time, and only for blocks that may share a segment. Time therefore grows with the
    squared lengths of the segments, and memory with the length of the row. TPUs run the splash kernel, which
    `interpret` runs on a CPU.
    """
    positions, in_kernel = q.shape[1], interpret or for_tpu()
    block = _block(positions) if in_kernel else _LARGEST_BLOCK
    pad = -positions % block
    ids = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, pad)), constant_values=np.iinfo(np.int32).max)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        def row(arrays: tuple[jax.Array, ...]) -> jax.Array:
            q, k, v, ids = arrays
            blocks = ids.reshape(-1, block)
            if in_kernel:
                return _segment_kernel(blocks, interpret)(q, k, v, splash.SegmentIds(ids, ids))
            grouped = q.reshape(len(k), -1, *q.shape[1:])
            q, k, v = (jnp.moveaxis(x.reshape(*x.shape[:-2], *blocks.shape, -1), -3, 0) for x in (grouped, k, v))
            return jnp.moveaxis(_row_attention(q, k, v, blocks), 0, -3).reshape(arrays[0].shape)

        return jax.lax.map(row, (q, k, v, ids))

    return _on_devices(local, q, k, v, ids, positions + pad, positions + pad)


def _row_attention(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """Return attention within the segments of one row, all arrays in blocks of positions.

    `q`: [blocks, kv_heads, group, block, head]; `k`, `v`: [blocks, kv_heads, block, head]; `ids`: int32[blocks, block].
    As in flash attention (Dao et al. 2022), softmax is accumulated over blocks of keys, and the backward pass computes
    the scores again.
    """

    @jax.checkpoint
    def queries(block: tuple[jax.Array, ...]) -> jax.Array:
        q_i, ids_i, meets_i = block

        @jax.checkpoint
        def add(keys: tuple[jax.Array, ...], carry: Any) -> Any:
            (k_j, v_j, ids_j), (top, total, out) = keys, carry
            scores = jnp.einsum("kgth,ksh->kgts", q_i, k_j, preferred_element_type=out.dtype)
            scores = jnp.where((ids_i[:, None] == ids_j[None])[None, None], scores, _HIDDEN)
            higher = jax.lax.stop_gradient(jnp.maximum(top, scores.max(axis=-1)))
            weights, fade = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            mixed = jnp.einsum("kgts,ksh->kgth", weights.astype(v.dtype), v_j, preferred_element_type=out.dtype)
            return higher, total * fade + weights.sum(axis=-1), out * fade[..., None] + mixed

        def visit(carry: Any, pair: tuple[jax.Array, ...]) -> tuple[Any, None]:
            meets, *keys = pair
            return jax.lax.cond(meets, add, lambda _, carry: carry, tuple(keys), carry), None

        zeros = jnp.zeros_like(widen(q_i))
        start = jnp.full_like(zeros[..., 0], _HIDDEN), zeros[..., 0], zeros
        _, total, out = jax.lax.scan(visit, start, (meets_i, k, v, ids))[0]
        return (out / total[..., None]).astype(q.dtype)

    return saveable(jax.lax.map(queries, (q, ids, _meeting_blocks(ids))))


def _meeting_blocks(ids: jax.Array) -> jax.Array:
    """Return bool[blocks, blocks]: True if two blocks of positions in a row may have a segment in common."""
    low, high = ids.min(axis=1), ids.max(axis=1)
    return (low[:, None] <= high[None]) & (low[None] <= high[:, None])


def _block(n: int) -> int:
    """Return the kernel's tile size for `n` positions: equal tiles, multiples of a register's lanes."""
    return -(-n // (-(-n // _LARGEST_BLOCK) * LANES)) * LANES


def _segment_kernel(ids: jax.Array, interpret: bool) -> Any:
    """Return the splash kernel for one row that skips blocks without a common segment: the mask is per block.

    `ids`: int32[blocks, block], the segment of each position.
    """
    meets = _meeting_blocks(ids)[None]
    number, marks = jnp.arange(meets.shape[1], dtype=jnp.int32), jnp.where(meets, 2, 0).astype(jnp.int32)
    by_keys, by_queries = (
        MaskInfo(jnp.where(meets, blocks, 0), None, marks, None, None) for blocks in (number, number[:, None])
    )
    return SplashAttentionKernel(
        by_keys,
        by_keys,
        by_queries,
        block_sizes=splash.BlockSizes(*(ids.shape[1],) * 8),
        is_mqa=False,
        save_residuals=False,
        mask_value=_HIDDEN,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=SAVEABLE,
        mask_function=None,
        interpret=interpret,
    )


def attention_mask(valid_keys: jax.Array, n_queries: int, start: Any) -> jax.Array:
    """Return the causal mask bool[batch, queries, keys]: True where a query attends to a key that is not padding.

    `valid_keys`: bool[batch, slots]; the queries occupy slots `start ... start + n_queries - 1`.
    """
    queries = (start + jnp.arange(n_queries))[:, None]
    slots = jnp.arange(valid_keys.shape[1])[None, :]
    return valid_keys[:, None, :] & (slots <= queries)[None]


def windowed(mask: jax.Array, size: int) -> jax.Array:
    """Restrict an attention mask bool[batch, queries, keys] to the last `size` keys per query (0 = no restriction).

    The window counts keys that are not padding, so it is also right with padding between a shared prefix and its rows.
    """
    if size == 0 or size >= mask.shape[-1]:
        return mask
    from_here = jax.lax.cumsum(mask.astype(jnp.int32), axis=2, reverse=True)
    return mask & (from_here <= size)
