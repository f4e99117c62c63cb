"""Values inside the blocks of a model, computed block by block in Python: neither by a scan nor by a stream."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import nnx

from vlmprune_jax.core.layer import layer_runs
from vlmprune_jax.core.models.context import KEYS, Context, LayerEmbeds
from vlmprune_jax.core.models.stack import BlockStack
from vlmprune_jax.core.models.vlm import Model, to_nnx


class BlockValues(NamedTuple):
    """Residual stream before and after a block, the requested `context.VALUES`, and the block itself.

    In a decoder, `after` the last block is after the final norm.
    """

    before: Any
    after: Any
    inputs: dict[str, Any]
    block: Any


def values_of_blocks(
    stack: BlockStack, x: Any, ctx: Context, names: tuple[str, ...] = (), embeds: LayerEmbeds = LayerEmbeds()
) -> list[BlockValues]:
    """Run a stack on hidden states float[batch, seq, embed]; return the values of every block."""
    entries = {
        number: (str(run), index)
        for run, (numbers, _) in enumerate(layer_runs(stack.cfg.layers))
        for index, number in enumerate(numbers)
    }
    found, shared = list[BlockValues](), {}
    for number in sorted(entries):
        run, index = entries[number]
        graph, state = nnx.split(stack.layers[run])
        block = nnx.merge(graph, jax.tree.map(lambda leaf, index=index: leaf[index], state))
        deepstack, layer_input = embeds.of_layer(number)
        keys = (KEYS,) if number in stack.cfg.producers else ()
        after, _, values = block(x, ctx._replace(shared=shared, layer_input=layer_input), None, (*names, *keys))
        if keys:
            shared = {**shared, number: values[KEYS]}
        after = after if deepstack is None else after + deepstack
        found.append(BlockValues(x, after, {name: values[name] for name in names}, block))
        x = after
    return found


def decoder_values(params: Any, cfg: Any, ids: Any, names: tuple[str, ...] = (), **inputs: Any) -> list[BlockValues]:
    """Return the values of a decoder's blocks; `inputs`: arguments of `encode`."""
    module = to_nnx(Model(params, cfg))
    x, embeds = module.embed(ids, inputs.get("media"))
    mask = inputs.get("attention_mask")
    context = module.text.context(jax.numpy.ones_like(ids) if mask is None else mask, inputs.get("position_ids"))
    found = values_of_blocks(module.text, x, context, names, embeds)
    return [*found[:-1], found[-1]._replace(after=module.text.final_norm(found[-1].after))]


def tower_values(tower: Any, images: Any, names: tuple[str, ...] = ()) -> list[BlockValues]:
    """Return the values of a vision tower's blocks."""
    x = tower.embed(images)
    return values_of_blocks(tower, x, tower.context_of(x, images._asdict()), names)
