"""Losses: the reference's distillation numbers and gradients, chunked vocabulary losses, layer alignment."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases
import torch
from prune_cases import expanded, hand_plan, kept_units
from refusal import refused
from repository import load_arrays

from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.inputs import check_batch
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.params import flatten, place_params, unflatten
from vlmprune_jax.core.models.vlm import Model, apply
from vlmprune_jax.core.plans.kept import KeptLayer
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.core.prune.fingerprints import fingerprint
from vlmprune_jax.core.prune.surgery import apply_plan
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.flops import step_flops
from vlmprune_jax.core.recovery.loop import recover
from vlmprune_jax.core.recovery.losses import combine, loss_sums, losses, term_weights
from vlmprune_jax.core.recovery.terms import (
    LossTerm,
    check_losses,
    make_teacher,
    needs_teacher,
    student_layers,
    terms_of,
)
from vlmprune_jax.core.recovery.trainable import add_lora
from vlmprune_jax.io.checkpoints.read import load

# Reference family -> its checkpoint, tower folder, and whose inputs its trainer gives to the teacher.
FAMILIES = {
    "llava": ("llava_orig", "clip_tower", "student"),
    "bunny": ("bunny", "siglip_tower", "student"),
    "internvl": ("internvl", None, "own"),
}
# End of the reference's parameter name -> path in params, and the index of its layer in the stack.
GRADIENTS = {
    "model.mm_projector.2.bias": ("projector/linear_2/bias", None),
    "mlp1.3.bias": ("projector/linear_2/bias", None),
    "model.norm.weight": ("text/norm/weight", None),
    "model.final_layernorm.weight": ("text/final_layernorm/weight", None),
    "model.layers.0.input_layernorm.weight": ("text/layers/0/input_layernorm/weight", 0),
}


@pytest.fixture
def terms():
    """`losses`, which is afterwards as before."""
    before = dict(losses)
    yield losses
    losses.clear()
    losses.update(before)


@pytest.fixture(scope="module", params=FAMILIES)
def distill(goldens, request):
    """The teacher, the two students, and the batch of distill/<family>.npz, padded after images are expanded."""
    checkpoint, tower, inputs = FAMILIES[request.param]
    teacher = load(goldens / "ckpt" / checkpoint, vision_dir=tower and goldens / "ckpt" / tower)
    facts = json.loads((goldens / f"distill/{request.param}.json").read_text())["students"]
    students = {kind: apply_plan(teacher, _plan(teacher, facts[kind])) for kind in ("layer", "width")}
    arrays = load_arrays(goldens / f"distill/{request.param}.npz")
    rows = [arrays[name] for name in ("input_ids", "attention_mask", "labels", "pixel_values")]
    batch = expanded(*rows, teacher.cfg.tokens_per_image) if inputs == "student" else _tiles(*rows, teacher.cfg)
    assert batch["input_ids"].shape == arrays["teacher_hidden_-1"].shape[:2]
    batch["media"] = {"vision": Packed(batch.pop("pixel_values"))}
    batch = jax.tree.map(jnp.asarray, batch)
    assert batch["attention_mask"].sum() < batch["attention_mask"].size  # padding takes part in the reference's losses
    measure = LossConfig(1.0, 1.0, 1.0, 1.0, temperature=2.0, teacher_inputs=inputs, reference_compat=True, chunk=7)
    return teacher, students, facts, arrays, batch, measure


def _of_trainer(strategy: str, alpha: float, *, kl_norm: float, **options) -> LossConfig:
    """Return the settings for options of the paper's trainers (`dist_strategy`, `dist_alpha`, `dist_norm`)."""
    weights = {name: alpha / (1.0 if name == "l2" else kl_norm) for name in strategy.split("+")}
    return LossConfig(ce=1 - alpha, **weights, **options)


