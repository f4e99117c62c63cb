"""Reconstruction of decoders and towers against normal equations in float64, and what it must never do."""

import dataclasses

import jax
import numpy as np
import pytest
from block_cases import assert_changed_by, real_values, solved_change
from hf_cases import assert_equal, keep_layers, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_cases import EQUAL, UNEQUAL, config, hand_plan, kept_units, missing, model, on_mesh, plan_for, rows, seeing
from refusal import refused
from stack_cases import tower_layer

import vlmprune_jax as vp
from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.core.config import PatchConfig
from vlmprune_jax.core.models.params import count_params, flatten, unflatten, unstack_layers
from vlmprune_jax.core.models.vlm import forward
from vlmprune_jax.core.prune import KeptLayer, apply_plan, fingerprint, keep_everything, layers, stream
from vlmprune_jax.core.prune.batches import row_batches
from vlmprune_jax.core.prune.calibration import calibration_batches
from vlmprune_jax.core.prune.least_squares import RIDGES
from vlmprune_jax.core.prune.reconstruct_config import ReconstructConfig
from vlmprune_jax.core.prune.reconstruction import layers_to_solve, reconstruct
from vlmprune_jax.io.checkpoints.read import open_model

SHAPES = {"sequential": {}, "parallel": {"parallel": True, "norm": "layer", "gated": False}}
NAMES = ["sequential", pytest.param("parallel", marks=pytest.mark.slow)]


def hybrid(teacher):
    """Layer 2 goes whole, the others lose heads, neurons, or nothing."""
    heads, keys = tuple(range(4)), (0, 1)
    return plan_for(teacher, [
        (0, (0, 1), (0,), tuple(range(12))), (1, heads, keys, tuple(range(8))), (3, heads, keys, tuple(range(12))),
        (4, (2, 3), (1,), tuple(range(3, 12))),
    ])  # fmt: skip


def shallow(teacher):
    """Layer 2 goes, the others stay whole."""
    return plan_for(teacher, [KeptLayer.whole(i, teacher.cfg.text.layers[i]) for i in (0, 1, 3, 4)])


@pytest.mark.parametrize("shape", NAMES)
def test_the_layer_before_a_cut_equals_normal_equations_in_float64(shape):
    teacher = model(config(EQUAL, **SHAPES[shape]))
    plan = shallow(teacher)
    pruned, batches = apply_plan(teacher, plan), rows()
    solved, (told,) = reconstruct(pruned, plan, teacher, batches)
    assert (told["layer"], told["module"]) == (1, "down_proj")
    assert told["ridge"] in RIDGES
    dense, ours = (real_values(one, *batches, names=("down_proj",)) for one in (teacher, pruned))
    # of the pruned model, layer 2 is the teacher's layer 3: before it should be what the teacher has there
    target, residual = dense[3]["before"], dense[3]["before"] - ours[2]["before"]
    change = solved_change(ours[1]["down_proj"], residual, target, told["ridge"])
    assert_changed_by(change, 1, "mlp/down_proj" if shape == "sequential" else "mlp/fc2", pruned, solved)


@pytest.mark.parametrize("shape", NAMES)
def test_every_weight_that_lost_something_comes_nearer_to_the_teacher(shape):
    teacher = model(config(EQUAL, **SHAPES[shape]))
    plan = hybrid(teacher)
    pruned, batches = apply_plan(teacher, plan), rows(64)
    unchanged, reports = reconstruct(pruned, plan, teacher, batches, method="none")
    assert (unchanged is pruned, reports) == (True, [])
    solved, report = reconstruct(pruned, plan, teacher, batches)
    assert [(one["layer"], one["module"]) for one in report] == [
        (0, "o_proj"), (1, "down_proj"), (4, "o_proj"), (4, "down_proj")
    ]  # fmt: skip
    assert all(one["error_after"] <= one["error_before"] for one in report)
    assert any(one["ridge"] is not None for one in report)
    new = rows(16, seed=1)
    errors = [sum(missing(one, teacher, batch) for batch in new) for one in (solved, pruned)]
    assert errors[0] < 0.9 * errors[1]


