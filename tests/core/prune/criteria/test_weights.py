"""`activation` and `fluctuation` against sums in float64 over real tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import decoder_values
from media_cases import packed
from prune_cases import UNEQUAL, batch, config, model, on_mesh

from vlmprune_jax.core.models.params import unstack_layers
from vlmprune_jax.core.prune import score
from vlmprune_jax.io.exports.pruning import make_plan

SHAPES = {"sequential": {}, "parallel": {"parallel": True, "norm": "layer", "gated": False}}


def expected(one, arrays, image_weight, criterion):
    """(heads, neurons) per layer."""
    ids, mask = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["attention_mask"])
    media = {"vision": packed(arrays["pixel_values"])} if "pixel_values" in arrays else {}
    params, names = jax.tree.map(jnp.asarray, one.params), ("o_proj", "down_proj")
    blocks = decoder_values(params, one.cfg, ids, names, media=media, attention_mask=mask)
    weight = np.where(np.asarray(ids) == one.cfg.image_token_id, image_weight, 1.0) * np.asarray(mask)
    layers, _ = unstack_layers(one.params, one.cfg)
    for block, layer, shape in zip(blocks, layers, one.cfg.text.layers, strict=True):
        found = []
        for name, other in (("o_proj", "dense"), ("down_proj", "fc2")):
            (path,) = (path for path in layer if path.endswith((f"{name}/weight", f"{other}/weight")))
            x = np.asarray(block.inputs[name], np.float64).reshape(*weight.shape, -1)[weight > 0]
            share = weight[weight > 0][:, None] / weight.sum()
            norm = np.linalg.norm(np.asarray(layer[path], np.float64).reshape(len(layer[path]), -1), axis=0)
            mean, squares = (share * x).sum(0), (share * x * x).sum(0)
            if criterion == "activation":
                found.append(np.sqrt(squares) * norm)
            else:
                found.append((share * (x - mean) ** 2).sum(0) * norm**2)
        yield found[0].reshape(shape.mixer.kv_heads, -1).sum(1), found[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("criterion", ["activation", "fluctuation"])
def test_scores_equal_sums_in_float64(criterion, shape):
    one = model(config(UNEQUAL, vision=shape == "sequential", **SHAPES[shape]))
    arrays = batch(one.cfg)
    found = score(one, [arrays], criterion=criterion, image_weight=0.1)
    for i, (heads, neurons) in enumerate(expected(one, arrays, 0.1, criterion)):
        np.testing.assert_allclose(found.along("kv_heads")[i], heads, rtol=2e-4)
        np.testing.assert_allclose(found.along("mlp")[i], neurons, rtol=2e-4, atol=1e-6 * neurons.max())
    make_plan(found, one.cfg, method="width", ratio=0.1, heads="auto")


@pytest.mark.slow
def test_batches_add_up_on_a_mesh():
    one = model(config())
    whole = batch(one.cfg, rows=8)
    parts = [{name: array[at : at + 4] for name, array in whole.items()} for at in (0, 4)]
    first = score(one, [whole], criterion="activation")
    second = score(on_mesh(one, 4, 2, 1), parts, criterion="activation")
    for a, b in zip(
        (*first.along("kv_heads"), *first.along("mlp")), (*second.along("kv_heads"), *second.along("mlp")), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5)
