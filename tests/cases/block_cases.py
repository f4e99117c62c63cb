"""Values inside the blocks of a model, computed block by block in Python: neither by a scan nor by a stream.

And what reconstruction should do to a weight of a block, from these values by normal equations in float64.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmprune_jax.core.layer import layer_runs
from vlmprune_jax.core.models.context import KEYS, Context, LayerEmbeds
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.params import unstack_layers
from vlmprune_jax.core.models.stack import BlockStack
from vlmprune_jax.core.models.vlm import Model, to_nnx


def packed(values: Any, grid: Any = None) -> Packed:
    """Return tiles [tiles, channel, height, width] as one packed row; other values are in packed rows already."""
    values = jnp.asarray(values)
    return Packed(values[None] if grid is None and values.ndim == 4 else values, grid)


class BlockValues(NamedTuple):
    """Residual stream before and after a block, and the requested `context.VALUES`.

    In a decoder, `after` the last block is after the final norm.
    """

    before: Any
    after: Any
    inputs: dict[str, Any]


def blocks_of(stack: BlockStack) -> dict[int, Any]:
    """Return {layer: block} of a stack, in order."""
    found = {}
    for run, (numbers, _) in enumerate(layer_runs(stack.cfg.layers)):
        graph, state = nnx.split(stack.layers[str(run)])
        for index, number in enumerate(numbers):
            found[number] = nnx.merge(graph, jax.tree.map(lambda leaf, index=index: leaf[index], state))
    return dict(sorted(found.items()))


def values_of_blocks(
    stack: BlockStack, x: Any, ctx: Context, names: tuple[str, ...] = (), embeds: LayerEmbeds = LayerEmbeds()
) -> list[BlockValues]:
    """Run a stack on hidden states float[batch, seq, embed]; return the values of every block."""
    found, shared = list[BlockValues](), {}
    for number, block in blocks_of(stack).items():
        deepstack, layer_input = embeds.of_layer(number)
        keys = (KEYS,) if number in stack.cfg.producers else ()
        after, _, values = block(x, ctx._replace(shared=shared, layer_input=layer_input), None, (*names, *keys))
        if keys:
            shared = {**shared, number: values[KEYS]}
        after = after if deepstack is None else after + deepstack
        found.append(BlockValues(x, after, {name: values[name] for name in names}))
        x = after
    return found


@functools.partial(jax.jit, static_argnames=("cfg", "names"))
def decoder_values(params: Any, cfg: Any, ids: Any, names: tuple[str, ...] = (), **inputs: Any) -> list[BlockValues]:
    """Return the values of a decoder's blocks; `inputs`: arguments of `encode`."""
    module = to_nnx(Model(params, cfg))
    x, embeds = module.embed(ids, inputs.get("media"))
    mask = inputs.get("attention_mask")
    context = module.text.context(jnp.ones_like(ids) if mask is None else mask, inputs.get("position_ids"))
    found = values_of_blocks(module.text, x, context, names, embeds)
    return [*found[:-1], found[-1]._replace(after=module.text.final_norm(found[-1].after))]


@functools.partial(jax.jit, static_argnames=("cfg", "names"))
def tower_values(params: Any, cfg: Any, images: Any, names: tuple[str, ...] = ()) -> list[BlockValues]:
    """Return the values of a vision tower's blocks."""
    tower = to_nnx(Model(params, cfg)).vision
    x = tower.embed(images)
    return values_of_blocks(tower, x, tower.context_of(x, images._asdict()), names)


def real_values(one: Model, *batches: dict[str, Any], names: tuple[str, ...]) -> list[dict[str, np.ndarray]]:
    """Per layer "before", "after" and these values of all real tokens of the batches, float64[tokens, inputs].

    A batch of `images` is of the tower, and has all their positions.
    """
    found: list[list[dict[str, np.ndarray]]] = []
    for batch in batches:
        if "images" in batch:
            blocks = tower_values(one.params, one.cfg, packed(batch["images"]), names)
            real = np.ones(blocks[0].before.shape[:2], bool)
        else:
            media = {"vision": packed(batch["pixel_values"])} if "pixel_values" in batch else {}
            arrays = {"attention_mask": batch["attention_mask"], "media": media}
            blocks, real = (
                decoder_values(one.params, one.cfg, batch["input_ids"], names, **arrays),
                arrays["attention_mask"] == 1,
            )
        hooked = [{"before": block.before, "after": block.after, **block.inputs} for block in blocks]
        flat = [{name: np.asarray(x, np.float64)[real] for name, x in layer.items()} for layer in hooked]
        found.append([{name: x.reshape(len(x), -1) for name, x in layer.items()} for layer in flat])
    return [
        {name: np.concatenate([of[name] for of in layer]) for name in layer[0]} for layer in zip(*found, strict=True)
    ]


def solved_change(inputs: Any, residual: Any, target: Any, ridge: float, rate: Any = 1.0) -> np.ndarray:
    """Change of a weight and its bias, float64[inputs + 1, outputs], that fits the residual of a stream best.

    Errors count relative to the mean square of the target's token; `rate` scales what the weight adds.
    """
    x = rate * np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    weighted = x / np.mean(target**2, axis=1, keepdims=True)
    gram = weighted.T @ x
    return np.linalg.lstsq(gram + ridge * np.diag(np.diag(gram)), weighted.T @ residual, rcond=None)[0]


def assert_changed_by(
    change: np.ndarray,
    layer: int,
    path: str,
    pruned: Model,
    solved: Model,
    tolerance: float = 1e-4,
    stack: str = "text",
) -> None:
    """Weight and bias of a projection changed by `change`, and nothing else in that layer."""
    before, after = (unstack_layers(one.params, one.cfg, stack)[0][layer] for one in (pruned, solved))
    weight, bias = (
        np.asarray(after[f"{path}/{part}"]) - np.asarray(before[f"{path}/{part}"]) for part in ("weight", "bias")
    )
    atol = tolerance * np.abs(change).max()
    np.testing.assert_allclose(weight.reshape(len(bias), -1).T, change[:-1], atol=atol, rtol=0)
    np.testing.assert_allclose(bias, change[-1], atol=atol, rtol=0)
    others = {name for name in before if not np.array_equal(before[name], after[name])}
    assert others == {f"{path}/weight", f"{path}/bias"}