def test_held_out_rows_stay_unseen_without_a_refit():
    """The reported error is of the fit without them; by default the weight is solved again with them."""
    teacher = model(config(EQUAL))
    plan = shallow(teacher)
    pruned, batches = apply_plan(teacher, plan), rows()
    found = {refit: reconstruct(pruned, plan, teacher, batches, refit=refit) for refit in (None, True, False)}
    assert found[None][1] == found[True][1] == found[False][1]
    (told,), (again,) = found[False][1], reconstruct(found[False][0], plan, teacher, batches, refit=False)[1]
    assert again["error_before"] == pytest.approx(told["error_after"], rel=1e-4)
    leaves = {refit: jax.tree.leaves(one.params) for refit, (one, _) in found.items()}
    assert all(map(np.array_equal, leaves[None], leaves[True]))
    assert not all(map(np.array_equal, leaves[None], leaves[False]))


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_removed_is_nothing_changed(shape):
    teacher = model(config(UNEQUAL, **SHAPES[shape]))
    plan = keep_everything(teacher.cfg, fingerprint(teacher), count_params(teacher.cfg))
    solved, report = reconstruct(teacher, plan, teacher, rows(4))
    assert report == []
    assert_equal(solved, teacher)


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True)
@given(order=st.permutations(range(16)), batch=st.sampled_from((2, 5, 16)), garbage=st.integers(0, 60))
def test_order_batches_and_padding_are_immaterial(order, batch, garbage):
    teacher = model(config(EQUAL))
    plan = hybrid(teacher)
    pruned, (given_,) = apply_plan(teacher, plan), rows(batch=16)
    shuffled = {name: array[np.array(order)] for name, array in given_.items()}
    padded = np.where(shuffled["attention_mask"] == 0, garbage, shuffled["input_ids"])
    cut = [
        {"input_ids": padded[at : at + batch], "attention_mask": shuffled["attention_mask"][at : at + batch]}
        for at in range(0, 16, batch)
    ]
    # rows are held out by their content, of which padding is none
    expected, told = reconstruct(pruned, plan, teacher, [given_])
    found, same = reconstruct(pruned, plan, teacher, cut)
    assert [one["ridge"] for one in told] == [one["ridge"] for one in same]
    assert_near(found, expected, 1e-4)


def assert_near(found, expected, tolerance):
    for a, b in zip(*(jax.tree.leaves(one.params) for one in (found, expected)), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


@pytest.mark.slow
def test_a_mesh_gives_the_same():
    teacher = model(config(EQUAL))
    plan, batches = hybrid(teacher), rows(16, batch=8)
    expected, told = reconstruct(apply_plan(teacher, plan), plan, teacher, batches)
    sharded = on_mesh(teacher, 4, 2, 1)
    found, same = reconstruct(apply_plan(sharded, plan), plan, sharded, batches)
    assert [one["ridge"] for one in told] == [one["ridge"] for one in same]
    assert_near(found, expected, 1e-5)


def interrupted(folder, steps, *arguments):
    """The cache of a reconstruction that was interrupted after so many steps, opened again."""

    def stop(done):
        if done == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(*arguments, progress=stop, cache=ArrayCache(folder, {"of": 1}))
    return ArrayCache(folder, {"of": 1})


def test_an_interrupted_pass_continues_to_the_byte(tmp_path):
    teacher = model(config(EQUAL))
    plan, batches = hybrid(teacher), rows()
    pruned = apply_plan(teacher, plan)
    expected, told = reconstruct(pruned, plan, teacher, batches)

    cache = interrupted(tmp_path / "parts", 2, pruned, plan, teacher, batches)
    assert cache.missing(["text/0/o_proj", "text/1/down_proj", "text/3/o_proj"]) == ["text/3/o_proj"]
    found, again = reconstruct(pruned, plan, teacher, batches, cache=cache)
    assert again == told
    assert_equal(found, expected)


def test_streams_in_host_memory_give_the_same_bytes(monkeypatch):
    """As on accelerators, where only a few steps are on the devices; more steps than may be there at a time."""
    teacher = model(config(EQUAL))
    plan, batches = hybrid(teacher), rows(32)
    pruned = apply_plan(teacher, plan)
    expected, told = reconstruct(pruned, plan, teacher, batches)
    moved = _on_hosts(monkeypatch)
    found, again = reconstruct(pruned, plan, teacher, batches)
    assert again == told
    assert moved
    assert_equal(found, expected)


def _on_hosts(monkeypatch):
    """Keep streams in host memory as on full accelerators; return a list with "in" or "out" for each that moves."""
    moved, to_devices = [], layers.to_devices

    def count(x, way, kind):
        moved.extend([way] * (x.ndim == 3 and x.sharding.memory_kind == kind))

    def out(x):
        count(x, "out", "device")
        return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))

    def back(x):
        count(x, "in", "pinned_host")
        return to_devices(x)

    monkeypatch.setattr(stream, "free_memory", lambda: 0)
    monkeypatch.setattr(layers, "to_hosts", out)
    for module in (layers, stream):
        monkeypatch.setattr(module, "to_devices", back)
    return moved


