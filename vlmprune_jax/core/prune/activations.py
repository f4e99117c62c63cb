"""Sums over the tokens of calibration batches, streamed: per batch only a criterion's sums leave the device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.journal import Journal, continued
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import use_mesh
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import VALUES, BlockValues, Hook
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.placement import mesh_of, place_inputs
from vlmprune_jax.core.models.vlm import Model, Params, to_nnx
from vlmprune_jax.core.prune.calibration import (
    IMAGE,
    PADDING,
    TOKEN_TYPES,
    TYPES,
    Arrays,
    batch_inputs,
    real_images,
    run_decoder,
    types_in,
)


class Tokens(NamedTuple):
    """Weight and type of each token in a batch (for a vision tower: of each image position).

    `weight`: float32, 0 for padding and excluded token types, else 1 or the weight of the token's type in the settings.
    `token_type`: int32, one of PADDING, PROMPT, IMAGE, VIDEO and ANSWER (a token with a label; a batch without labels
    has no answer tokens).
    """

    weight: jax.Array
    token_type: jax.Array


class Blocks(Protocol):
    """Function that runs a stack's blocks on one batch and returns the result of `hook` for every block.

    `hook(block)` receives `models.context.BlockValues`: the residual stream `before` and `after` the block (after the
    final norm for the decoder's last block), the requested `inputs` by name ("o_proj", "down_proj" and others of
    `context.VALUES`; the same names in every family and tower), `params` and `scales`. The results of all blocks are in
    memory at once, so the hook should reduce them over the tokens.
    """

    def __call__(self, hook: Hook, inputs: tuple[str, ...] = ()) -> list[Any]: ...


def accumulate(
    model: Model,
    batches: Iterable[Arrays],
    function: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    stack: str,
    weight_of: np.ndarray,
    splits: bool,
    progress: Callable[[int], None] | None,
    journal: Journal | None,
) -> tuple[Any, dict[str, Any]]:
    """Run `function(blocks, tokens, **options)` on all batches, and sum its results in float64 on the host.

    With `splits`, also return the sums over the tokens of each type alone, by name, if there are several types.

    Args:
      stack: name of the stack; for the tower, batches without images are skipped.
      weight_of: float32[types], weight of a token of each type.
      journal: file that keeps the sums of each batch, to continue an interrupted pass.

    Raises UserError for the tower if no batch has images.
    """
    mesh = mesh_of(model.params)
    params = jax.tree.map(jnp.asarray, model.params) if mesh is None else model.params
    fixed = tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in options.items())
    # token weights: over all tokens, and over each type alone
    types = [*TOKEN_TYPES.values()] if splits else []
    counted_as = [weight_of, *np.eye(len(TYPES), dtype=np.float32)[types]]
    step = functools.partial(_sums, cfg=model.cfg, stack=stack, function=function, options=fixed)
    ways, counts = jnp.asarray(np.stack(counted_as)), np.zeros(len(TYPES), int)
    batches = batches_of(model.cfg, stack, batches)
    first = next(batches)

    def counted(batches: Iterable[Arrays]) -> Iterator[Arrays]:
        for arrays in batches:
            counts[:] += np.bincount(arrays["token_types"].ravel(), minlength=len(TYPES))
            yield arrays

    def sums(arrays: Arrays) -> list[Any]:
        placed = place_inputs(model.params, model.cfg, batch_inputs(arrays, model.cfg))
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(step(params, placed, ways))]
        return leaves if journal is None else [leaf.tolist() for leaf in leaves]

    totals: list[np.ndarray] = []
    with use_mesh(mesh):
        # not from a result: the journal of an interrupted pass may hold all of them
        expected = jax.eval_shape(step, params, batch_inputs(first, model.cfg), ways)
        structure, shapes = jax.tree.structure(expected), [leaf.shape for leaf in jax.tree.leaves(expected)]
        entries = continued(
            sums, counted(itertools.chain([first], batches)), journal, lambda _, entry: _fits(entry, shapes)
        )
        for done, entry in enumerate(entries, start=1):
            new = [np.asarray(leaf) for leaf in entry]
            totals = [total + leaf for total, leaf in zip(totals, new, strict=True)] if totals else new
            if progress is not None:
                progress(done)
    trees = [jax.tree.unflatten(structure, [total[i] for total in totals]) for i in range(len(counted_as))]
    alone = dict(zip(TOKEN_TYPES, trees[1:], strict=False))
    return trees[0], {name: alone[name] for name in types_in(counts) if splits}


def _fits(entry: Any, shapes: list[tuple[int, ...]]) -> bool:
    """Return True if a journal entry consists of numeric arrays with the expected shapes."""
    try:
        arrays = [np.asarray(leaf) for leaf in entry]
    except (TypeError, ValueError):
        return False
    return [leaf.shape for leaf in arrays] == shapes and all(leaf.dtype.kind in "if" for leaf in arrays)


def batches_of(cfg: ModelConfig, stack: str, batches: Iterable[Arrays]) -> Iterator[Arrays]:
    """Yield the batches that contain inputs of a stack, such as images; raise UserError if none does."""
    array, some = cfg.input_of(stack), False
    for arrays in batches:
        if array in arrays:
            some = True
            yield arrays
    if not some:
        raise UserError(
            "the calibration batches have no images, which scores of a vision tower need: add records with images"
            if stack == "vision"
            else f"the calibration batches have no {array}, which scores of {stack} need: add batches with it"
        )


@functools.partial(jax.jit, static_argnames=("cfg", "stack", "function", "options"))
def _sums(
    params: Params, batch: Any, counting: Any, *, cfg: ModelConfig, stack: str, function: Any, options: Any
) -> Any:
    run, token_types = _run_of(cfg, stack)(params, cfg, batch)

    def blocks(hook: Hook, inputs: tuple[str, ...] = ()) -> list[Any]:
        for name in inputs:
            one_of("input", name, VALUES)
        return run(hook, tuple(inputs))

    def weighted_sums(weights: jax.Array) -> Any:
        return function(blocks, Tokens(weights[token_types], token_types), **dict(options))

    sums = jax.vmap(weighted_sums)(counting)  # the blocks do not depend on the weights, and run once
    return jax.tree.map(lambda leaf: constrain(leaf, (None,) * leaf.ndim), sums)


Run = tuple[Callable[[Hook, tuple[str, ...]], list[Any]], jax.Array]  # (pass over the blocks, type of every token)


def _decoder(params: Params, cfg: ModelConfig, batch: Mapping[str, Any]) -> Run:
    return functools.partial(run_decoder, params, cfg, batch), batch["token_types"]


def _tower(params: Params, cfg: ModelConfig, batch: Mapping[str, Any]) -> Run:
    tower, values = to_nnx(Model(params, cfg)).vision, batch["pixel_values"]
    images = Packed(values.astype(jax.tree.leaves(params["vision"])[0].dtype), batch["image_grid_thw"])
    if images.grid is None:
        positions = tower.cfg.grid**2 + tower.cfg.class_token
        real = real_images(batch["token_types"], values.shape[1], cfg.tokens_per_image).reshape(-1, 1)
        real = jnp.repeat(real, positions, 0)
    else:
        real = tower.places(values, images.grid).real.reshape(-1, 1)
    return _by_position(functools.partial(tower.hooked, images)), jnp.where(real, IMAGE, PADDING)


def _encoder(params: Params, cfg: ModelConfig, batch: Mapping[str, Any], *, stack: str) -> Run:
    encoder, module = dict(cfg.encoders)[stack], getattr(to_nnx(Model(params, cfg)), stack)
    array = batch[encoder.array].astype(jax.tree.leaves(params[stack])[0].dtype)
    count = (batch["input_ids"] == encoder.token_id).sum(axis=1) // encoder.tokens
    real = jnp.repeat((jnp.arange(array.shape[1])[None] < count[:, None]).reshape(-1, 1), encoder.positions, 0)
    items = array.reshape(-1, *array.shape[2:])
    return _by_position(functools.partial(module.hooked, items)), jnp.where(real, IMAGE, PADDING)


def _by_position(hooked: Callable[..., Any]) -> Callable[[Hook, tuple[str, ...]], list[Any]]:
    """Return a function that runs a tower and calls a hook for every block, with one row per image position."""

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(-1, 1, *x.shape[2:])

    def run(hook: Hook, inputs: tuple[str, ...]) -> list[Any]:
        def by_position(block: BlockValues) -> Any:
            before, after, inputs, scales = jax.tree.map(rows, (block.before, block.after, block.inputs, block.scales))
            return hook(BlockValues(before, after, inputs, block.params, scales))

        return hooked(hook=by_position, hook_inputs=inputs)[1]

    return run


def _run_of(cfg: ModelConfig, stack: str) -> Callable[..., Run]:
    """Return the function that prepares a `Run` (a pass over all blocks on one batch) for this stack."""
    encoder = functools.partial(_encoder, stack=stack) if stack in dict(cfg.encoders) else None
    return encoder or {"text": _decoder, "vision": _tower}[stack]
