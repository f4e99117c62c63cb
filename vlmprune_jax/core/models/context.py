"""Types that the parts of a layer share: inputs of a forward pass, names of intermediate values, LoRA dropout.

A block adds two branches to its residual stream, a mixer (attention) and a channel mixer (MLP). The names of what they
read and write are the same in every family: "o_proj" is the projection with which the mixer writes to the stream, and
"down_proj" that of the channel mixer, whatever a family calls them (`Block.writers`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.layer import Stack
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.layers import Axes, Norm, Projection, compute_once, saveable
from vlmprune_jax.core.sections import LoraConfig

STREAM = ("batch", "sequence", None)
WRITERS = ("o_proj", "down_proj")  # projections that write to the residual stream, in this order
BRANCHES = ("self_attn", "mlp")  # names of mixer and channel mixer, whatever their type
READERS = (*BRANCHES, *WRITERS)  # groups of matrices that read the same input
# "self_attn", "mlp": float[batch, seq, embed], inputs of both branches; "o_proj" float[batch, seq, q_heads, head] and
# "down_proj" float[batch, seq, mlp], inputs of the writers; "o_proj_out", "down_proj_out": their outputs, before norm
# and scale (`Block.follow`); "middle": float[batch, seq, embed], the residual stream between attention and MLP.
# "routed": `Routed`, for layers with experts, which have one "down_proj" input per expert instead.
VALUES = (*READERS, *(f"{name}_out" for name in WRITERS), "middle", "routed")
KEYS = "keys"
# Threefry-2x32: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)

# Mixer states by run of equal layers (a scan): the arrays of `Mixer.state`, each with a leading layer axis.
Cache = dict[str, tuple[jax.Array, ...]]


class Pattern(NamedTuple):
    """Masks and rotary tables of the attention layers with equal `Attention.pattern`."""

    mask: jax.Array | None = None
    """bool[batch, 1, seq, slots], True if a query attends to a key; None: to all keys."""

    rope: tuple[jax.Array, jax.Array] | None = None
    """Rotary (cos, sin), float32[batch, seq, rotary / 2] each; None: no rotation."""

    segments: jax.Array | None = None
    """int32[batch, seq], segment of each position; a position attends to its own segment only."""


class Context(NamedTuple):
    """Inputs that all transformer blocks of one forward pass share: masks, rotary tables, cache position.

    Kernels use `valid` and segments instead of masks, unless `ahead` is True.
    """

    patterns: Mapping[Any, Pattern]
    """Masks and rotary tables by `Attention.pattern`; without an entry, layers attend to all keys without rotation."""

    ahead: bool = False
    """True if queries may attend to later keys (image tokens of the same image), which only masks describe."""

    valid: jax.Array | None = None
    """bool[batch, slots], True for keys that are not padding."""

    slot: Any = 0
    """First cache slot that this call writes: int32[], or an int while prefilling."""

    dropout_key: jax.Array | None = None
    """Random key for LoRA dropout; None: no dropout."""

    shared: Mapping[int, tuple[jax.Array, jax.Array]] | None = None
    """(keys, values) of an earlier layer, for layers that reuse them."""

    layer_input: jax.Array | None = None
    """float[batch, seq, n], per-layer embeddings of the current layer (`LayerEmbeds.per_layer_embeds`)."""

    stream: jax.Array | None = None
    """float[batch, seq, embed], residual stream whose norm is the channel mixer's input."""


class LayerEmbeds(NamedTuple):
    """Additional embeddings of single layers, besides the residual stream (None: no such embeddings)."""

    deepstack_embeds: Any = None
    """float[n, batch, seq, embed], image features added to the outputs of the first n layers (DeepStack)."""

    per_layer_embeds: Any = None
    """float[layers, batch, seq, n], an additional input of each layer (Gemma)."""

    def of_layer(self, number: int) -> LayerEmbeds:
        """Return the embeddings of one layer, without the first axis."""
        return LayerEmbeds(*(None if embeds is None or number >= len(embeds) else embeds[number] for embeds in self))


