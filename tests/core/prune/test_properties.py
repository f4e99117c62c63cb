"""What holds of every plan and every criterion: more is asked, no more stays; plans compose; rows have no order."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_cases import EQUAL, batch, config, depth_scores, hand_plan, kept_units, model, width_scores
from stack_cases import decoder_layer

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.prune import compose, keep_everything, score
from vlmprune_jax.io.exports.pruning import make_plan

shapes = st.builds(lambda kv, group, mlp: decoder_layer(kv * group, kv, mlp), *map(st.integers, (1, 1, 2), (4, 2, 30)))


def plans_at(ratios, scores, cfg, **options):
    """Plans at ascending ratios, as far as there are any."""
    found = []
    for ratio in ratios:
        try:
            found.append(make_plan(scores, cfg, ratio=float(ratio), **options))
        except UserError:
            break
    return found


def units(plan, kind):
    return {(layer.index, unit) for layer in plan.layers for unit in layer.kept[kind]}


@given(
    layers=st.lists(shapes, min_size=1, max_size=4), gqa=st.sampled_from(["groups", "q_heads"]), seed=st.integers(0, 9)
)
@settings(max_examples=15, deadline=None)
def test_of_more_that_is_asked_for_no_more_stays(layers, gqa, seed):
    cfg = config(tuple(layers))
    wide, ratios = width_scores(cfg, seed, gqa), np.arange(0, 1, 0.04)
    order = np.random.default_rng(seed).permutation(len(layers)).astype(float)
    depth = plans_at(ratios, depth_scores(cfg, list(order)), cfg, method="depth")
    kept = plans_at(ratios, wide, cfg, method="width", heads="keep")
    both = plans_at(ratios, wide, cfg, method="width")
    sparse = [make_plan(wide, cfg, method="width", sparsity=s) for s in (0, 0.1, 0.25)] if len(both) > 5 else []
    for family in (depth, kept, both, sparse):
        for less, more in itertools.pairwise(family):
            assert more.parameters_after <= less.parameters_after
            # a head more that goes lets neurons stay: with as many heads neurons are the same or fewer
            heads = [[layer.sizes["q_heads"] for layer in plan.layers] for plan in (less, more)]
            if family is not both or heads[0] == heads[1]:
                assert units(more, "q_heads") <= units(less, "q_heads")
                assert units(more, "mlp") <= units(less, "mlp")


@st.composite
def successive(draw):
    """Three plans by hand, each for what the one before leaves."""
    cfg, plans = config(tuple(draw(st.lists(shapes, min_size=2, max_size=4)))), []
    for step in range(3):
        layers = cfg.text.layers
        alive = sorted(draw(st.sets(st.sampled_from(range(len(layers))), min_size=1)))
        kept = []
        for i in alive:
            shape = layers[i]
            kv = sorted(draw(st.sets(st.sampled_from(range(shape.mixer.kv_heads)), min_size=1)))
            group = shape.mixer.q_heads // shape.mixer.kv_heads
            neurons = sorted(draw(st.sets(st.sampled_from(range(shape.channel.mlp)), min_size=1)))
            q = [head * group + r for head in kv for r in range(group)]
            kept.append(kept_units(i, tuple(q), tuple(kv), tuple(neurons)))
        plans.append(hand_plan(cfg, f"f{step}", "hybrid", f"c{step}", text=kept))
        cfg = plans[-1].apply_to(cfg)
    return plans


def essence(plan):
    """A plan without the record of how it came about."""
    return dataclasses.replace(plan, options={}, criterion="")


@given(plans=successive())
@settings(max_examples=40, deadline=None)
def test_composition_is_associative_and_keeping_everything_its_identity(plans):
    a, b, c = plans
    assert essence(compose(compose(a, b), c)) == essence(compose(a, compose(b, c)))
    before, after = (
        keep_everything(config(tuple(decoder_layer(**axes) for axes in sizes)), a.fingerprint, parameters)
        for sizes, parameters in (
            (a.stacks["text"].sizes_before, a.parameters_before),
            (a.stacks["text"].sizes, a.parameters_after),
        )
    )
    assert essence(compose(before, a)) == essence(compose(a, after)) == essence(a)


@pytest.mark.parametrize("criterion", ["block_influence", "angular", "activation", "fluctuation"])
@given(data=st.data())
@settings(max_examples=3, deadline=None, derandomize=True)
def test_calibration_rows_have_no_order(criterion, data):
    cfg = config(EQUAL)
    one, rows = model(cfg), batch(cfg, rows=8)
    order = np.array(data.draw(st.permutations(range(8))))
    options = {"layers_removed": 2} if criterion == "angular" else {}
    found = []
    for rows_of in (np.arange(8), order):
        batches = [{name: array[rows_of[at : at + 4]] for name, array in rows.items()} for at in (0, 4)]
        scores = score(one, batches, criterion=criterion, **options)
        found.append([*scores.values.values()])
    assert found[0]
    for there, back in zip(*found, strict=True):
        np.testing.assert_allclose(back, there, atol=1e-5 * np.abs(there[np.isfinite(there)]).max(), rtol=0)