def _plan(teacher, facts) -> PrunePlan:
    shapes = teacher.cfg.text.layers
    layers = []
    for i, shape in enumerate(shapes):
        if i in facts.get("removed_layers", ()):
            continue
        whole = KeptLayer.whole(i, shape)
        if "kept_heads" in facts:
            heads, neurons = tuple(facts["kept_heads"][str(i)]), tuple(facts["kept_neurons"][str(i)])
            whole = kept_units(i, heads, heads, neurons)
        layers.append(whole)
    return hand_plan(teacher.cfg, fingerprint(teacher), "depth", "golden", text=layers)


def _tiles(ids, mask, labels, tiles, cfg) -> dict[str, np.ndarray]:
    """InternVL's batch: ids are expanded, tiles of all rows come one after the other."""
    counts = (ids == cfg.image_token_id).sum(axis=1) // cfg.tokens_per_image
    pixels = np.zeros((len(counts), counts.max(), *tiles.shape[1:]), np.float32)
    pixels[np.arange(counts.max()) < counts[:, None]] = tiles
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def _sums(student, teacher, batch, loss: LossConfig, flat, kept=None):
    """Sums of the terms, and the weights; `flat` are the student's parameters."""
    options = {"remat": "none", "dropout_key": None, "teacher_params": teacher.params}
    options["teacher"] = make_teacher(loss, student.cfg, teacher.cfg, kept)
    sums = loss_sums(unflatten(flat), student.cfg, batch, loss, **options)
    return sums, term_weights(loss, student.cfg, batch["labels"], batch["attention_mask"])