def test_streams_of_both_models_come_back_once_per_layer(monkeypatch):
    """Two programs read either stream: its layer, and the sums."""
    teacher = model(config(EQUAL))
    heads, n_layers = (tuple(range(4)), (0, 1)), 5
    plan = plan_for(teacher, [(layer, *heads, tuple(range(8))) for layer in range(n_layers)])
    batches = rows(8)
    moved = _on_hosts(monkeypatch)
    with monkeypatch.context() as roomy:
        roomy.setattr(stream, "free_memory", lambda: 2**30)
        reconstruct(apply_plan(teacher, plan), plan, teacher, batches)
    assert moved == []
    reconstruct(apply_plan(teacher, plan), plan, teacher, batches)
    checked = list(calibration_batches(batches, teacher.cfg, labels=False))
    n_steps = len(row_batches(checked, vars(ReconstructConfig())))
    embedded, last = 2 * n_steps, n_steps  # nothing reads what the pruned model's last layer adds
    assert moved.count("in") == 4 * n_layers * n_steps - last
    assert moved.count("out") == embedded + 2 * n_layers * n_steps - last


@pytest.mark.parametrize(
    ("family", "kept"), [("qwen3_vl", (0, 1, 3, 4)), ("gemma4", (0, 1, 2, 3, 5, 7, 8))], ids=["qwen3_vl", "gemma4"]
)  # features in the decoder; per-layer inputs
def test_one_layer_of_models_in_files_is_on_the_device(goldens, tmp_path, monkeypatch, family, kept):
    """The weights are those of loaded models, byte by byte; of one model the tower is cut as well."""
    folder = goldens / f"families/{family}/ckpt"
    teacher = vp.load(folder, dtype="bfloat16")
    pruned, plan = keep_layers(teacher, kept)
    if family == "qwen3_vl":
        shapes = [one.sizes for one in teacher.cfg.vision.layers]
        tower = [kept_units(i, range(x["q_heads"]), range(x["kv_heads"]), range(20)) for i, x in enumerate(shapes)]
        plan = hand_plan(teacher.cfg, plan.fingerprint, text=plan.layers, vision=tower)
        pruned = apply_plan(teacher, plan)
    vp.prune_folder(folder, plan, tmp_path / "pruned")
    batches = [
        {**(ids := random_ids(teacher, seed)), "attention_mask": np.ones_like(ids["input_ids"])} for seed in (0, 1)
    ]
    expected, told = reconstruct(pruned, plan, teacher, batches)
    del pruned, teacher
    files = [open_model(one, dtype="bfloat16") for one in (tmp_path / "pruned", folder)]
    leaves = [pair for one in files for pair in flatten(one.params).items()]
    stacked = {
        leaf.shape for path, leaf in leaves if "/mlp/" in path and path.startswith("text/") and len(leaf.shape) == 3
    }
    known, found_on_device = {id(array) for array in jax.live_arrays()}, []

    def look(done):
        found_on_device.extend(one for one in jax.live_arrays() if id(one) not in known and one.shape in stacked)

    embed = stream._embed
    monkeypatch.setattr(stream, "_embed", lambda *arguments, **options: look(0) or embed(*arguments, **options))
    found, again = reconstruct(files[0], plan, files[1], batches, progress=look)
    assert (again, found_on_device) == (told, [])
    vp.save(found, tmp_path / "files", source_dir=tmp_path / "pruned", plan=plan)
    vp.save(expected, tmp_path / "loaded", source_dir=tmp_path / "pruned", plan=plan)
    assert len({(tmp_path / one / "model.safetensors").read_bytes() for one in ("files", "loaded")}) == 1
    assert len(told) > 1


