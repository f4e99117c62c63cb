"""Stacks of transformer blocks, scanned over equal layers and over repeated patterns of layers."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.layer import layer_runs, scan_groups
from vlmprune_jax.core.models.block import Block
from vlmprune_jax.core.models.context import (
    KEYS,
    WRITERS,
    BlockValues,
    Cache,
    Context,
    Hook,
    LayerEmbeds,
    LayerState,
    Names,
)
from vlmprune_jax.core.models.layers import SAVEABLE
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.core.stack import Stack

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(SAVEABLE),
}
_Module = TypeVar("_Module", bound=nnx.Module)


class Passed(NamedTuple):
    """Results of a forward pass through all blocks of a stack.

    `last`: the final output, float[batch, seq, embed]; `kept`: the outputs of the requested blocks, [n + 1, ...] with
    an arbitrary last entry (None: none requested); `hooks`: per block, what the hook returned; `cache`: updated.
    """

    last: jax.Array
    kept: jax.Array | None
    hooks: list[Any]
    cache: Cache


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

    def run_parts(self, run: str) -> tuple[Callable[..., Any], nnx.State]:
        """Return `(apply, state)` for a run of equal blocks; `apply(state of one block, x, ctx, ...)` runs one block.

        `state` has a leading layer axis; scanning it, or differentiating block by block, is up to the caller.
        """
        graph, state = nnx.split(self.layers[run])

        def apply(
            layer_state: nnx.State, x: jax.Array, ctx: Context, cache: Any = None, capture: tuple[str, ...] = ()
        ) -> Any:
            return nnx.merge(graph, layer_state)(x, ctx, cache, capture)

        return apply, state

    def pass_through(
        self,
        x: jax.Array,
        ctx: Context,
        *,
        keep: Sequence[int] = (),
        hook: Hook | None = None,
        hook_inputs: tuple[str, ...] = (),
        final: Callable[[jax.Array], jax.Array] | None = None,
        cache: Cache | None = None,
        remat: str = "none",
        layer_embeds: LayerEmbeds = LayerEmbeds(),
    ) -> Passed:
        """Run all blocks on hidden states float[batch, seq, embed].

        Args:
          x, ctx: residual stream before the first block; masks and rotary tables for all blocks.
          keep: numbers of the blocks whose outputs are kept.
          hook, hook_inputs: function of `BlockValues`, evaluated per block inside the scan, and the `VALUES` it sees.
          final: function applied after the last block, such as the final norm. Its result is `last`, and `after` of
            the last block in the hook.
          cache: mixer states of earlier tokens, such as keys and values.
          remat: rematerialisation policy, one of `REMAT_POLICIES`.
          layer_embeds: additional embeddings of single layers.
        """
        writers = [name for name in hook_inputs if name in WRITERS]  # only their outputs may be normalised
        norms = {name: norm for name in writers if (norm := self.layers["0"].norm_after(name))}
        capture = (*hook_inputs, *(f"{name}_out" for name in norms))

        def seen(before: jax.Array, after: jax.Array, values: dict[str, jax.Array], params: Any) -> BlockValues:
            scales = {name: norm.statistics(values[f"{name}_out"])[..., 1:] for name, norm in norms.items()}
            return BlockValues(before, after, {name: values[name] for name in hook_inputs}, params, scales)

        deepstack_embeds, per_layer_embeds = layer_embeds
        kept = jnp.zeros((len(keep) + 1, *x.shape), x.dtype) if keep else None
        cache, last, hooks, caches = cache or {}, None, dict[int, Any](), Cache()
        shared = dict[int, tuple[jax.Array, jax.Array]]()
        numbered, groups = map(str, itertools.count()), scan_groups(self.cfg.layers)
        for group in groups:
            runs, blocks, layers = list(itertools.islice(numbered, len(group.runs))), list[Callable[..., Any]](), []
            states = dict[str, nnx.State]()
            for run, (numbers, _) in zip(runs, group.runs, strict=True):
                apply, state = self.run_parts(run)
                names = (*capture, KEYS) if numbers[-1] in self.cfg.producers else capture
                blocks.append(_with_remat(apply, ctx._replace(shared=shared), names, remat, per_layer_embeds))
                slots = jnp.asarray([keep.index(i) if i in keep else len(keep) for i in numbers]) if keep else None
                states[run] = state
                each = (None if cache else state, jnp.asarray(numbers), slots, jnp.arange(len(numbers)))
                layers.append(_repeated(each, len(numbers) // group.repetitions))
            if hook is not None and final is not None and group is groups[-1]:
                first = jax.tree.map(operator.itemgetter(0), state)
                values = jax.eval_shape(blocks[-1], first, x, jnp.int32(0), None)[2]
                values.pop(KEYS, None)
                last = (x, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), values))

            def one(
                carry: Any, layer: Any, run: str, block: Any, is_last: bool, states: Any = states
            ) -> tuple[Any, Any]:
                (x, kept, last, cache), (state, index, slot, place) = carry, layer
                # In decoding, index the weights: a scan would copy its slice, which costs more than a token's products.
                state = at_layer(states[run], place) if state is None else state
                y, updated, values = block(state, x, index, LayerState(cache[run], place) if run in cache else None)
                cache = cache if updated is None else {**cache, run: updated}
                if deepstack_embeds is not None:
                    enters = index < len(deepstack_embeds)
                    y = jax.lax.cond(enters, _add_layer, lambda y, *_: y, y, deepstack_embeds, index)
                if kept is not None:
                    kept = jax.lax.dynamic_update_index_in_dim(kept, y, slot, axis=0)
                keys = values.pop(KEYS, None)
                hooked = None if hook is None else hook(seen(x, y, values, nnx.to_pure_dict(state)))
                return (y, kept, (x, values) if last is not None and is_last else last, cache), (hooked, keys)

            def body(carry: Any, layers: Any, runs: list[str] = runs, blocks: Any = blocks) -> tuple[Any, Any]:
                outputs = []
                for run, block, layer in zip(runs, blocks, layers, strict=True):
                    step = functools.partial(one, run=run, block=block, is_last=block is blocks[-1])
                    # A scan of one layer would slice the arrays again, and the backward pass would keep these slices.
                    several = layer[1].ndim > 0
                    carry, output = jax.lax.scan(step, carry, layer) if several else step(carry, layer)
                    outputs.append(output)
                return carry, outputs

            own_cache = {run: cache[run] for run in runs if run in cache}
            (x, kept, last, updated), outputs = jax.lax.scan(body, (x, kept, last, own_cache), layers)
            caches |= updated
            for (numbers, layer), output in zip(group.runs, outputs, strict=True):
                hooked, keys = _in_order(output, len(numbers))
                if keys is not None:
                    shared = {**shared, layer.mixer.window or 0: jax.tree.map(operator.itemgetter(-1), keys)}
                hooks |= {number: jax.tree.map(operator.itemgetter(i), hooked) for i, number in enumerate(numbers)}
        if final is not None:
            x = final(x)
        if hook is not None and last is not None:
            params = jax.tree.map(operator.itemgetter(-1), nnx.to_pure_dict(state))
            hooks[len(hooks) - 1] = hook(seen(last[0], x, last[1], params))
        return Passed(x, kept, [hooks[number] for number in sorted(hooks)], caches)


def _with_remat(
    apply: Callable[..., Any], ctx: Context, capture: tuple[str, ...], remat: str, per_layer_embeds: jax.Array | None
) -> Callable[..., Any]:
    """Return `apply(state, x, index, cache)`, which runs one block under a rematerialisation policy."""

    def block(state: nnx.State, x: jax.Array, index: jax.Array, cache: Any) -> Any:
        key = None if ctx.dropout_key is None else jax.random.fold_in(ctx.dropout_key, index)
        layer_input = at_layer(per_layer_embeds, index)
        return apply(state, x, ctx._replace(dropout_key=key, layer_input=layer_input), cache, capture)

    if remat not in REMAT_POLICIES:
        raise UserError(f"remat {remat!r} is not one of {', '.join(REMAT_POLICIES)}")
    return block if remat == "none" else jax.checkpoint(block, policy=REMAT_POLICIES[remat])


def _repeated(layers: Any, count: int) -> Any:
    """Reshape arrays [layers, ...] to [repetitions, count, ...]; return them unchanged if `count` is 1."""
    return layers if count == 1 else jax.tree.map(lambda leaf: leaf.reshape(-1, count, *leaf.shape[1:]), layers)


def _in_order(outputs: Any, count: int) -> Any:
    """Reshape a scan's outputs [repetitions, layers per repetition, ...] to one entry per layer, [count, ...]."""
    return jax.tree.map(lambda leaf: leaf if len(leaf) == count else leaf.reshape(count, *leaf.shape[2:]), outputs)


@functools.partial(jax.jit, inline=True)
def at_layer(stacked: Any, index: Any) -> Any:
    """Return entry `index` of every array in a pytree."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stacked)


def _add_layer(x: jax.Array, stacked: jax.Array, index: jax.Array) -> jax.Array:
    return x + at_layer(stacked, index)


def fill(module: _Module, params: Mapping[str, Any]) -> _Module:
    """Put parameters into an abstract NNX module; return the concrete module."""
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the next line writes to it
    nnx.replace_by_pure_dict(state, dict(params))
    return nnx.merge(graph, state)