class LayerState(NamedTuple):
    """Cached mixer states (such as keys and values) of a run of equal layers, and the index of the current layer."""

    stacked: Any
    """Arrays of `Mixer.state`, with a leading layer axis."""

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
    """Results of a mixer: output, input of its output projection, updated state, and keys and values to reuse."""

    out: jax.Array
    """float[batch, seq, embed], the output of the mixer's output projection."""

    written: jax.Array
    """float[batch, seq, ...], the input of the mixer's output projection."""

    state: Any
    """The updated state of all layers of the group; None without a cache."""

    shared: Any
    """Values that later layers may reuse, such as keys and values."""


class Names(NamedTuple):
    """Names that differ between decoder and towers: the residual stream's axis, input norms, and output projection."""

    axis: str
    norms: tuple[str, str]
    out: str


class Builder(NamedTuple):
    """Argument of the constructor of a part's module: the config of the part, and what all modules of a block share."""

    part: Any
    """Config of the part, such as an `Attention`."""

    cfg: Stack
    """Config of the component."""

    sizes: Mapping[str, int]
    """Size of every named axis; "layer" for blocks whose parameters are stacked."""

    names: Names
    """Names that differ between decoder and towers."""

    lora: LoraConfig | None = None
    """Adapters of projections; None for no adapters."""

    def lora_of(self, name: str) -> LoraConfig | None:
        """Return the LoRA settings of a projection; None if it gets no adapter."""
        return self.lora if self.lora is not None and name in self.lora.targets else None

    def projection(self, name: str, out: Axes, into: Axes, bias: bool = False) -> Projection:
        """Return the projection `name` from the axes `into` to the axes `out`, with its adapter if it gets one."""
        return Projection(self.sizes, out, into, bias=bias, lora=self.lora_of(name), clips=self.cfg.block.clips)

    def norm(self, axis: str, kind: str = "") -> Norm:
        """Return a norm over an axis, of the block's kind or another ("rms", "layer")."""
        return Norm(self.sizes, axis, **{**self.cfg.block.norm_facts, "kind": kind or self.cfg.block.norm})


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
    masks = jnp.split(constrain(drawn, STREAM), np.cumsum(sizes)[:-1].tolist(), axis=-1)
    return [
        mask.reshape(*x.shape[:2], *module.inputs) if size else None
        for mask, size, module in zip(masks, sizes, projections, strict=True)
    ]


def bernoulli(key: jax.Array, probability: float, shape: tuple[int, int, int]) -> jax.Array:
    """Return random bool[rows, seq, width], True with this probability; values equal those of jax.random.bernoulli.

    On CPUs, jax.random writes to memory after every fourth round of its generator, and dropout took 15 % of a step of
    SmolLM2-135M (docs/explanation/results.md). A row may have at most 2^32 values.
    """
    first, second = jax.random.key_data(key)[:2]
    schedule = (first, second, first ^ second ^ _PARITY)
    high, low = _counters(shape)
    high, low = high + first, low + second
    for block in range(5):
        for bits in _ROTATIONS[block % 2]:
            high = high + low
            low = (low << np.uint32(bits) | low >> np.uint32(32 - bits)) ^ high
        high = high + schedule[(block + 1) % 3]
        low = low + (schedule[(block + 2) % 3] + np.uint32(block + 1))
    # jax.random makes 23 bits a float32 in [0, 1), which it compares: the same as this.
    return (high ^ low) < np.uint32(math.ceil(float(np.float32(probability)) * 2**23) << 9)


def _counters(shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
    """Return the upper and lower 32 bits of each element's index, uint32[rows, seq, width] each."""
    rows, seq, width = shape
    position, channel = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (1, 2))
    within = position * np.uint32(width) + channel
    start = (np.arange(rows, dtype=np.uint64) * np.uint64(seq * width))[:, None, None]
    low = within + start.astype(np.uint32)
    return (low < within).astype(jnp.uint32) + (start >> np.uint64(32)).astype(np.uint32), low