@pytest.mark.parametrize("kind", ["layer", "width"])
@pytest.mark.parametrize("layers", [pytest.param((-1,), marks=pytest.mark.slow), (-1, 2)])
def test_distillation_losses_equal_the_reference(distill, kind: str, layers: tuple[int, ...]):
    teacher, students, facts, _, batch, measure = distill
    student, every = students[kind], dataclasses.replace(measure, l2_layers=layers)
    sums, weights = jax.jit(lambda flat: _sums(student, teacher, batch, every, flat))(flatten(student.params))
    components = facts[kind]["components"]
    reported = {"ce": "xe", "l2": "l2_last" if layers == (-1,) else "l2_list", "kl": "kl", "rkl": "rkl"}
    for term, name in reported.items():
        if name in components:  # InternVL's trainer has no KL
            np.testing.assert_allclose(sums[term] / weights[term], components[name], rtol=1e-5, err_msg=name)
    checked = 0
    for name, expected in facts[kind]["losses"].items():
        strategy, *rest = name.split("|")
        options = dict(part.split("=") for part in rest)
        if options["layers"] not in ("-", ",".join(map(str, layers))):
            continue
        norm = float(options.get("norm", 1))
        loss = _of_trainer(strategy, float(options["alpha"]), kl_norm=norm, l2_layers=layers)
        value = combine({term: sums[term] for term in terms_of(loss, reported=True)}, weights, loss)
        np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=name)
        checked += 1
    assert checked == (20 if "kl" in components else 2 if layers == (-1,) else 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layer", "width"])
def test_distillation_gradients_equal_the_reference(distill, kind: str):
    teacher, students, facts, arrays, batch, measure = distill
    student = students[kind]
    flat = flatten(student.params)

    def terms(some):
        """Mean of every term, and of L2 over two layers."""
        everything, values = {**flat, **some}, {}
        for layers in ((-1,), (-1, 2)):
            loss = dataclasses.replace(measure, l2_layers=layers, chunk=9)
            sums, weights = _sums(student, teacher, batch, loss, everything)
            values |= {(name, layers): sums[name] / weights[name] for name in sums}
        return values

    jacobian = jax.jit(jax.jacrev(terms))({path: flat[path] for path, _ in GRADIENTS.values() if path in flat})
    for case in facts[kind]["grads"]:
        layers = tuple(case["layers"])
        loss = _of_trainer(case["strategy"], case["alpha"], kl_norm=case["norm"], l2_layers=layers)
        counted = {(term, layers): weight for term, weight in loss.weights().items() if weight}
        stored = [name for name in arrays if name.startswith(f"{case['key']}__")]
        assert len(stored) == 3
        for name in stored:
            end = next(end for end in GRADIENTS if name.endswith(end))
            path, layer = GRADIENTS[end]
            ours = sum(weight * np.asarray(jacobian[term][path]) for term, weight in counted.items())
            ours, expected = ours if layer is None else ours[layer], arrays[name]
            scale = np.abs(expected).max()
            np.testing.assert_allclose(ours / scale, expected / scale, atol=1e-5, err_msg=name)


def test_layers_are_aligned_by_the_plan():
    teacher, student = cases.config(layers=6), cases.config(layers=3)
    kept = (0, 3, 5)
    loss = LossConfig(l2=1.0, l2_layers=(0, 1, 2, -1, -2))
    assert student_layers(loss, student) == (0, 1, 2, 3, 2)
    assert make_teacher(loss, student, teacher, kept).layers == (0, 1, 4, 6, 4)
    compat = dataclasses.replace(loss, reference_compat=True)
    assert make_teacher(compat, student, teacher, kept).layers == (0, 1, 2, 6, 5)
    assert make_teacher(loss, student, student, None).layers == (0, 1, 2, 3, 2)
    refused("pass plan, or use -1", make_teacher, loss, student, teacher, None)
    refused("plan keeps 2 layers", make_teacher, loss, student, teacher, (0, 3))
    refused("4 is outside .* 4 hidden", make_teacher, LossConfig(l2=1.0, l2_layers=(4,)), student, teacher, kept)


def test_masked_terms_equal_plain_formulas():
    """Default measure: L2, cosine and KL over real tokens, cross-entropy over labelled ones; any chunk size."""
    cfg, other = cases.config(layers=3), cases.config(layers=2)
    student, teacher = cases.model(other, 1), cases.model(cfg, 2)
    arrays = next(cases.Stream(cfg, rows=3)).arrays
    batch = jax.tree.map(jnp.asarray, check_batch(cfg, arrays))
    logits, aux = _apply(student, batch, ("hidden",))
    taught, teacher_aux = _apply(teacher, batch, ("hidden",))
    valid, labels = arrays["attention_mask"] == 1, arrays["labels"][:, 1:]
    log_p = jax.nn.log_softmax(logits)[:, :-1]
    picked = np.take_along_axis(np.asarray(log_p), np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    ours, theirs = (np.asarray(jax.nn.log_softmax(x / 1.7), np.float64) for x in (logits, taught))
    hidden = [
        [torch.from_numpy(np.array(x[valid], np.float64)) for x in pair]
        for pair in ((aux["hidden"][1], teacher_aux["hidden"][2]), (aux["hidden"][2], teacher_aux["hidden"][3]))
    ]
    expected = {
        "ce": -picked[labels != -100].mean(),
        "kl": 1.7**2 * (np.exp(theirs) * (theirs - ours)).sum(-1)[valid].mean(),
        "rkl": 1.7**2 * (np.exp(ours) * (ours - theirs)).sum(-1)[valid].mean(),
        "l2": np.mean([torch.nn.functional.mse_loss(a, b) for a, b in hidden]),
        "cosine": np.mean([(1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).mean() for a, b in hidden]),
    }
    for chunk in (1, 4, 100):
        loss = LossConfig(1.0, 1.0, 1.0, 1.0, (1, -1), 1.7, "own", False, chunk, cosine=1.0)
        flat = flatten(student.params)
        sums, weights = jax.jit(lambda flat, loss=loss: _sums(student, teacher, batch, loss, flat, (1, 2)))(flat)
        assert sums.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(sums[name] / weights[name], value, rtol=2e-5, err_msg=f"{name}, chunk {chunk}")


def test_states_that_are_zero_have_a_finite_cosine_and_gradient():
    """Padding that is all zero must not turn into NaN, not even under the mask."""
    zero = jnp.zeros((1, 2, 3))
    value, gradient = jax.value_and_grad(lambda a: jnp.sum(losses["cosine"].value(a, zero)))(zero)
    assert value == 1.0  # 0.5 each, as in the criteria
    assert not np.any(gradient)


def _apply(model, batch, want):
    inputs = {"media": batch["media"], "attention_mask": batch["attention_mask"]}
    return jax.jit(lambda params: apply(params, model.cfg, batch["input_ids"], capture=want, **inputs))(model.params)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (lambda logits, targets: [][0], r"failed at .*test_losses.py:\d+ with IndexError"),
        (lambda logits, targets: None, "returned None, expected a real number for each position"),
        (lambda logits, targets: 1.0, r"returned 1\.0, expected"),
        (lambda logits, targets: logits, r"returned float32\[\d+, \d+, \d+\], expected"),
        (lambda logits, targets: logits[..., 0].astype("complex64"), r"returned complex64\[\d+, \d+\], expected"),
        (lambda logits, targets: np.asarray(logits), r"failed at .* with TracerArrayConversionError"),
        (lambda logits: logits, r"failed with TypeError: .*positional argument"),
        (lambda hidden: hidden, r": its function returned float32\[\d+, \d+, \d+\], expected"),
    ],
)
def test_a_term_of_a_user_that_fails(terms, value, told):
    hidden = "hidden" in inspect.signature(value).parameters
    needs = (("hidden",), "tokens") if hidden else (("logits", "targets"), "positions")
    terms["mine"] = LossTerm(value, *needs)
    cfg, loss = cases.config(vision=False), LossConfig(ce=0.0, l2_layers=(-1,), extra={"mine": 1.0})
    refused(f"loss term 'mine'.*{told}", losses, cases.model(cfg), next(cases.Stream(cfg)), loss)


