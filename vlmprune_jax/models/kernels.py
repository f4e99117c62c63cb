"""Attention over `[batch, seq, heads, head]`: XLA's on any device, the splash kernel on TPUs.

Splash attention (jax.experimental.pallas.ops.tpu) keeps softmax tiles on the chip; XLA writes float32 scores
[batch, heads, seq, seq] to memory, which at 4,096 tokens are 2 GiB a row and layer of a 7B model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from vlmprune_jax.distributed.mesh import row_ways
from vlmprune_jax.distributed.rules import spec
from vlmprune_jax.models.layers import SAVEABLE, saveable

# Tiles are multiples of the 128 lanes of a vector register; 512 is what MaxText and Levanter run with by default.
LANES, _LARGEST_BLOCK = 128, 512
# A score that softmax turns to 0, finite so that a query that sees no key has an arbitrary finite output.
_HIDDEN = float(-0.7 * np.finfo(np.float32).max)


def for_tpu() -> bool:
    """Return True if the function being traced is compiled for a TPU.

    The mesh in use (`jax.set_mesh`) decides, since it may be a topology that is only compiled for; else the default
    backend does.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "tpu"


def heads_per_row(kv_heads: int, head: int) -> int:
    """Return how many heads of `head` channels share a row of a TPU's cache, which is padded to the lanes.

    As many as fit, if the number of rows is divisible by the size of `tensor` in the mesh in use.
    """
    rows = kv_heads // jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    return max(n for n in range(1, max(LANES // head, 1) + 1) if rows % n == 0)


def cache_rows(kv_heads: int, head: int) -> tuple[int, int]:
    """Return (rows, channels of a row) in which the cache stores the heads of one token.

    On TPUs, small heads share a row, and rows are padded to the lanes. The compiler would store unpadded rows in
    another order than decoding reads them, and copy the cache before and after decoding.
    """
    if not for_tpu():
        return kv_heads, head
    in_row = heads_per_row(kv_heads, head)
    return kv_heads // in_row, -(-in_row * head // LANES) * LANES


def heads_of_rows(x: jax.Array, heads: int, head: int) -> jax.Array:
    """Return [batch, slots, heads, head] from the rows of a cache, which contain one or more heads and padding."""
    return x[..., : heads // x.shape[2] * head].reshape(*x.shape[:2], heads, head)


def xla_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, in_row: int = 1
) -> jax.Array:
    """Return softmax attention computed with XLA operations, with float32 scores.

    `mask`: bool[batch, 1, queries, keys], true where a query sees a key. `k` and `v` may be the rows of a cache, each
    with `in_row` heads and padding; queries are then 0 at the channels of other heads.

    The narrow arrays are scaled and transposed, so that no pass but softmax goes over the scores: jax.nn's attention
    has XLA:CPU transpose them, forward and backward (6 % of a step of SmolLM2-135M).
    """
    batch, queries, heads, head = q.shape
    scaled = (q * head**-0.5).reshape(batch, queries, k.shape[2], -1, head).transpose(0, 2, 3, 1, 4)
    places = (batch, k.shape[2], in_row, -1, queries)
    eye = np.eye(in_row, dtype=bool)[:, None, None, :, None]
    if in_row > 1:
        scaled = jnp.where(eye, scaled.reshape(*places, 1, head), 0).reshape(*scaled.shape[:-1], in_row * head)
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
        mixed = jnp.where(eye, mixed.reshape(*places, in_row, head), 0).sum(axis=-2).reshape(*scores.shape[:-1], head)
    return saveable(mixed.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, head))


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None = None,
    *,
    causal: bool,
    window: int = 0,
    segments: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Return softmax attention computed by the TPU splash kernel, with float32 scores per tile.

    `q`: the queries of the last `queries` of `seq` slots (all of them, or what follows a prefix in a cache). `valid`:
    bool[batch, seq], visible keys; a query that sees none has an arbitrary finite output. `segments`: instead of it
    int[batch, seq], and a query sees the keys of its own segment. `causal`: a query sees no later key, and with a
    `window` only that many slots, its own included (xla_attention under `windowed` counts real keys, which is the same
    if padding lies at the ends of a row). Heads are split over `tensor` and rows over (data, fsdp) of the mesh in use,
    rows only if they divide. `interpret` runs the kernel on a CPU.
    """
    batch, queries, seq = *q.shape[:2], k.shape[1]
    blocks = _block(queries), _block(seq)
    n_queries, n_keys = (-(-n // block) * block for n, block in zip((queries, seq), blocks, strict=True))
    pad = n_keys - seq
    if valid is None and pad:
        valid = jnp.ones((batch, seq), bool)
    keys = None if valid is None else jnp.pad(valid.astype(jnp.int32), ((0, 0), (0, pad)))
    if segments is not None:
        keys = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, pad)), constant_values=-1)

    def per_head(x: jax.Array, length: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array | None) -> jax.Array:
        shape = (q.shape[2], k.shape[2])
        kernel = _kernel(q.shape[1], shape, blocks, causal, window, seq - queries, interpret)

        def row(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array | None) -> jax.Array:
            if segments is not None and keys is not None:
                return kernel(q, k, v, splash.SegmentIds(keys, keys))
            # Queries are all of one segment, padding among them: as in xla_attention.
            ones = jnp.ones(q.shape[1], jnp.int32)
            return kernel(q, k, v, None if keys is None else splash.SegmentIds(ones, keys))

        return jax.vmap(row)(q, k, v, keys)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        rows = "batch" if batch % row_ways(mesh) == 0 else None
        heads = spec((rows, "q_heads", None, None))
        specs = (heads, spec((rows, "kv_heads", None, None)), spec((rows, "kv_heads", None, None)), spec((rows, None)))
        local = jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)
    scaled = q * q.shape[-1] ** -0.5  # the kernel does not scale
    out = local(per_head(scaled, n_queries), per_head(k, n_keys), per_head(v, n_keys), keys)
    return out.swapaxes(1, 2)[:, :queries]


def _block(n: int) -> int:
    """Return the kernel's tile size for `n` positions: equal tiles, multiples of a register's lanes."""
    return -(-n // (-(-n // _LARGEST_BLOCK) * LANES)) * LANES


def _kernel(
    heads: int, shape: tuple[int, int], blocks: tuple[int, int], causal: bool, window: int, offset: int, interpret: bool
) -> Any:
    """Return the splash kernel for one sequence: (q, k, v `[heads, positions, head]`, segment ids) -> attention output.

    `shape`: numbers of queries and keys; query i is in slot i + `offset` of the keys.
    """
    mask: Any = splash.FullMask(shape)
    if causal and 0 < window < shape[1]:
        mask = splash.LocalMask(shape, (window - 1, 0), offset)
    elif causal:
        mask = splash.CausalMask(shape, offset)
    block, keys = blocks
    sizes = splash.BlockSizes(block, keys, keys, block, keys, keys, block, keys)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVEABLE,  # else the backward pass runs the kernel once more (remat "dots")
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

    Counting keys instead of slots keeps the window right where padding lies between a shared prefix and its rows.
    """
    if size == 0 or size >= mask.shape[-1]:
        return mask
    from_here = jax.lax.cumsum(mask.astype(jnp.int32), axis=2, reverse=True)
    return mask & (from_here <= size)
