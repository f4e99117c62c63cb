"""Budgets: what they count, that they are kept to, and refusals; widths for a ratio: the reference's tables, blocks."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from prune_cases import EQUAL, REFERENCE_TOTAL, config, depth_scores, llava_7b, model, width_scores
from refusal import refused
from report_cases import BENCH
from stack_cases import changed, decoder_layer

from vlmprune_jax.base.budget import LIMITS, Budget
from vlmprune_jax.base.chips import CHIPS
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.models.flops import Polynomial, forward_flops, layer_costs, vision_flops
from vlmprune_jax.core.models.params import count_params, param_shapes
from vlmprune_jax.core.prune import PrunePlan, score
from vlmprune_jax.core.prune.config import PlanConfig
from vlmprune_jax.core.prune.cost import make_measure, speed_limits
from vlmprune_jax.core.prune.solver import BLOCKS, AxisUnits, Units, smallest_sparsity, widths_at
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.exports.pruning import make_plan, prune_iteratively, with_export
from vlmprune_jax.io.exports.weights import padded_stacks
from vlmprune_jax.io.families import PHI as PHI_FAMILY
from vlmprune_jax.run.experiment.arguments import plan_config
from vlmprune_jax.run.experiment.spec import ExportSpec, ModelSpec
from vlmprune_jax.run.workdir.artefact import write_artefact

shapes = st.builds(
    lambda kv, group, mlp, window: decoder_layer(kv * group, kv, mlp, window),
    *map(st.integers, (1, 1, 2), (4, 3, 30)), st.sampled_from([None, 5]),
)  # fmt: skip
ALL = dict.fromkeys(LIMITS, 1.0) | {"curve": ((0.5, 2.0), (10**12, 4.0))}


@given(
    before=st.lists(shapes, min_size=1, max_size=3),
    after=st.lists(shapes, min_size=1, max_size=3),
    options=st.fixed_dictionaries(
        {"vision": st.booleans(), "tie_embeddings": st.booleans(), "qkv_bias": st.booleans()}
    ),
    work=st.fixed_dictionaries(
        {"context": st.integers(8, 40), "batch": st.integers(1, 3), "images": st.integers(0, 2)}
    ),
)
@settings(max_examples=15, deadline=None)
def test_costs_are_those_of_the_config(before, after, options, work):
    cfg = config(tuple(before), **options)
    windows = itertools.cycle(layer.mixer.window for layer in before)  # pruning makes no other kinds of layers
    after = [changed(layer, options) for layer in after]
    after = [Layer(dataclasses.replace(layer.mixer, window=next(windows)), layer.channel) for layer in after]
    now = cfg.with_layers(after)
    found = make_measure(cfg, Budget(**ALL, **work, slice="v6e:2x2", dtype="float32"))(now)
    text, images = now.text, work["images"] if options["vision"] else 0
    kept = [(s.mixer.kv_heads, s.mixer.q_heads, min(s.mixer.window or work["context"], work["context"])) for s in after]
    cache = work["batch"] * sum(2 * kv * text.attention.head_dim * tokens for kv, _, tokens in kept)
    assert found["parameters"] == count_params(now)
    assert found["disk_bytes"] == 4 * count_params(now)
    assert found["memory_bytes"] == 4 * (count_params(now) + cache)
    assert found["flops"] == forward_flops(now, length=work["context"], images=images)
    # one token of a row: all matrices once, and what it attends to
    token = forward_flops(now, length=1, images=0) + sum(
        4 * q * text.attention.head_dim * (tokens - 1) for _, q, tokens in kept
    )
    head = text.vocab_size * text.hidden_size
    layers = sum(int(np.prod(shape)) for path, shape in param_shapes(now).items() if "text/layers" in path)
    chip = CHIPS["v6e"]
    seconds = max(work["batch"] * token / 4 / chip.flops, 4 * (layers + head + cache) / 4 / chip.hbm_bandwidth)
    assert found["step_ms"] == pytest.approx(1000 * seconds, rel=1e-12)
    wide = make_measure(cfg, with_export(Budget(disk_bytes=1, dtype="float32", uneven="pad", other_bytes=-9)))(now)
    assert wide == {"disk_bytes": 4 * count_params(padded_stacks(now)) - 9}


def test_a_speedup_is_limited_by_the_component_that_shrank_most():
    """6 of 10 layers, half of the tower, a smaller vocabulary: 10 / 6 of the decoder's time, whatever its share."""
    whole = config((decoder_layer(4, 4, 12),) * 10, vision=True)
    fewer = whole.with_layers(whole.text.layers[:6])
    row = {"length": 32, "images": 1, "batch": 1}
    assert speed_limits(whole, fewer, **row) == pytest.approx((10 / 6, 10 / 6))
    assert forward_flops(whole, length=32, images=1) / forward_flops(fewer, length=32, images=1) < 1.65
    blind = whole.with_layers(whole.vision.layers[:1], "vision")
    prefill, decode = speed_limits(whole, blind, **row)
    assert (1 < prefill < 2, decode) == (True, 1.0)
    assert speed_limits(whole, blind, **row | {"images": 0}) == (1.0, 1.0)
    words = dataclasses.replace(whole, text=dataclasses.replace(whole.text, vocab_size=whole.text.vocab_size // 2))
    assert speed_limits(whole, words, **row) == (2.0, 2.0)


def asked(method, cfg, seed=0):
    """(scores, options) of a way to prune."""
    depth = depth_scores(cfg, list(np.random.default_rng(seed).permutation(len(cfg.text.layers)).astype(float)))
    wide = width_scores(cfg, seed)
    proportional = {"method": "width", "heads": "proportional"}
    return {
        "depth": (depth, {"method": "depth"}),
        "width": (wide, proportional),
        "query heads": (width_scores(cfg, seed, "q_heads"), proportional),
        "heads kept": (wide, {"method": "width", "heads": "keep"}),
        "heads traded": (wide, {"method": "width", "heads": "auto"}),
        "multiples": (wide, {**proportional, "neurons_multiple": 2}),
        "global": (wide, {"method": "width", "selection": "global"}),
        "hybrid": ((depth, wide), {"method": "hybrid"}),
    }[method]


LAYERS = ((1, 1, 3), (1, 2, 5), (3, 2, 9))  # ratios of 0.34 to 0.38 are out of hybrid's reach, that of 0.4 is not
METHODS = ("depth", "width", "query heads", "heads kept", "heads traded", "multiples", "global", "hybrid")


@given(
    method=st.sampled_from(METHODS),
    layers=st.lists(shapes, min_size=2, max_size=4),
    name=st.sampled_from(LIMITS),
    share=st.floats(0.2, 1.0),
    seed=st.integers(0, 3),
)
@example("hybrid", [decoder_layer(group * kv, kv, mlp, 5) for kv, group, mlp in LAYERS], "memory_bytes", 0.625, 3)
@settings(max_examples=10, deadline=None)
def test_a_budget_is_kept_to_or_the_nearest_is_told(method, layers, name, share, seed):
    cfg = config(tuple(layers))
    scores, options = asked(method, cfg, seed)
    work = {"context": 30, "dtype": "float32", "curve": [[1, 0.1], [count_params(cfg), 1.0]]}
    whole = make_measure(cfg, Budget(**{name: 1.0}, **work))(cfg)[name]
    limits = {name: share * whole, **work}
    measure = make_measure(cfg, Budget(**limits))
    plan, refused = None, ""
    try:
        plan = make_plan(scores, cfg, budget=limits, **options)
    except UserError as error:
        refused = str(error)
    costs = []
    for ratio in np.arange(0, 1, 0.1):
        try:
            other = make_plan(scores, cfg, ratio=float(ratio), **options)
        except UserError:
            continue
        costs.append((other.actual_ratio, measure(other.apply_to(cfg))[name]))
    if plan is None:
        assert refused.startswith(f"prune.budget.{name}=")
        assert "nearest:" in refused
        assert min(cost for _, cost in costs) > limits[name]
        return
    cost = measure(plan.apply_to(cfg))
    assert cost[name] <= limits[name]
    assert plan.options["budget_reached"] == cost
    assert plan.options["budget"] == limits
    assert plan.target_ratio is None
    if method not in ("heads traded", "global", "hybrid"):  # whose costs do not always fall where more is asked for
        # Widths are whole, so a head of one layer may go for neurons of others: costs fall but for that step.
        head = 4 * cfg.text.hidden_size * cfg.text.attention.head_dim / count_params(cfg)
        assert all(spent > limits[name] for reached, spent in costs if reached < plan.actual_ratio - head)


def test_several_limits_and_a_budget_that_holds_already():
    cfg = config(EQUAL)
    scores = width_scores(cfg)
    work = {"context": 30, "batch": 40}
    alone = {}
    for name in ("parameters", "memory_bytes"):
        limit = 0.8 * make_measure(cfg, Budget(**{name: 1.0}, **work))(cfg)[name]
        alone[name] = limit, make_plan(scores, cfg, method="width", budget={name: limit, **work})
    cache = 40 * 30 * sum(2 * layer.mixer.kv_heads * layer.mixer.head_dim for layer in EQUAL)
    assert alone["memory_bytes"][0] == pytest.approx(0.8 * 2 * (count_params(cfg) + cache))
    limit, nearest = alone["parameters"]
    assert limit - nearest.parameters_after < 5 * layer_costs(cfg).price(cfg.text.layers[0], "mlp")
    both = {name: limit for name, (limit, _) in alone.items()}
    plan = make_plan(scores, cfg, method="width", budget={**both, **work})
    assert plan.stacks == max((one for _, one in alone.values()), key=lambda one: one.actual_ratio).stacks
    assert all(plan.options["budget_reached"][name] <= limit for name, limit in both.items())
    assert PrunePlan.from_json(plan.to_json()) == plan
    enough = make_plan(scores, cfg, method="width", budget={"parameters": count_params(cfg)})
    assert enough.actual_ratio == 0
    depth = depth_scores(cfg, [3.0, 1, 2, 5, 4])
    fixed = make_plan((depth, scores), cfg, method="hybrid", budget={**both, **work}, layers_removed=1)
    assert fixed.removed_layers == (1,)


def test_a_budget_in_steps_ends_within_it():
    teacher = model(config(EQUAL))
    limit = 0.8 * count_params(teacher.cfg)
    budget = {"parameters": limit}
    pruned, plan, _ = prune_iteratively(teacher, lambda step: (), steps=3, criterion="l1", budget=budget)
    once = make_plan(score(teacher, (), criterion="l1"), teacher.cfg, method="width", budget={"parameters": limit})
    assert plan.parameters_after == count_params(pruned.cfg) == once.parameters_after <= limit
    assert plan.options["budget_reached"] == {"parameters": plan.parameters_after}
    assert plan.target_ratio is None


@pytest.mark.parametrize("name", ["internvl3", "qwen3_vl", "gemma4"])
def test_images_of_fewer_tokens_cost_less(goldens, name):
    """The row is shorter by what its images lose: of any size, or in whole tiles."""
    _, cfg = read_config(goldens / "families" / name / "ckpt", None)
    typical = cfg.tokens_per_image
    budget = {"flops": 1.0, "step_ms": 1.0, "memory_bytes": 1.0, "context": 900, "images": 2}
    usual = make_measure(cfg, Budget(**budget))(cfg)
    assert make_measure(cfg, Budget(**budget, image_tokens=typical))(cfg) == pytest.approx(usual)
    more = 3 * typical + (1 if name == "internvl3" else 0)  # of a tile there are no parts
    longer = make_measure(cfg, Budget(**budget, image_tokens=more))(cfg)
    length, slots, of_slot = 900 + 4 * typical, *((2, more) if cfg.dynamic_resolution else (6, 0))
    text = forward_flops(cfg, length=length, images=0)
    assert longer["flops"] == text + vision_flops(cfg, (), slots, of_slot)
    plain = make_measure(cfg, Budget(**{**budget, "context": length}))(cfg)
    assert [longer[key] for key in ("step_ms", "memory_bytes")] == [plain[key] for key in ("step_ms", "memory_bytes")]
    assert usual["step_ms"] < longer["step_ms"]
    spec = override(PlanConfig(), {"budget": {"flops": 1.0}})
    data, export = DataSpec(max_image_tokens=70), ExportSpec(max_image_tokens=140)
    assert plan_config(spec, ModelSpec(), data, export).budget.image_tokens == 140  # of the export, if it has its own
    assert plan_config(spec, ModelSpec(), data, ExportSpec()).budget.given["image_tokens"] == 70


def test_speed_by_what_a_bench_measured(tmp_path):
    """Between the sizes that were measured, on a line; below them nothing is known."""
    cfg = config(EQUAL)
    whole, scores = count_params(cfg), width_scores(cfg)
    side = replace(BENCH.sides[0], decode=[60.0, 50.0, 50.0], parameters=whole)
    sides = [
        side,
        replace(side, decode=[100.0] * 3, parameters=whole // 2),
        replace(side, weights="Q4_0", decode=[900.0] * 3),
    ]
    write_artefact(tmp_path / "bench.json", replace(BENCH, sides=sides))
    budget = {"decode_ms": 17.0, "bench": str(tmp_path / "bench.json")}
    limits = plan_config(override(PlanConfig(), {"budget": budget}), ModelSpec(), DataSpec(), ExportSpec()).budget.given
    assert limits["curve"] == [[whole // 2, 10.0], [whole, 20.0]]
    plan = make_plan(scores, cfg, method="width", budget=limits)
    assert plan.parameters_after / whole == pytest.approx(0.85, abs=0.02)
    assert plan.options["budget_reached"]["decode_ms"] <= 17.0
    refused("decode_ms=9.9: .*nearest: 1", make_plan, scores, cfg, method="width", budget={**limits, "decode_ms": 9.9})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": {"parameters": 10}}, r"prune.budget.parameters=10: cannot be reached .*nearest: [\d,]+ param"),
        ({"budget": {"parameter": 9e3}}, r"budget has no setting 'parameter'; did you mean 'parameters'"),
        ({"budget": {}}, "'width' needs exactly one of ratio, sparsity and budget, got none"),
        ({"budget": 9e3}, "budget=9000.0: is a section of settings: set each of its settings by name"),
        ({"budget": {"flops": float("nan")}}, "prune.budget.flops=nan must be above 0"),
        ({"budget": {"parameters": True}}, "budget.parameters=True must be a number or None"),
        ({"budget": {"flops": 9e9, "context": 7}}, "prune.budget.context=7 is less than the 8 image tokens"),
        ({"budget": {"step_ms": 1, "slice": "tpu:2x2"}}, "prune.budget.slice: topology 'tpu:2x2': unknown TPU"),
        ({"budget": {"decode_ms": 1}}, r"decode_ms needs measured decode times: run .vlmprune bench --"),
        ({"budget": {"decode_ms": 1, "curve": [[1]]}}, r"budget.curve\[0\]=\[1\] must be a tuple"),
        ({"budget": {"decode_ms": 1, "curve": [[9, 1], [5, 2]]}}, r"models of 5, 9 parameters, but this model has"),
        ({"budget": {"parameters": 9e3}, "ratio": 0.1}, "'width' needs exactly one of .*, got ratio and budget"),
        ({"budget": {"parameters": 9e3}, "method": "depth", "layers_removed": 1}, "got layers_removed and budget"),
        ({"budget": {"parameters": 9e3}, "method": "hybrid", "ratio": 0.1}, "'hybrid' needs .*, got ratio and budget"),
    ],
)
def test_budgets_that_cannot_be_are_refused(options, message):
    cfg = config(EQUAL, vision=True)
    wide, depth = width_scores(cfg), depth_scores(cfg, [0.0, 1, 2, 3, 4])
    options = {"method": "width", **options}
    if "budget" in options and isinstance(options["budget"], dict) and "flops" in options["budget"]:
        options["budget"]["images"] = 2
    scores = {"width": wide, "depth": depth, "hybrid": (depth, wide)}[options["method"]]
    refused(message, make_plan, scores, cfg, **options)


# From a ratio to widths.

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
    ("name", "ranges", "percents", "target", "s", "heads", "neurons"),
    [
        ("llava", "A", (9.72, 12.42, 14.58, 19.44, 29.69, 39.41), 0.15, 0.3123, 10, 3438),
        ("bunny", "C", (12.59, 16.07, 18.88, 25.17, 38.43, 51.02), 0.30, 0.4684, 15, 4797),
        ("internvl", "B", (14.25, 18.21, 21.37, 28.49, 43.54, 57.78), 0.60, 0.8300, 26, 6800),
    ],
)
def test_ratios_and_smallest_sparsities_of_the_reference(name, ranges, percents, target, s, heads, neurons):
    units, total = reference_units(name, ranges)
    reached = [100 * widths_at(units, s).removed / total for s in (0.2, 0.25, 0.3, 0.4, 0.6, 0.8)]
    assert [round(r, 2) for r in reached] == list(percents)
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


@pytest.mark.parametrize("ratio", [0.3, 0.45])
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


def test_multiples_of_llava_7b():
    cfg = llava_7b()
    scores = width_scores(cfg)
    for options, heads, neurons in (
        ({"align_to": "tpu"}, 1, 128),
        ({"align_to": "int4", "tensor_parallel": 2}, 2, 256),
        ({"align_to": "gguf"}, 1, 32),
        ({"align_to": "gguf_k"}, 2, 256),
        ({"align_to": "gguf", "neurons_multiple": 64}, 1, 64),
    ):
        plan = make_plan(scores, cfg, method="width", ratio=0.2, **options)
        assert plan.options["align_to"] == options["align_to"]
        assert (plan.options["heads_multiple"], plan.options["neurons_multiple"]) == (heads, neurons)
    by_hand = make_plan(scores, cfg, method="width", ratio=0.2, heads_multiple=heads, neurons_multiple=neurons)
    assert plan.stacks == by_hand.stacks


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
    options = {"method": "width", "align_to": "tpu"}
    fact = "align_to='tpu': heads_multiple=4 is more than the 2 key/value heads of layer 0"
    refused(fact, make_plan, width_scores(cfg), cfg, ratio=0.3, **options)
    plan = make_plan(width_scores(cfg), cfg, ratio=0.3, heads="keep", **options)
    assert {(layer.sizes["q_heads"], layer.sizes["mlp"] % 128) for layer in plan.layers} == {(4, 0)}
    budget = {"parameters": plan.parameters_before * 0.7}
    within = make_plan(width_scores(cfg), cfg, budget=budget, heads="keep", **options)
    assert within.layers[0].sizes["mlp"] % 128 == 0
    assert within.parameters_after <= budget["parameters"]