# --- the registry of terms --------------------------------------------------------------------------------------------

CFG = cases.config()


@pytest.mark.slow
def test_values_of_a_batch_are_those_of_a_step():
    """All five terms, with the plan's layers; with adapters, in the config's precision, on a mesh."""
    student, teacher, batch = cases.model(CFG, 1), cases.model(CFG, 9), next(cases.Stream(CFG))
    loss = LossConfig(ce=0.5, l2=0.5, kl=0.1, rkl=0.1, cosine=0.2, l2_layers=(1, -1), chunk=4)
    config = cases.settings(losses=loss, steps=1, learning_rate=1e-3)
    _, summary = recover(student, iter([batch]), config, teacher=teacher, progress=False)
    found = losses(student, batch, config, teacher=teacher)
    assert list(found) == ["ce", "l2", "cosine", "kl", "rkl", "total"]
    for name, value in found.items():
        assert value == pytest.approx(summary["last"]["loss" if name == "total" else name], rel=1e-6), name
    assert losses(student, batch.arrays, loss, teacher=teacher) == pytest.approx(found, rel=1e-6)
    adapted = add_lora(student, cases.LORA, jax.random.key(0))  # which change nothing at first
    assert losses(adapted, batch, loss, teacher=teacher) == pytest.approx(found, rel=1e-5)
    mesh = make_mesh(4, 2, 1)
    both = [Model(unflatten(place_params(one, mesh)), one.cfg) for one in (student, teacher)]
    assert losses(both[0], batch, loss, teacher=both[1]) == pytest.approx(found, rel=1e-5)
    half = losses(student, batch, cases.settings(losses=loss, compute_dtype="bfloat16"), teacher=teacher)
    assert half["total"] != found["total"]
    assert half["total"] == pytest.approx(found["total"], rel=0.02)


