"""Losses: the reference's distillation numbers and gradients, chunked vocabulary losses, layer alignment."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases

from vlmprune_jax.errors import UserError
from vlmprune_jax.hf.read import load
from vlmprune_jax.models.params import flatten, unflatten
from vlmprune_jax.models.vlm import apply
from vlmprune_jax.prune.fingerprint import fingerprint
from vlmprune_jax.prune.plan import KeptLayer, PrunePlan
from vlmprune_jax.prune.surgery import apply_plan
from vlmprune_jax.recover.losses import (
    LossConfig,
    Teacher,
    combine,
    from_alpha,
    layer_pairs,
    loss_sums,
    term_weights,
    vocabulary_sums,
)

# Reference parameter -> path in params, and the index of its layer in the stack.
GRADIENTS = {
    "model.mm_projector.2.bias": ("projector/linear_2/bias", None),
    "model.norm.weight": ("text/norm/weight", None),
    "model.layers.0.input_layernorm.weight": ("text/layers/0/input_layernorm/weight", 0),
}


@pytest.fixture(scope="module")
def distill(goldens):
    """The teacher, the two students, and the batch of distill/llava.npz with images expanded."""
    teacher = load(goldens / "ckpt/llava_orig", vision_dir=goldens / "ckpt/clip_tower")
    facts = json.loads((goldens / "distill/llava.json").read_text())["students"]
    students = {kind: apply_plan(teacher, _plan(teacher, facts[kind])) for kind in ("layer", "width")}
    arrays = np.load(goldens / "distill/llava.npz")
    return teacher, students, facts, arrays, _expand(arrays, teacher.cfg.tokens_per_image)


def _plan(teacher, facts) -> PrunePlan:
    shapes = teacher.cfg.text.layers
    layers = []
    for i, shape in enumerate(shapes):
        if i in facts.get("removed_layers", ()):
            continue
        whole = KeptLayer.whole(i, shape)
        if "kept_heads" in facts:
            heads, neurons = tuple(facts["kept_heads"][str(i)]), tuple(facts["kept_neurons"][str(i)])
            whole = KeptLayer(i, heads, heads, neurons)
        layers.append(whole)
    return PrunePlan(fingerprint(teacher), "depth", "golden", shapes, tuple(layers), 1, 1, 1)


def _expand(arrays, n: int) -> dict[str, jax.Array]:
    """The batch after splicing: image positions repeated, padded to one length (the reference pads after splicing)."""
    length = arrays["teacher_hidden_-1"].shape[1]
    rows = len(arrays["input_ids"])
    batch = {
        "input_ids": np.zeros((rows, length), np.int32),
        "attention_mask": np.zeros((rows, length), np.int32),
        "labels": np.full((rows, length), -100, np.int32),
    }
    for r in range(rows):
        real = arrays["attention_mask"][r] == 1
        ids, labels = arrays["input_ids"][r][real], arrays["labels"][r][real]
        repeats = np.where(ids == -200, n, 1)
        ids, labels = np.repeat(ids, repeats), np.repeat(np.where(ids == -200, -100, labels), repeats)
        batch["input_ids"][r, : len(ids)], batch["labels"][r, : len(ids)] = ids, labels
        batch["attention_mask"][r, : len(ids)] = 1
    batch["pixel_values"] = arrays["pixel_values"][:, None]
    assert batch["attention_mask"].sum() < batch["attention_mask"].size  # padding takes part in the reference's losses
    return {name: jnp.asarray(array) for name, array in batch.items()}


def _sums(student, teacher, batch, loss: LossConfig, flat):
    """Sums of the terms, and the weights; `flat` are the student's parameters."""
    ours, theirs = layer_pairs(loss, student.cfg, teacher.cfg, None)
    sums = loss_sums(
        unflatten(flat),
        student.cfg,
        batch,
        loss,
        teacher=Teacher(teacher.cfg, ours, theirs),
        teacher_params=teacher.params,
        remat="none",
        dropout_key=None,
    )
    return sums, term_weights(loss, student.cfg, batch["labels"], batch["attention_mask"])


