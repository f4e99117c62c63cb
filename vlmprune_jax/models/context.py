"""Types that the parts of a layer share: inputs of a forward pass, names of intermediate values, LoRA dropout.

A block adds two branches to its residual stream, a mixer (attention) and a channel mixer (MLP). The names of what they
read and write are the same in every family: "o_proj" is the projection with which the mixer writes to the stream, and
"down_proj" that of the channel mixer, whatever a family calls them (`Block.writers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.models.layers import Projection, compute_once, saveable
from vlmprune_jax.models.random import bernoulli

STREAM = ("batch", "sequence", None)
WRITERS = ("o_proj", "down_proj")  # projections that write to the stream, in this order
BRANCHES = ("self_attn", "mlp")  # mixer and channel mixer, whatever they are
READERS = (*BRANCHES, *WRITERS)  # groups of matrices that read the same input
# "self_attn", "mlp": float[batch, seq, embed], inputs of both branches; "o_proj" float[batch, seq, q_heads, head] and
# "down_proj" float[batch, seq, mlp], inputs of the writers; "o_proj_out", "down_proj_out": their outputs, before what
# `Block.follow` applies; "middle": float[batch, seq, embed], the stream between attention and MLP.
# "routed": `Routed`, of layers of experts, which have no "down_proj" input in that sense.
VALUES = (*READERS, *(f"{name}_out" for name in WRITERS), "middle", "routed")
KEYS = "keys"

# State of the mixers of one run (a scan), each leaf with a leading layer axis. Attention's is (keys, values):
# [layer, slots, kv_heads, batch, head] each, the order in which TPUs read them for a token
# (in another, XLA copies the cache before and after the loop; on TPUs heads share rows that are padded, see
# `Decoder.empty_cache`). A block also gets its place on the first axis.
RunCache = tuple[jax.Array, jax.Array]
Cache = dict[str, RunCache]
CACHE_AXES = (None, None, "kv_heads", "batch", None)


class Context(NamedTuple):
    """Inputs that all transformer blocks of one forward pass share: masks, rotary tables, cache position.

    `masks`: for each attention window (0 = none) bool[batch, 1, seq, slots], True if a query attends to a key (absent
    or None: to all keys). `ropes`: for each window (cos, sin) of the rotary embedding, float32[batch, seq, rotary / 2]
    each (None: no rotation). `valid`: bool[batch, slots], True for keys that are not padding. `segments`: for each
    window int32[batch, seq]; a position attends to positions of its own segment. Kernels use `valid` and `segments`
    instead of masks, unless `ahead` is set: bool[batch, seq, seq], later keys to which queries attend. `slot`: the
    first cache slot that this call writes; int32[], or an int while prefilling. `dropout_key`: random key for LoRA
    dropout (None = off). `shared`: for each window (keys, values), for layers that reuse them. `layer_input`:
    float[batch, seq, n], this layer's `per_layer_embeds`. `stream`: float[batch, seq, embed], the residual stream whose
    norm is the channel mixer's input.
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
    stream: jax.Array | None = None


class LayerEmbeds(NamedTuple):
    """Additional embeddings of single layers, besides the residual stream (None: no such embeddings).

    `deepstack_embeds`: float[n, batch, seq, embed], image features that are added to the outputs of the first n layers
    (DeepStack, Meng et al. 2024). `per_layer_embeds`: float[layers, batch, seq, n], an additional input of each layer
    (Gemma). `of_layer` removes the first axis.
    """

    deepstack_embeds: Any = None
    per_layer_embeds: Any = None

    def of_layer(self, number: int) -> LayerEmbeds:
        """Return the embeddings of one layer."""
        return LayerEmbeds(*(None if embeds is None or number >= len(embeds) else embeds[number] for embeds in self))


class BlockValues(NamedTuple):
    """Intermediate values of one transformer block, as passed to a hook.

    `before`, `after`: float[batch, seq, embed], the residual stream before and after the block. `inputs`: the requested
    `VALUES`. `params`: the block's parameters, nested. `scales`: for each writer in `inputs` whose output is
    normalised, the factor by which the norm multiplies the output, float32[batch, seq, 1].
    """

    before: jax.Array
    after: jax.Array
    inputs: dict[str, jax.Array]
    params: dict[str, Any]
    scales: dict[str, jax.Array]


Hook = Callable[[BlockValues], Any]


class LayerState(NamedTuple):
    """Mixer states of a group of equal layers, and the number of the layer in the group that is being computed."""

    stacked: Any
    """Mixer states, as `empty_state` of the mixer's module returns them: a pytree with a leading layer axis."""

    layer: jax.Array
    """Index of the layer on this axis, int32[]."""


class Routed(NamedTuple):
    """Experts that a router chose for each token, and values of these experts: [batch, seq, experts per token]."""

    experts: jax.Array
    """int32, numbers of the chosen experts, best first."""

    gates: jax.Array
    """Factors by which the chosen experts' outputs are multiplied."""

    norms: jax.Array
    """float32, Euclidean norms of the chosen experts' outputs before the gates."""

    read: jax.Array
    """float[batch, seq, embed], input of the experts."""

    shared: jax.Array | None = None
    """float[batch, seq, mlp], input of the shared expert's down projection times its gate; None if there is none."""


class Mixed(NamedTuple):
    """Output of a mixer, and its updated state."""

    out: jax.Array
    """float[batch, seq, embed], the output of the mixer's output projection."""

    written: jax.Array
    """float[batch, seq, ...], the input of the mixer's output projection."""

    state: Any
    """The updated state of all layers of the group; None without a cache."""

    shared: Any
    """Values that later layers may reuse, such as keys and values."""


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


def lora_of(lora: LoraConfig | None, name: str) -> LoraConfig | None:
    """Return the LoRA settings of a projection; None if it gets no adapter."""
    return lora if lora is not None and name in lora.targets else None


def dropout_masks(key: jax.Array | None, x: jax.Array, projections: Sequence[Projection]) -> list[jax.Array | None]:
    """Return the LoRA dropout mask of each projection, bool[batch, seq, *inputs]; False drops an input.

    All masks are drawn at once, behind an optimisation barrier. XLA would otherwise copy the generator's 20 rounds into
    every consumer (30 copies in a step of a 7B model, whose compilation for TPUs then took 241 CPU seconds; without
    dropout it took 80).
    """
    sizes = [math.prod(module.inputs) if key is not None and module.dropout else 0 for module in projections]
    if key is None or not any(sizes):
        return [None] * len(projections)
    rate = max(module.dropout for module in projections)
    drawn = saveable(compute_once(bernoulli(key, 1 - rate, (x.shape[0], x.shape[1], sum(sizes)))))
    parts = jnp.split(constrain(drawn, STREAM), np.cumsum(sizes)[:-1].tolist(), axis=-1)
    return [
        part.reshape(*x.shape[:2], *module.inputs) if size else None
        for part, size, module in zip(parts, sizes, projections, strict=True)
    ]