def test_values_without_a_teacher_or_of_what_does_not_fit():
    student, batch = cases.model(CFG, 1), next(cases.Stream(CFG))
    found = losses(student, batch, LossConfig())
    assert found.keys() == {"ce", "total"}
    assert found["ce"] == found["total"] > 0
    refused("kl needs a teacher", losses, student, batch, LossConfig(kl=1.0))
    unlabelled = {name: array for name, array in batch.arrays.items() if name != "labels"}
    refused("the batch has no labels", losses, student, unlabelled, LossConfig())


@pytest.mark.slow
def test_a_term_on_the_students_states_alone(terms):
    """No teacher runs; the mean is over real tokens and layers; another function of the same name is compiled anew."""
    terms["small"] = LossTerm(lambda h: jnp.sum(h * h, axis=-1), needs=("hidden",), counts="features")
    loss = LossConfig(extra={"small": 0.1}, l2_layers=(0, 1, -1))
    assert not needs_teacher(loss)
    student, batch = cases.model(CFG, 1), next(cases.Stream(CFG, rows=2))
    found = losses(student, batch, loss)
    _, aux = _apply(student, jax.tree.map(jnp.asarray, check_batch(CFG, batch.arrays)), ("hidden",))
    states = [np.asarray(aux["hidden"][i], np.float64)[batch.arrays["attention_mask"] == 1] for i in (0, 1, -1)]
    assert found["small"] == pytest.approx(np.mean([np.square(x).mean() for x in states]), rel=1e-5)
    assert found["total"] == pytest.approx(found["ce"] + 0.1 * found["small"], rel=1e-6)
    terms["small"] = LossTerm(lambda h: 2 * jnp.sum(h * h, axis=-1), needs=("hidden",), counts="features")
    assert losses(student, batch, loss)["small"] == pytest.approx(2 * found["small"], rel=1e-6)


def test_a_term_of_the_students_distribution_beside_a_cached_teacher(terms):
    """Its entropy, which needs no teacher and sees all of the vocabulary."""
    terms["entropy"] = LossTerm(lambda p: -jnp.sum(jnp.exp(p) * p, axis=-1), needs=("log_probs",), counts="positions")
    loss = LossConfig(kl=0.5, extra={"entropy": 1.0}, teacher_top_k=3, teacher_inputs="own", chunk=4)
    cfg = cases.config(vision=False)
    batch = next(cases.Stream(cfg))
    shape = batch.arrays["input_ids"].shape
    batch.arrays["teacher_ids"] = np.tile(np.arange(3, dtype=np.int32), (*shape, 1))
    batch.arrays["teacher_logprobs"] = np.full((*shape, 4), np.log(0.25), np.float32)
    found = losses(cases.model(cfg), batch, loss)
    assert 0 < found["entropy"] <= 4 * np.log(64)  # temperature 2, squared
    assert found["total"] == pytest.approx(found["ce"] + 0.5 * found["kl"] + found["entropy"], rel=1e-6)
    flops = step_flops(cfg, cfg, loss, ["text/lm_head/weight"], rows=2, length=8, images=0)
    assert flops.teacher == 0


def test_what_is_no_term(terms):
    refused("'a b' must be a Python identifier", terms.__setitem__, "a b", terms["kl"])
    refused("its value a LossTerm, got", terms.__setitem__, "mine", jnp.sum)
    terms["mine"] = LossTerm(lambda a, b: a - b, needs=("teacher_logits", "logits"), counts="positions")
    loss = LossConfig(kl=1.0, extra={"mine": 1.0}, teacher_top_k=3, teacher_inputs="own")
    refused(r"mine cannot be computed from cached top-k logits of a teacher \(only kl can\)", check_losses, loss)
    terms["tokens"] = LossTerm(lambda x: x[..., 0], needs=("logits",), counts="labels")
    config = cases.settings(steps=1, losses=LossConfig(extra={"tokens": 1.0}))
    refused("name of a training metric", recover, cases.model(CFG), cases.Stream(CFG), config, progress=False)
