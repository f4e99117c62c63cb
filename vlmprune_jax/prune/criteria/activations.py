"""Sums over the tokens of calibration batches, streamed: per batch only a criterion's sums leave the device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.checks import one_of
from vlmprune_jax.distributed.journal import Journal, continued
from vlmprune_jax.distributed.mesh import within
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.models.decoder import TAP_INPUTS, Tap
from vlmprune_jax.models.vlm import Model, encode, mesh_of, place_batch
from vlmprune_jax.prune.criteria.calibration import KINDS, Arrays, kinds_in


class Tokens(NamedTuple):
    """The tokens of a batch, both [batch, seq].

    `weight`: float32, what a token counts: 0 where it is padding or of a kind that is left out, else 1 or what the
    settings say its kind counts. `kind`: int32, one of PADDING, PROMPT, IMAGE and
    ANSWER (a token with a label; of a batch without labels none is).
    """

    weight: jax.Array
    kind: jax.Array


class Blocks(Protocol):
    """The decoder's blocks over one batch: `blocks(tap, inputs=())` -> a list with what `tap` gave for each block.

    `tap(block)` sees a `models.decoder.Block`: `before` and `after` (of the last block after the final norm), `inputs`
    by the names asked for ("o_proj", "down_proj"; in every family) and `params`. Whatever it gives exists for all
    blocks at once: reduce it over the tokens.
    """

    def __call__(self, tap: Tap, inputs: tuple[str, ...] = ()) -> list[Any]: ...


def accumulate(
    model: Model,
    batches: Iterable[Arrays],
    function: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    weight_of: np.ndarray,
    splits: bool,
    progress: Callable[[int], None] | None,
    journal: Journal | None,
) -> tuple[Any, dict[str, Any]]:
    """The tree that `function(blocks, tokens, **options)` gives, float64 on the host, added up over all batches.

    With `splits` also the trees over the tokens of each kind alone, by name, if there are several kinds.

    Args:
      weight_of: float32[4], what a token of each kind counts.
      journal: where each batch's sums are kept, and continued from.
    """
    mesh = mesh_of(model.params)
    params = jax.tree.map(jnp.asarray, model.params) if mesh is None else model.params
    fixed = tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in options.items())
    # every way that tokens are counted: all of them, and each kind alone
    counted_as = [weight_of, *(np.eye(4, dtype=np.float32)[kind] for kind in KINDS.values() if splits)]
    step = functools.partial(_sums, cfg=model.cfg, function=function, options=fixed)
    ways, counts = jnp.asarray(np.stack(counted_as)), np.zeros(4, int)
    batches = iter(batches)
    first = next(batches)

    def counted(batches: Iterable[Arrays]) -> Iterator[Arrays]:
        for arrays in batches:
            counts[:] += np.bincount(arrays["kind"].ravel(), minlength=4)
            yield arrays

    def sums(arrays: Arrays) -> list[Any]:
        placed = place_batch(_inputs(arrays), mesh)
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(step(params, placed, ways))]
        return leaves if journal is None else [leaf.tolist() for leaf in leaves]

    totals: list[np.ndarray] = []
    with within(mesh):
        # not from a result: an interrupted pass may find all of them in its journal
        expected = jax.eval_shape(step, params, _inputs(first), ways)
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
    alone = dict(zip(KINDS, trees[1:], strict=False))
    return trees[0], {name: alone[name] for name in kinds_in(counts) if splits}


def _fits(entry: Any, shapes: list[tuple[int, ...]]) -> bool:
    """Whether an entry of a journal is numbers of these shapes."""
    try:
        found = [np.asarray(leaf) for leaf in entry]
    except (TypeError, ValueError):
        return False
    return [leaf.shape for leaf in found] == shapes and all(leaf.dtype.kind in "if" for leaf in found)


def _inputs(arrays: Arrays) -> dict[str, Any]:
    return {name: arrays.get(name) for name in ("input_ids", "attention_mask", "kind", "pixel_values")}


@functools.partial(jax.jit, static_argnames=("cfg", "function", "options"))
def _sums(params, batch, counting, *, cfg, function, options):
    mask = batch["attention_mask"]

    def blocks(tap: Tap, inputs: tuple[str, ...] = ()) -> list[Any]:
        for name in inputs:
            one_of("input", name, TAP_INPUTS)
        _, aux = encode(
            params, cfg, batch["input_ids"], pixel_values=batch["pixel_values"], attention_mask=mask, tap=tap,
            tap_inputs=tuple(inputs),
        )  # fmt: skip
        return aux["tap"]

    def of(weights: jax.Array) -> Any:
        weight = weights[batch["kind"]]
        return function(blocks, Tokens(weight, batch["kind"]), **dict(options))

    sums = jax.vmap(of)(counting)  # the blocks depend on none of them, and run once
    return jax.tree.map(lambda leaf: constrain(leaf, (None,) * leaf.ndim), sums)
