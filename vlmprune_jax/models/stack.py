"""Stacks of transformer blocks, scanned over runs of equal shape."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.layer import scan_groups
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.core.stack import Stack
from vlmprune_jax.models.block import Block
from vlmprune_jax.models.context import KEYS, WRITERS, BlockValues, Cache, Context, Hook, LayerEmbeds, LayerState, Names
from vlmprune_jax.models.layers import SAVEABLE

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(SAVEABLE),
}
_Module = TypeVar("_Module", bound=nnx.Module)


class Passed(NamedTuple):
    """Results of a forward pass through all blocks of a stack.

    `last`: the final output, float[batch, seq, embed]; `kept`: the outputs of the blocks asked for, [n + 1, ...] with
    an arbitrary last entry (None: none asked for); `hooks`: per block, what the hook returned; `cache`: updated.
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
                str(run): Block(cfg, shape, length, names, lora)
                for run, (_, length, shape) in enumerate(scan_groups(cfg.layers))
            }
        )

    def context_of(self, x: jax.Array, arrays: Mapping[str, Any]) -> Context:
        """Return the shared inputs of all blocks, for a batch with arrays named as in `encode`."""
        raise NotImplementedError

    def run_parts(self, run: str) -> tuple[Callable[..., Any], nnx.State]:
        """Return `(apply, state)` for a group of equal blocks; `apply(state of one block, x, ctx, ...)` runs one block.

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
          x, ctx: the stream before the first block, and what all blocks share.
          keep: numbers of the blocks whose outputs are kept.
          hook, hook_inputs: function of `BlockValues`, evaluated per block inside the scan, and the `VALUES` it sees.
          final: what follows the last block; its result is `last`, and the last block's `after` that the hook sees.
          cache, remat: keys and values of earlier tokens; one of `REMAT_POLICIES`.
          layer_embeds: what single blocks get beside the stream.
        """
        writers = [name for name in hook_inputs if name in WRITERS]  # a stack without blocks has no norms either
        norms = {name: norm for name in writers if (norm := self.layers["0"].norm_after(name))}
        capture = (*hook_inputs, *(f"{name}_out" for name in norms))

        def seen(before: jax.Array, after: jax.Array, values: dict[str, jax.Array], params: Any) -> BlockValues:
            scales = {name: norm.statistics(values[f"{name}_out"])[..., 1:] for name, norm in norms.items()}
            return BlockValues(before, after, {name: values[name] for name in hook_inputs}, params, scales)

        deepstack_embeds, per_layer_embeds = layer_embeds
        kept = jnp.zeros((len(keep) + 1, *x.shape), x.dtype) if keep else None
        hooks, caches, last = list[Any](), {}, None
        shared = dict[int, tuple[jax.Array, jax.Array]]()
        for run, (start, length, shape) in enumerate(scan_groups(self.cfg.layers)):
            apply, state = self.run_parts(str(run))
            own_cache = (cache or {}).get(str(run))
            produces = start + length - 1 in self.cfg.producers
            names = (*capture, KEYS) if produces else capture
            apply = _with_remat(apply, ctx._replace(shared=shared), names, remat, per_layer_embeds)
            if hook is not None and final is not None:
                values = jax.eval_shape(apply, jax.tree.map(operator.itemgetter(0), state), x, jnp.int32(0), None)[2]
                values.pop(KEYS, None)
                last = (x, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), values))
            slots = [keep.index(i) if i in keep else len(keep) for i in range(start, start + length)]

            def body(carry: Any, layer: Any, apply: Callable[..., Any] = apply, start: int = start) -> tuple[Any, Any]:
                (x, kept, last, cache), (state, index, slot) = carry, layer
                y, cache, values = apply(state, x, index, None if cache is None else LayerState(cache, index - start))
                if (deep := deepstack_embeds) is not None:
                    y = jax.lax.cond(index < len(deep), lambda y: y + at_layer(deep, index), lambda y: y, y)
                if kept is not None:
                    kept = jax.lax.dynamic_update_index_in_dim(kept, y, slot, axis=0)
                keys = values.pop(KEYS, None)
                hooked = None if hook is None else hook(seen(x, y, values, nnx.to_pure_dict(state)))
                return (y, kept, None if last is None else (x, values), cache), (hooked, keys)

            layers = (state, jnp.arange(start, start + length), jnp.asarray(slots) if keep else None)
            (x, kept, last, of_run), (hooked, keys) = jax.lax.scan(body, (x, kept, last, own_cache), layers)
            if of_run is not None:
                caches[str(run)] = of_run
            if produces:
                shared = {**shared, shape.mixer.window or 0: jax.tree.map(operator.itemgetter(-1), keys)}
            hooks += [jax.tree.map(operator.itemgetter(i), hooked) for i in range(length)]
        if final is not None:
            x = final(x)
        if hook is not None and last is not None:
            params = jax.tree.map(operator.itemgetter(-1), nnx.to_pure_dict(state))
            hooks[-1] = hook(seen(last[0], x, last[1], params))
        return Passed(x, kept, hooks, caches)


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


@functools.partial(jax.jit, inline=True)
def at_layer(stacked: Any, index: Any) -> Any:
    """Return entry `index` of every array in a pytree."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stacked)


def fill(module: _Module, params: Mapping[str, Any]) -> _Module:
    """Return a concrete NNX module from an abstract one and its parameters."""
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the next line writes to it
    nnx.replace_by_pure_dict(state, dict(params))
    return nnx.merge(graph, state)