def test_copies_are_a_few_steps_behind(monkeypatch):
    """The third step is computed before the first is waited for, in any number of steps; results keep their order."""
    events = []
    monkeypatch.setattr(layers, "to_hosts", lambda x: events.append(f"copy {x}") or x)
    monkeypatch.setattr(layers.jax, "block_until_ready", lambda x: events.append(f"wait {x}") or x)
    assert list(layers.streamed(lambda x: x, range(4))) == [0, 1, 2, 3]
    assert events == ["copy 0", "copy 1", "copy 2", "wait 0", "copy 3", *(f"wait {x}" for x in (1, 2, 3))]
    assert list(layers.streamed(lambda x: x, [])) == []


def test_images_count_less():
    teacher = model(config(EQUAL, vision=True))
    plan, (arrays,) = shallow(teacher), images(8)
    pruned, batches = apply_plan(teacher, plan), [{name: x[at : at + 4] for name, x in arrays.items()} for at in (0, 4)]
    first, second = (reconstruct(pruned, plan, teacher, batches, image_weight=weight)[0] for weight in (1.0, 0.1))
    leaves = zip(*(jax.tree.leaves(one.params) for one in (first, second)), strict=True)
    assert not all(np.array_equal(a, b) for a, b in leaves)


def test_bad_input():
    teacher = model(config(EQUAL))
    plan = hybrid(teacher)
    pruned = apply_plan(teacher, plan)
    refused("but fingerprints differ", reconstruct, pruned, plan, model(config(EQUAL), seed=1), rows())
    refused("was not made with this plan from this teacher", reconstruct, teacher, plan, teacher, rows())
    refused("at least 2 calibration rows", reconstruct, pruned, plan, teacher, rows(1, batch=1))
    refused("'image_wait'; did you mean 'image_weight'", reconstruct, pruned, plan, teacher, rows(), image_wait=1.0)
    nothing = {"prompt_weight": 0.0, "image_weight": 0.0, "answer_weight": 0.0}
    refused("has a weight above 0: raise prompt_weight", reconstruct, pruned, plan, teacher, rows(), **nothing)
    flat = {path: np.array(leaf) for path, leaf in flatten(teacher.params).items()}
    flat["text/embed_tokens/weight"][int(rows()[0]["input_ids"][2, 1])] = np.nan
    broken = teacher.replace(params=unflatten(flat))
    own = dataclasses.replace(plan, fingerprint=fingerprint(broken))
    refused(r"o_proj in layer 0 are not finite in row 2", reconstruct, apply_plan(broken, own), own, broken, rows()[:1])


# Towers: before the decoder, and each image once.

TOWER = (tower_layer(2, 2, 10),) * 4
HEADS = (0, 1)
WHOLE = tuple(range(10))
NEURONS = [kept_units(0, HEADS, HEADS, WHOLE[:6]), kept_units(1, (1,), (1,), WHOLE), kept_units(3, HEADS, HEADS, WHOLE)]
DEPTH = [kept_units(i, HEADS, HEADS, WHOLE) for i in (0, 1, 3)]
SCALED = {"layer_scale": True, "class_token": False, "patches": PatchConfig(bias=True), "pre_norm": False}