@pytest.mark.parametrize("kind", ["layer", "width"])
@pytest.mark.parametrize("layers", [(-1,), (-1, 2)])
def test_distillation_losses_equal_the_reference(distill, kind: str, layers: tuple[int, ...]):
    teacher, students, facts, _, batch = distill
    student = students[kind]
    every = LossConfig(1.0, 1.0, 1.0, 1.0, layers, 2.0, "student", True, chunk=7)
    sums, weights = jax.jit(lambda flat: _sums(student, teacher, batch, every, flat))(flatten(student.params))
    checked = 0
    for name, expected in facts[kind]["losses"].items():
        strategy, *rest = name.split("|")
        options = dict(part.split("=") for part in rest)
        if options["layers"] not in ("-", ",".join(map(str, layers))):
            continue
        loss = from_alpha(strategy, float(options["alpha"]), kl_norm=float(options["norm"]), l2_layers=layers)
        value = combine({term: sums[term] for term in loss.terms()}, weights, loss)
        np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=name)
        checked += 1
    assert checked == 20


@pytest.mark.parametrize("kind", ["layer", "width"])
def test_distillation_gradients_equal_the_reference(distill, kind: str):
    teacher, students, facts, arrays, batch = distill
    student = students[kind]
    flat = flatten(student.params)

    def terms(some):
        """Mean of every term, and of L2 over two layers."""
        everything, values = {**flat, **some}, {}
        for layers in ((-1,), (-1, 2)):
            loss = LossConfig(1.0, 1.0, 1.0, 1.0, layers, 2.0, "student", True, chunk=9)
            sums, weights = _sums(student, teacher, batch, loss, everything)
            values |= {(name, layers): sums[name] / weights[name] for name in sums}
        return values

    jacobian = jax.jit(jax.jacrev(terms))({path: flat[path] for path, _ in GRADIENTS.values()})
    for case in facts[kind]["grads"]:
        layers = tuple(case["layers"])
        loss = from_alpha(case["strategy"], case["alpha"], kl_norm=case["norm"], l2_layers=layers)
        for name, (path, layer) in GRADIENTS.items():
            ours = sum(weight * np.asarray(jacobian[term, layers][path]) for term, weight in loss.weights().items())
            ours = ours if layer is None else ours[layer]
            expected = arrays[f"{case['key']}__{name}"]
            scale = np.abs(expected).max()
            np.testing.assert_allclose(ours / scale, expected / scale, atol=1e-5, err_msg=f"{case['key']} {name}")


def test_layers_are_aligned_by_the_plan():
    teacher, student = cases.config(layers=6), cases.config(layers=3)
    kept = (0, 3, 5)
    loss = LossConfig(l2=1.0, l2_layers=(0, 1, 2, -1, -2))
    assert layer_pairs(loss, student, teacher, kept) == ((0, 1, 2, 3, 2), (0, 1, 4, 6, 4))
    compat = dataclasses.replace(loss, reference_compat=True)
    assert layer_pairs(compat, student, teacher, kept) == ((0, 1, 2, 3, 2), (0, 1, 2, 6, 5))
    assert layer_pairs(loss, student, student, None) == ((0, 1, 2, 3, 2), (0, 1, 2, 3, 2))
    with pytest.raises(UserError, match="pass plan, or use layer -1"):
        layer_pairs(loss, student, teacher, None)
    with pytest.raises(UserError, match="plan keeps 2 layers"):
        layer_pairs(loss, student, teacher, (0, 3))
    with pytest.raises(UserError, match="layer 4 is outside the student's 4 hidden states"):
        layer_pairs(LossConfig(l2=1.0, l2_layers=(4,)), student, teacher, kept)


