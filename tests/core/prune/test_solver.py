"""From a ratio to widths: the reference's tables, costs, and whole blocks of what the projections read."""

import dataclasses

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from prune_cases import REFERENCE_TOTAL, config, llava_7b, width_scores
from refusal import refused
from stack_cases import decoder_layer

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.flops import Polynomial, layer_costs
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune.solver import BLOCKS, AxisUnits, Units, smallest_sparsity, widths_at
from vlmprune_jax.io.exports.pruning import make_plan
from vlmprune_jax.io.families import PHI as PHI_FAMILY

# heads, neurons, parameters per head and per neuron, head_dim, total: algorithms 1.6 (three architectures)
ARCHITECTURES = {
    "llava": (32, 11008, 2_097_152, 12_288, 128, REFERENCE_TOTAL),
    "bunny": (32, 10240, 819_440, 5_121, 80, 3_182_254_624),
    "internvl": (32, 8192, 1_179_648, 9_216, 96, 4_146_855_936),
}
RANGES = {"A": (range(3, 21), range(3, 20)), "B": (range(3, 31), range(4, 30)), "C": (range(4, 30), range(4, 30))}


def reference_units(name, ranges):
    heads, neurons, per_head, per_neuron, head_dim, total = ARCHITECTURES[name]
    attn, mlp = RANGES[ranges]
    layer, cost = decoder_layer(heads, heads, neurons), Polynomial(((("kv_heads",), per_head), (("mlp",), per_neuron)))

    def units(i):
        axes = AxisUnits("kv_heads", heads, 1, head_dim, 1, i in attn), AxisUnits("mlp", neurons, 1, 1, 1, i in mlp)
        return Units(layer, cost, axes)

    return [units(i) for i in range(32)], total


@pytest.mark.parametrize(
    ("name", "s", "heads", "neurons"),
    [
        ("llava", 0.2, 6, 2202), ("llava", 0.3, 9, 3303), ("llava", 0.4, 12, 4404), ("llava", 0.6, 19, 6605),
        ("llava", 0.8, 25, 8807), ("bunny", 0.28, 8, 2868), ("bunny", 0.8, 25, 8193), ("internvl", 0.25, 8, 2048),
        ("internvl", 0.3, 9, 2458),
    ],
)  # fmt: skip
def test_sparsity_truncates_as_the_reference(name, s, heads, neurons):
    units, _ = reference_units(name, "C")
    widths, whole = widths_at(units, s), units[5].whole
    assert {axis: whole[axis] - kept for axis, kept in widths.counts[units[5]].items()} == {
        "kv_heads": heads,
        "mlp": neurons,
    }
    assert widths.counts[units[2]] == whole


@pytest.mark.parametrize(
    ("ranges", "name", "percents"),
    [
        ("A", "llava", (9.72, 12.42, 14.58, 19.44, 29.69, 39.41)),
        ("A", "bunny", (8.38, 10.71, 12.58, 16.77, 25.61, 34.00)),
        ("A", "internvl", (9.26, 11.83, 13.89, 18.53, 28.30, 37.56)),
        ("B", "llava", (14.95, 19.10, 22.42, 29.90, 45.67, 60.62)),
        ("B", "bunny", (12.89, 16.48, 19.34, 25.79, 39.41, 52.30)),
        ("B", "internvl", (14.25, 18.21, 21.37, 28.49, 43.54, 57.78)),
        ("C", "llava", (14.59, 18.62, 21.89, 29.19, 44.55, 59.14)),
        ("C", "bunny", (12.59, 16.07, 18.88, 25.17, 38.43, 51.02)),
        ("C", "internvl", (13.91, 17.75, 20.86, 27.81, 42.46, 56.36)),
    ],
)
def test_sparsity_to_total_ratio_table(ranges, name, percents):
    units, total = reference_units(name, ranges)
    reached = [100 * widths_at(units, s).removed / total for s in (0.2, 0.25, 0.3, 0.4, 0.6, 0.8)]
    assert [round(r, 2) for r in reached] == list(percents)


@pytest.mark.parametrize(
    ("name", "ranges", "target", "s", "heads", "neurons"),
    [
        ("llava", "A", 0.15, 0.3123, 10, 3438),
        ("llava", "B", 0.15, 0.2011, 6, 2214),
        ("llava", "C", 0.15, 0.2083, 6, 2293),
        ("bunny", "A", 0.15, 0.3535, 11, 3620),
        ("bunny", "C", 0.30, 0.4684, 15, 4797),
        ("llava", "A", 0.30, 0.6095, 19, 6710),
        ("llava", "B", 0.60, 0.7876, 25, 8670),
        ("bunny", "B", 0.60, 0.9124, 29, 9343),
        ("internvl", "C", 0.45, 0.6381, 20, 5228),
        ("internvl", "B", 0.60, 0.8300, 26, 6800),
    ],
)
def test_smallest_sparsity_table(name, ranges, target, s, heads, neurons):
    units, total = reference_units(name, ranges)
    widths, whole = smallest_sparsity(units, target * total), units[0].whole
    gone = {axis: whole[axis] - kept for axis, kept in widths.counts[units[10]].items()}
    assert (widths.sparsity, gone) == (s, {"kv_heads": heads, "mlp": neurons})