def images(number=16, seed=0, same=False):
    """A batch of rows with an image each."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 61, (number, 9))
    ids[:, 1:5] = 61
    pixels = draw.standard_normal((number, 1, 3, 6, 6)).astype(np.float32)
    if same:
        pixels[:] = pixels[:1]
    return [{"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": pixels}]


def blocks(one, batches):
    return real_values(one, {"images": batches[0]["pixel_values"][:, 0]}, names=("down_proj",))


def test_a_tower_equals_normal_equations_in_float64():
    """With layer scale, what the weight writes is solved for, not the weight."""
    teacher, batches = seeing(TOWER, **SCALED), images()
    plan = hand_plan(teacher.cfg, fingerprint(teacher), vision=DEPTH)
    pruned = apply_plan(teacher, plan)
    solved, (told,) = reconstruct(pruned, plan, teacher, batches)
    assert (told["stack"], told["layer"], told["module"]) == ("vision", 1, "down_proj")
    assert told["ridge"] is not None
    assert told["error_after"] < told["error_before"]
    dense, ours = blocks(teacher, batches), blocks(pruned, batches)
    target, residual = dense[2]["after"], dense[2]["after"] - ours[1]["after"]
    change = solved_change(ours[1]["down_proj"], residual, target, told["ridge"])
    change /= unstack_layers(pruned.params, pruned.cfg, "vision")[0][1]["layer_scale2/weight"]
    assert_changed_by(change, 1, "mlp/fc2", pruned, solved, stack="vision")
    assert_equal(*(one.replace(params=one.params["text"]) for one in (solved, pruned)))


@pytest.mark.slow
def test_the_tower_comes_before_the_decoder_that_reads_it(tmp_path):
    teacher, batches = seeing(TOWER), images(32)
    text = [kept_units(i, tuple(range(4)), HEADS, tuple(range(9))) for i in (1, 2, 3, 4)]
    plan = hand_plan(teacher.cfg, fingerprint(teacher), vision=NEURONS, text=text)
    pruned, seen = apply_plan(teacher, plan), list[int]()
    solved, report = reconstruct(pruned, plan, teacher, batches, progress=seen.append)
    assert seen == [*range(1, layers_to_solve(plan) + 1)] == [*range(1, 8)]
    assert [(one["stack"], one["layer"], one["module"]) for one in report] == [
        ("vision", 0, "down_proj"), ("vision", 1, "o_proj"), ("vision", 1, "down_proj"),
        *(("text", i, "down_proj") for i in (1, 2, 3, 4)),
    ]  # fmt: skip
    assert all(one["error_after"] <= one["error_before"] for one in report)
    new = images(8, seed=1)[0]

    def error(one, name):
        ours, wanted = (forward(m, **new, capture=("image_features", "hidden"))[1] for m in (one, teacher))
        ours, wanted = (aux[name] if name == "image_features" else aux["hidden"][-1] for aux in (ours, wanted))
        return float(((ours - wanted) ** 2).mean())

    assert error(solved, "image_features") < 0.8 * error(pruned, "image_features")
    assert error(solved, "hidden") < error(pruned, "hidden")
    # the decoder is fitted to what the solved tower sees: the same from the tower's model alone
    alone = hand_plan(teacher.cfg, fingerprint(teacher), vision=NEURONS)
    tower, _ = reconstruct(apply_plan(teacher, alone), alone, teacher, batches)
    assert_equal(*(one.replace(params=one.params["vision"]) for one in (tower, solved)))

    cache = interrupted(tmp_path / "parts", 5, pruned, plan, teacher, batches)
    assert cache.missing(["vision/0/down_proj", *(f"text/{i}/down_proj" for i in range(3))]) == ["text/2/down_proj"]
    again, told = reconstruct(pruned, plan, teacher, batches, cache=cache)
    assert told == report
    assert_equal(again, solved)


@pytest.mark.slow
def test_a_first_layer_that_goes_is_part_of_the_target():
    """Nothing before it can make up for it, but what follows is measured against a stream that went through it."""
    teacher, batches = seeing(TOWER), images()
    kept = [kept_units(1, HEADS, HEADS, WHOLE[:5]), *(kept_units(i, HEADS, HEADS, WHOLE) for i in (2, 3))]
    plan = hand_plan(teacher.cfg, fingerprint(teacher), vision=kept)
    pruned = apply_plan(teacher, plan)
    _, (told,) = reconstruct(pruned, plan, teacher, batches, held_out=0.9)
    dense, ours = blocks(teacher, batches)[1]["after"], blocks(pruned, batches)[0]["after"]
    relative = ((dense - ours) ** 2).mean(1) / (dense**2).mean(1)
    assert abs(told["error_before"] - relative.mean()) < 0.2 * relative.mean()


def test_images_are_held_out_once():
    teacher = seeing(TOWER)
    plan = hand_plan(teacher.cfg, fingerprint(teacher), vision=DEPTH)
    refused("at least 2 calibration images", reconstruct, apply_plan(teacher, plan), plan, teacher, images(same=True))
