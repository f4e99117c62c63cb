"""The public API: every documented name can be imported."""

import jax
import jax.numpy as jnp
import numpy as np
from prune_cases import EQUAL, UNEQUAL, batch, config, depth_scores, model, width_scores

import vlmprune_jax as vp


def test_every_public_name_loads():
    assert all(getattr(vp, name) is not None for name in vp.__all__)
    assert vp._HOMES.keys() <= {*vp.__all__}


def test_a_model_is_taken_where_its_config_is():
    cfg = config(EQUAL, vision=True)
    one, scores, ids = model(cfg), depth_scores(cfg, [3.0, 1.0, 2.0, 5.0, 4.0]), [[1, cfg.image_token_id, 5]]
    assert vp.count_params(one) == vp.count_params(cfg)
    assert vp.make_plan(scores, one, method="depth", ratio=0.1).kept_layers == (0, 2, 3, 4)
    np.testing.assert_array_equal(vp.expand_images(ids, one)["input_ids"], vp.expand_images(ids, cfg)["input_ids"])


def test_what_a_notebook_shows_is_short():
    cfg = config(UNEQUAL, vision=True)
    widths = width_scores(cfg)
    plan = vp.make_plan(widths, cfg, method="width", ratio=0.1)
    depth = vp.make_plan(depth_scores(cfg, [3.0, 1.0, 2.0, 4.0]), cfg, method="depth", layers_removed=1)
    assert repr(model(cfg)) == (
        "Model(llava, transformers layout, 14,988 parameters, float32\n"
        "  text: hidden size 20, 2 x (4/2 heads, 12 neurons), 1 x (8/2 heads, 10 neurons), 1 x (4 heads, 12 neurons)\n"
        "  vision: hidden size 8, 2 x (2 heads, 10 neurons))"
    )
    many = config(UNEQUAL * 8)
    assert repr(model(many)).endswith("1 x (4 heads, 12 neurons), ... (32 layers))")
    assert repr(depth) == (
        "PrunePlan(depth by block_influence: 14,988 -> 12,676 parameters, 15.43 % removed\n  text: 3 of 4 layers, "
        "without 1; 1 x (4/2 heads, 12 neurons), 1 x (8/2 heads, 10 neurons), 1 x (4 heads, 12 neurons))"
    )
    assert repr(plan) == (
        "PrunePlan(width by l1: 14,988 -> 13,498 parameters, 9.94 % removed\n"
        "  text: 4 of 4 layers; 2 x (4/2 heads, 8 neurons), 1 x (8/2 heads, 6 neurons), 1 x (3 heads, 8 neurons))"
    )
    assert repr(widths) == (
        f"Scores(l1, text: importance of 10 head groups and 46 neurons of 4 layers; model {widths.fingerprint})"
    )


def test_forward_gives_what_its_docstring_says():
    cfg = config(EQUAL, vision=True)
    arrays = batch(cfg)
    del arrays["labels"]
    for dtype in (np.float32, jnp.bfloat16):
        one = model(cfg).replace(params=jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), model(cfg).params))
        logits, aux = vp.forward(one, **arrays, want=("hidden", "image_features", "inputs_embeds"))
        assert (logits.shape, logits.dtype) == ((4, 9, 62), dtype)
        assert [x.shape for x in aux.pop("hidden")] == [(4, 9, 20)] * 6
        assert {name: x.shape for name, x in aux.items()} == {"image_features": (4, 4, 20), "inputs_embeds": (4, 9, 20)}
    assert vp.forward(one, arrays["input_ids"][-1:])[1] == {}
