"""Stacks of transformer blocks, scanned over equal layers and over repeated patterns of layers."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.core.layer import layer_runs, scan_groups
from vlmprune_jax.core.models.block import Block
from vlmprune_jax.core.models.context import KEYS, Cache, Context, LayerEmbeds, LayerState, Names
from vlmprune_jax.core.models.layers import SAVEABLE, at_layer
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.core.stack import Stack

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(SAVEABLE),
}
_Module = TypeVar("_Module", bound=nnx.Module)


class Passed(NamedTuple):
    """Values that a block passes to the next, and results of a forward pass through all blocks of a stack.

    `last`: the last block's output, float[batch, seq, embed]; `kept`: the outputs of the requested blocks, [n + 1, ...]
    with an arbitrary last entry (None: none requested); `cache`: mixer states by run, updated.
    """

    last: jax.Array
    kept: jax.Array | None
    cache: Cache


class Scanned(NamedTuple):
    """Inputs of a scan over a run of equal blocks: arrays with a leading layer axis."""

    number: jax.Array
    """int32, number of the block in the stack."""

    entry: jax.Array
    """int32, index of the block in the stacked arrays of its run."""

    params: nnx.State | None
    """Parameters of the block; None with a cache."""


Step = Callable[[Passed, Scanned], tuple[Passed, Any]]


class BlockStack(nnx.Module):
    """Transformer blocks on one residual stream: the common part of decoder and vision tower."""

    def __init__(self, cfg: Stack, names: Names, lora: LoraConfig | None = None):
        self.cfg: Any = cfg
        self.layers = nnx.Dict(
            {
                str(run): Block(cfg, layer, len(numbers), names, lora)
                for run, (numbers, layer) in enumerate(layer_runs(cfg.layers))
            }
        )

    def context_of(self, x: jax.Array, arrays: Mapping[str, Any]) -> Context:
        """Return masks and rotary tables for a batch, whose arrays are named as the arguments of `encode`."""
        raise NotImplementedError

    def pass_through(
        self,
        x: jax.Array,
        ctx: Context,
        *,
        keep: Sequence[int] = (),
        cache: Cache | None = None,
        remat: str = "none",
        layer_embeds: LayerEmbeds = LayerEmbeds(),
    ) -> Passed:
        """Run all blocks on hidden states float[batch, seq, embed].

        Args:
          x, ctx: residual stream before the first block; masks and rotary tables for all blocks.
          keep: numbers of the blocks whose outputs are kept.
          cache: mixer states of earlier tokens, such as keys and values.
          remat: rematerialisation policy, one of `REMAT_POLICIES`.
          layer_embeds: additional embeddings of single layers.
        """
        one_of("remat", remat, REMAT_POLICIES)
        carry = Passed(x, jnp.zeros((len(keep) + 1, *x.shape), x.dtype) if keep else None, {})
        slots = jnp.asarray([keep.index(i) if i in keep else len(keep) for i in range(len(self.cfg.layers))])
        updated, shared, names = Cache(), dict[int, tuple[jax.Array, jax.Array]](), map(str, itertools.count())
        for group in scan_groups(self.cfg.layers):
            steps, inputs, cached = list[Step](), list[Scanned](), Cache()
            for numbers, _ in group.runs:
                name, capture = next(names), (KEYS,) if self.cfg.producers.intersection(numbers) else ()
                context = ctx._replace(shared=shared)
                step, params = _run_step(name, self.layers[name], context, capture, remat, layer_embeds, slots)
                steps.append(step)
                inputs.append(Scanned(jnp.asarray(numbers), jnp.arange(len(numbers)), None if cache else params))
                cached |= {name: cache[name]} if cache and name in cache else {}
            carry, outputs = _scan_runs(steps, carry._replace(cache=cached), inputs, group.repetitions)
            updated |= carry.cache
            for (numbers, _), keys in zip(group.runs, outputs, strict=True):
                for index, number in enumerate(numbers):
                    if number in self.cfg.producers:
                        shared = {**shared, number: jax.tree.map(operator.itemgetter(index), keys)}
        return carry._replace(cache=updated)


def _run_step(
    name: str,
    module: Block,
    ctx: Context,
    capture: tuple[str, ...],
    remat: str,
    layer_embeds: LayerEmbeds,
    slots: jax.Array,
) -> tuple[Step, nnx.State]:
    """Return the function that a scan over a run of equal blocks evaluates, and the run's stacked parameters.

    `slots`: int32[layers], entry of `Carry.kept` to which each block of the stack writes its output. The function's
    output is the block's keys and values (None unless in `capture`).
    """
    graph, stacked = nnx.split(module)
    deepstack_embeds, per_layer_embeds = layer_embeds

    def block(params: nnx.State, x: jax.Array, number: jax.Array, state: LayerState | None) -> Any:
        key = None if ctx.dropout_key is None else jax.random.fold_in(ctx.dropout_key, number)
        inputs = ctx._replace(dropout_key=key, layer_input=at_layer(per_layer_embeds, number))
        return nnx.merge(graph, params)(x, inputs, state, capture)

    run = block if remat == "none" else jax.checkpoint(block, policy=REMAT_POLICIES[remat])

    def step(carry: Passed, scanned: Scanned) -> tuple[Passed, Any]:
        (x, kept, cache), (number, entry, params) = carry, scanned
        # In decoding, index the weights: a scan would copy its slice, which costs more than a token's products.
        params = at_layer(stacked, entry) if params is None else params
        y, state, values = run(params, x, number, LayerState(cache[name], entry) if name in cache else None)
        if deepstack_embeds is not None:
            add, skip = (lambda y, embeds, number: y + at_layer(embeds, number)), (lambda y, embeds, number: y)
            y = jax.lax.cond(number < len(deepstack_embeds), add, skip, y, deepstack_embeds, number)
        if kept is not None:
            kept = jax.lax.dynamic_update_index_in_dim(kept, y, slots[number], axis=0)
        return Passed(y, kept, cache if state is None else {**cache, name: state}), values.get(KEYS)

    return step, stacked


def _scan_runs(
    steps: Sequence[Step], carry: Passed, inputs: Sequence[Scanned], repetitions: int
) -> tuple[Passed, list[Any]]:
    """Scan a repeated pattern of runs of equal blocks; return the last carry, and the outputs of every run by block."""

    def repetition(carry: Passed, inputs: list[Scanned]) -> tuple[Passed, list[Any]]:
        outputs = []
        for step, scanned in zip(steps, inputs, strict=True):
            # A scan of one layer would slice the arrays again, and the backward pass would keep these slices.
            several = scanned.number.ndim > 0
            carry, output = jax.lax.scan(step, carry, scanned) if several else step(carry, scanned)
            outputs.append(output)
        return carry, outputs

    counts = [len(scanned.number) // repetitions for scanned in inputs]
    nested = [
        scanned if n == 1 else jax.tree.map(lambda leaf, n=n: leaf.reshape(repetitions, n, *leaf.shape[1:]), scanned)
        for scanned, n in zip(inputs, counts, strict=True)
    ]
    carry, outputs = jax.lax.scan(repetition, carry, nested)
    return carry, [
        output if n == 1 else jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), output)
        for output, n in zip(outputs, counts, strict=True)
    ]


def fill(module: _Module, params: Mapping[str, Any]) -> _Module:
    """Put parameters into an abstract NNX module; return the concrete module."""
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the next line writes to it
    nnx.replace_by_pure_dict(state, dict(params))
    return nnx.merge(graph, state)