def test_costs_and_sparsity_from_the_config():
    """Parameters of a head, a neuron and a block of LLaVA-1.5-7B and Phi-2 (algorithms.md, 1.6)."""
    cfg = llava_7b()
    sizes = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "vocab_size": 51200}
    phi = PHI_FAMILY.from_hf({"model_type": "phi", **sizes, "num_attention_heads": 32}, None)
    for one, expected in ((cfg, (2_097_152, 12_288, 202_383_360)), (phi, (819_440, 5_121, 78_671_360))):
        costs, layer = layer_costs(one), one.text.layers[0]
        assert (costs.price(layer, "kv_heads"), costs.price(layer, "mlp"), costs.of(layer)) == expected
    options = {"attn_layers": (3, 31), "mlp_layers": (4, 30)}
    plan = make_plan(width_scores(cfg), cfg, method="width", sparsity=0.4, **options)
    assert round(100 * dataclasses.replace(plan, parameters_total=REFERENCE_TOTAL).actual_ratio, 2) == 29.90
    assert plan.layers[10].sizes == {"kv_heads": 20, "q_heads": 20, "mlp": 11008 - 4404}
    assert plan.layers[2].sizes == cfg.text.layers[2].sizes
    assert plan.target_ratio is None
    ranges = {"attn_layers": (3, 21), "mlp_layers": (3, 20)}
    fact = r"ratio 0.6 cannot be reached by width .*attn_layers=\(3, 21\), mlp_layers=\(3, 20\)"
    refused(fact, make_plan, width_scores(cfg), cfg, method="width", ratio=0.6, **ranges)


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.45, 0.6])
def test_llava_7b_ratio_is_reached_to_half_a_neuron_per_layer(ratio):
    cfg = llava_7b()
    plan = make_plan(width_scores(cfg), cfg, method="width", ratio=ratio)
    assert plan.target_ratio == ratio
    assert abs(plan.actual_ratio - ratio) <= 0.5 * 32 * 12_288 / plan.parameters_total
    # equal widths: a stock loader takes the folder
    assert all(layer.sizes == plan.layers[0].sizes for layer in plan.layers)
    assert plan.parameters_after == count_params(plan.apply_to(cfg))
    snapped = make_plan(width_scores(cfg), cfg, method="width", ratio=ratio, heads_multiple=4, neurons_multiple=128)
    assert abs(snapped.actual_ratio - ratio) <= 0.5 * 32 * 12_288 * 128 / plan.parameters_total
    multiples = {"q_heads": 4, "kv_heads": 4, "mlp": 128}
    assert all(layer.sizes[axis] % n == 0 for layer in snapped.layers for axis, n in multiples.items())


@pytest.mark.parametrize(
    ("options", "heads", "neurons"),
    [
        ({"align_to": "tpu"}, 1, 128),
        ({"align_to": "int4", "tensor_parallel": 2}, 2, 256),
        ({"align_to": "gguf"}, 1, 32),
        ({"align_to": "gguf_k"}, 2, 256),
        ({"tensor_parallel": 4}, 4, 4),
        ({"align_to": "gguf", "neurons_multiple": 64}, 1, 64),
    ],
)
def test_multiples_of_llava_7b(options, heads, neurons):
    cfg = llava_7b()
    scores = width_scores(cfg)
    plan = make_plan(scores, cfg, method="width", ratio=0.2, **options)
    by_hand = make_plan(scores, cfg, method="width", ratio=0.2, heads_multiple=heads, neurons_multiple=neurons)
    assert plan.stacks == by_hand.stacks
    assert (plan.options["heads_multiple"], plan.options["neurons_multiple"]) == (heads, neurons)
    assert plan.options["align_to"] == options.get("align_to")


@given(
    kv=st.integers(1, 12),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 32, 64, 96]),
    gqa=st.sampled_from(["groups", "q_heads"]),
    target=st.sampled_from([None, *BLOCKS]),
    devices=st.sampled_from([1, 2, 3]),
    ratio=st.floats(0.05, 0.6),
)
@settings(max_examples=25, deadline=None)
def test_every_device_has_whole_blocks(kv, group, head_dim, gqa, target, devices, ratio):
    cfg = config((decoder_layer(kv * group, kv, 1600),) * 2, head_dim=head_dim)
    try:
        plan = make_plan(
            width_scores(cfg, gqa=gqa), cfg, method="width", ratio=ratio, align_to=target, tensor_parallel=devices
        )
    except UserError:  # too few heads for one block, or more than can go
        assume(False)
    block = BLOCKS.get(target, 1)
    for layer in plan.layers:
        sizes = layer.sizes
        for channels in (sizes["q_heads"] * head_dim, sizes["mlp"]):
            assert channels % devices == 0
            assert channels // devices % block == 0
        assert sizes["q_heads"] % devices == sizes["kv_heads"] % devices == 0


def test_every_device_has_whole_groups_and_kept_heads_need_not_fill_blocks():
    cfg = config((decoder_layer(8, 4, 64),) * 2)
    plan = make_plan(width_scores(cfg), cfg, method="width", ratio=0.2, tensor_parallel=2)
    assert plan.options["heads_multiple"] == 2
    cfg = config((decoder_layer(4, 2, 1024),) * 3, head_dim=16)
    refused(
        "align_to='tpu': heads_multiple=4 is more than the 2 key/value heads of layer 0",
        make_plan,
        width_scores(cfg),
        cfg,
        method="width",
        ratio=0.3,
        align_to="tpu",
    )
    plan = make_plan(width_scores(cfg), cfg, method="width", ratio=0.3, align_to="tpu", heads="keep")
    assert {(layer.sizes["q_heads"], layer.sizes["mlp"] % 128) for layer in plan.layers} == {(4, 0)}
    budget = {"parameters": plan.parameters_before * 0.7}
    within = make_plan(width_scores(cfg), cfg, method="width", budget=budget, align_to="tpu", heads="keep")
    assert within.layers[0].sizes["mlp"] % 128 == 0
    assert within.parameters_after <= budget["parameters"]
