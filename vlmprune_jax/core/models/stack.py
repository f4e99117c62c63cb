"""Stacks of transformer blocks, scanned over equal layers and repeated patterns of layers; user-defined encoders."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from vlmprune_jax.base.checks import ModuleRegistry, check_returned, one_of
from vlmprune_jax.core.layer import Encoder, Stack, layer_runs, scan_groups
from vlmprune_jax.core.models.block import Block
from vlmprune_jax.core.models.context import KEYS, Cache, Context, LayerEmbeds, LayerState, Names
from vlmprune_jax.core.models.layers import SAVEABLE, at_layer
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.sections import LoraConfig

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
    kept: Any
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
        # Returns the results of `pass_through` for `keep`, if the blocks were run elsewhere (gradients of one layer).
        self.passed: Callable[[Sequence[int]], Passed] | None = None
        self.layers = nnx.Dict(
            {
                str(run): Block(cfg, layer, len(numbers), names, lora)
                for run, (numbers, layer) in enumerate(layer_runs(cfg.layers))
            }
        )

    def context_of(self, x: jax.Array, arrays: Mapping[str, Any]) -> Context:
        """Return masks and rotary tables for a batch of hidden states and its other arrays; by default none."""
        del x, arrays
        return Context({})

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
        if self.passed is not None:
            return self.passed(keep)
        one_of("remat", remat, REMAT_POLICIES)
        carry = Passed(x, jnp.zeros((len(keep) + 1, *x.shape), x.dtype) if keep else None, {})
        slots = jnp.asarray([keep.index(i) if i in keep else len(keep) for i in range(len(self.cfg.layers))])
        updated, shared, names = Cache(), dict[int, Any](), map(str, itertools.count())
        for group in scan_groups(self.cfg.layers):
            runs = {next(names): numbers for numbers, _ in group.runs}
            states = {name: cache[name] for name in runs if name in cache} if cache else Cache()
            steps, inputs = list[Step](), list[Scanned]()
            for name, numbers in runs.items():
                steps.append(self._step(name, numbers, ctx._replace(shared=shared), remat, layer_embeds, slots))
                params = None if cache else nnx.state(self.layers[name])
                inputs.append(Scanned(jnp.asarray(numbers), jnp.arange(len(numbers)), params))
            carry, outputs = _scan_runs(steps, carry._replace(cache=states), inputs, group.repetitions)
            updated |= carry.cache
            for numbers, keys in zip(runs.values(), outputs, strict=True):
                for number in self.cfg.producers.intersection(numbers):
                    shared = {**shared, number: jax.tree.map(operator.itemgetter(numbers.index(number)), keys)}
        return carry._replace(cache=updated)

    def _step(
        self, name: str, numbers: Sequence[int], ctx: Context, remat: str, embeds: LayerEmbeds, slots: jax.Array
    ) -> Step:
        """Return the function that a scan over run `name`, the equal blocks `numbers`, evaluates.

        `slots`: int32[layers], entry of `Passed.kept` to which each block of the stack writes its output. The
        function's output is the block's keys and values (None unless later layers read those of a block of the run).
        """
        graph, stacked = nnx.split(self.layers[name])
        capture = (KEYS,) if self.cfg.producers.intersection(numbers) else ()
        deepstack = embeds.deepstack_embeds

        def block(params: nnx.State, x: jax.Array, number: jax.Array, state: LayerState | None) -> Any:
            key = None if ctx.dropout_key is None else jax.random.fold_in(ctx.dropout_key, number)
            inputs = ctx._replace(dropout_key=key, layer_input=at_layer(embeds.per_layer_embeds, number))
            return nnx.merge(graph, params)(x, inputs, state, capture)

        run = block if remat == "none" else jax.checkpoint(block, policy=REMAT_POLICIES[remat])

        def step(carry: Passed, scanned: Scanned) -> tuple[Passed, Any]:
            (x, kept, cache), (number, entry, params) = carry, scanned
            # In decoding, index the weights: a scan would copy its slice, which costs more than a token's products.
            params = at_layer(stacked, entry) if params is None else params
            y, state, values = run(params, x, number, LayerState(cache[name], entry) if name in cache else None)
            if deepstack is not None:
                add, skip = (lambda y: y + at_layer(deepstack, number)), (lambda y: y)
                y = jax.lax.cond(number < len(deepstack), add, skip, y)
            if kept is not None:
                kept = jax.lax.dynamic_update_index_in_dim(kept, y, slots[number], axis=0)
            return Passed(y, kept, cache if state is None else {**cache, name: state}), values.get(KEYS)

        return step


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


class EncoderModule(BlockStack):
    """Base class of user-defined encoders besides the vision tower, for audio, depth or other inputs.

    A subclass embeds items (such as sounds) and projects to decoder tokens.

    Args:
      cfg: the encoder's config.
      text_size: channels of the decoder's residual stream.
    """

    cfg: Encoder

    def __init__(self, cfg: Encoder, text_size: int):
        del text_size
        super().__init__(cfg, Names("encoder", ("layer_norm1", "layer_norm2"), "out_proj"))

    def embed(self, items: jax.Array) -> jax.Array:
        """Embed items [items, ...], such as sounds, as the first block's input float[items, positions, hidden]."""
        raise NotImplementedError

    def project(self, x: jax.Array) -> jax.Array:
        """Project the last block's output [items, positions, hidden] to tokens float[items, tokens, text_size]."""
        raise NotImplementedError

    def __call__(self, items: Packed) -> jax.Array:
        """Encode the items of a batch as decoder tokens float[items, tokens, text_size]."""
        dtype, values = jax.tree.leaves(self.layers)[0].dtype, items.values
        x = self.embed(jnp.asarray(values, dtype).reshape(-1, *values.shape[2:]))
        shape = (values.shape[0] * values.shape[1], self.cfg.positions, self.cfg.hidden_size)
        check_returned(type(self).embed, x, getattr(x, "shape", None) == shape, f"an array of shape {list(shape)}")
        states = self.pass_through(x, self.context_of(x, {})).last
        tokens, expected = self.project(states), f"an array [{len(states)}, {self.cfg.tokens}, channels of the decoder]"
        fits = getattr(tokens, "ndim", 0) == 3 and tokens.shape[:2] == (len(states), self.cfg.tokens)
        check_returned(type(self).project, tokens, fits, expected)
        return tokens


# Class of an `Encoder` config -> its module. Users add encoders by assignment (`vlmprune_jax.encoders[Mine] = ...`).
ENCODERS: ModuleRegistry[type[EncoderModule]] = ModuleRegistry("encoders", Encoder, EncoderModule, {})
