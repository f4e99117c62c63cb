"""Widths by the name of a target: whole blocks of what the projections read, on every device."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from prune_cases import config, depth_scores, llava_7b, width_scores

from vlmprune_jax.core.config import LayerShape
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.prune import make_plan
from vlmprune_jax.prune.solver import BLOCKS


@pytest.mark.parametrize(
    ("options", "heads", "neurons"),
    [
        ({"snap_for": "tpu"}, 1, 128),
        ({"snap_for": "int4", "tensor_parallel": 2}, 2, 256),
        ({"snap_for": "gguf"}, 1, 32),
        ({"snap_for": "gguf_k"}, 2, 256),
        ({"tensor_parallel": 4}, 4, 4),
        ({"snap_for": "gguf", "neurons_multiple": 64}, 1, 64),
    ],
)
def test_multiples_of_llava_7b(options, heads, neurons):
    cfg = llava_7b()
    scores = width_scores(cfg)
    plan = make_plan(scores, cfg, method="width", ratio=0.2, **options)
    by_hand = make_plan(scores, cfg, method="width", ratio=0.2, heads_multiple=heads, neurons_multiple=neurons)
    assert plan.stacks == by_hand.stacks
    assert (plan.options["heads_multiple"], plan.options["neurons_multiple"]) == (heads, neurons)
    assert plan.options["snap_for"] == options.get("snap_for")


@given(
    kv=st.integers(1, 12),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 32, 64, 96]),
    gqa=st.sampled_from(["groups", "q_heads"]),
    target=st.sampled_from([None, *BLOCKS]),
    devices=st.sampled_from([1, 2, 3]),
    ratio=st.floats(0.05, 0.6),
)
@settings(max_examples=40, deadline=None)
def test_every_device_has_whole_blocks(kv, group, head_dim, gqa, target, devices, ratio):
    cfg = config((LayerShape(kv * group, kv, 1600),) * 2, head_dim=head_dim, rotary_dim=head_dim)
    try:
        plan = make_plan(
            width_scores(cfg, gqa=gqa), cfg, method="width", ratio=ratio, snap_for=target, tensor_parallel=devices
        )
    except UserError:  # too few heads for one block, or more than can go
        assume(False)
    block = BLOCKS.get(target, 1)
    for layer in plan.layers:
        shape = layer.shape
        for channels in (shape.q_heads * head_dim, shape.mlp):
            assert channels % devices == 0
            assert channels // devices % block == 0
        assert shape.q_heads % devices == shape.kv_heads % devices == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snap_for": "tpus"}, "snap_for 'tpus' is not one of tpu, gguf, gguf_k, int4; did you mean 'tpu'"),
        ({"tensor_parallel": 0}, "tensor_parallel=0 must be at least 1"),
        (
            {"snap_for": "tpu", "neurons_multiple": 100},
            "neurons_multiple=100 is not a multiple of 128, as snap_for='tpu' needs: leave it out",
        ),
        (
            {"snap_for": "tpu"},
            r"snap_for='tpu': heads_multiple=4 is more than the 2 heads of layer 0: keep them \(heads='keep'\)",
        ),
        (
            {"snap_for": "int4", "tensor_parallel": 16, "heads": "keep"},
            "snap_for='int4' with tensor_parallel=16: neurons_multiple=2048 is more than the 1024 neurons of layer 0",
        ),
        ({"tensor_parallel": 4, "heads": "keep"}, "layer 0 keeps 2 key/value heads, which tensor_parallel=4 does not"),
        ({"snap_for": "gguf", "selection": "global"}, 'selection="global" .* no multiples'),
        (
            {"snap_for": "tpu", "method": "depth"},
            "prune.snap_for: method 'depth' has no such setting, only width and hybrid",
        ),
    ],
)
def test_targets_that_do_not_suit_are_refused(options, message):
    cfg = config((LayerShape(4, 2, 1024),) * 3, head_dim=16, rotary_dim=16)
    options = {"method": "width", "ratio": 0.1, **options}
    scores = width_scores(cfg) if options["method"] == "width" else depth_scores(cfg, [0.0, 1, 2])
    with pytest.raises(UserError, match=message):
        make_plan(scores, cfg, **options)


def test_heads_that_are_kept_need_not_fill_blocks():
    cfg = config((LayerShape(4, 2, 1024),) * 3, head_dim=16, rotary_dim=16)
    plan = make_plan(width_scores(cfg), cfg, method="width", ratio=0.3, snap_for="tpu", heads="keep")
    assert {(layer.shape.q_heads, layer.shape.mlp % 128) for layer in plan.layers} == {(4, 0)}
    budget = {"parameters": plan.parameters_before * 0.7}
    within = make_plan(width_scores(cfg), cfg, method="width", budget=budget, snap_for="tpu", heads="keep")
    assert within.layers[0].shape.mlp % 128 == 0
    assert within.parameters_after <= budget["parameters"]