def test_masked_terms_equal_plain_formulas():
    """Default measure: L2 and KL over real tokens, cross-entropy over labelled ones; any chunk size."""
    cfg, other = cases.config(layers=3), cases.config(layers=2)
    student, teacher = cases.model(other, 1), cases.model(cfg, 2)
    arrays = next(cases.Stream(cfg, rows=3)).arrays
    batch = {name: jnp.asarray(x) for name, x in arrays.items()}
    logits, aux = _apply(student, batch, ("hidden",))
    taught, teacher_aux = _apply(teacher, batch, ("hidden",))
    valid, labels = arrays["attention_mask"] == 1, arrays["labels"][:, 1:]
    log_p = jax.nn.log_softmax(logits)[:, :-1]
    picked = np.take_along_axis(np.asarray(log_p), np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    ours, theirs = (np.asarray(jax.nn.log_softmax(x / 1.7), np.float64) for x in (logits, taught))
    expected = {
        "ce": -picked[labels != -100].mean(),
        "kl": 1.7**2 * (np.exp(theirs) * (theirs - ours)).sum(-1)[valid].mean(),
        "rkl": 1.7**2 * (np.exp(ours) * (ours - theirs)).sum(-1)[valid].mean(),
        "l2": np.mean(
            [np.square(a - b)[valid].mean() for a, b in zip(aux["hidden"][1:], teacher_aux["hidden"][2:], strict=False)]
        ),
    }
    for chunk in (1, 4, 100):
        loss = LossConfig(1.0, 1.0, 1.0, 1.0, (1, -1), 1.7, "own", False, chunk)
        ours_i, theirs_i = layer_pairs(loss, other, cfg, (1, 2))
        sums = loss_sums(
            student.params,
            other,
            batch,
            loss,
            teacher=Teacher(cfg, ours_i, theirs_i),
            teacher_params=teacher.params,
            remat="none",
            dropout_key=None,
        )
        weights = term_weights(loss, other, batch["labels"], batch["attention_mask"])
        for name, value in expected.items():
            np.testing.assert_allclose(sums[name] / weights[name], value, rtol=2e-5, err_msg=f"{name}, chunk {chunk}")


def _apply(model, batch, want):
    inputs = {"pixel_values": batch["pixel_values"], "attention_mask": batch["attention_mask"]}
    return apply(model.params, model.cfg, batch["input_ids"], want=want, **inputs)


@pytest.mark.parametrize("seq", [12, 13, 300])
def test_no_array_of_batch_by_sequence_by_vocabulary(seq: int):
    """Neither in the forward nor in the gradient of all vocabulary losses, whatever the chunk."""
    rows, embed, vocab = 3, 5, 997
    loss = LossConfig(1.0, 0.0, 1.0, 1.0)
    table = jnp.ones((vocab, embed))

    def total(hidden, table, labels, mask):
        head = lambda h: jnp.einsum("...d,vd->...v", h, table)  # noqa: E731
        return sum(vocabulary_sums(hidden, head, labels, mask, loss, 2 * hidden, head).values())

    labels = jnp.zeros((rows, seq), jnp.int32)
    step = jax.jit(jax.grad(total, argnums=(0, 1)))
    hidden = jnp.ones((rows, seq, embed))
    sizes = [aval.size for aval in _avals(jax.make_jaxpr(step)(hidden, table, labels, labels).jaxpr)]
    assert max(sizes) < rows * seq * vocab
    assert rows * min(loss.chunk, -(-seq // 2)) * vocab in sizes  # the test sees the chunked logits
    text = step.lower(hidden, table, labels, labels).compile().as_text()
    assert f"[{rows},{seq},{vocab}]" not in text
    assert f"[{rows * seq},{vocab}]" not in text


def _avals(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _avals(inner)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ce": 0.0}, "at least one must be positive"),
        ({"l2": -0.5}, "none may be negative"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"l2": 1.0, "l2_layers": ()}, "l2 needs l2_layers"),
        ({"teacher_inputs": "both"}, "'both' is not one of student, own"),
    ],
)
def test_bad_loss_settings(changes, message):
    with pytest.raises(UserError, match=message):
        LossConfig(**changes)


@pytest.mark.parametrize(("strategy", "alpha", "norm"), [("vanilla", 0.5, 1.0), ("kl", 1.5, 1.0), ("kl", 0.5, 0.0)])
def test_bad_strategies(strategy, alpha, norm):
    with pytest.raises(UserError, match="distillation strategy"):
        from_alpha(strategy, alpha, kl_norm=norm)
