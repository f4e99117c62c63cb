"""Forward KL against a teacher's k likeliest tokens: its value, its gradient, and rows that a cache keeps."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases
from refusal import refused

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.params import place_params, unflatten
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.models.vocabulary import Head
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.losses import _top_k, term_weights, vocabulary_sums
from vlmprune_jax.core.recovery.terms import check_losses, make_teacher, top_k_divergence, top_k_logprobs
from vlmprune_jax.io.data.cached_arrays import TeacherRows, record_key
from vlmprune_jax.io.data.media import StoredImage
from vlmprune_jax.io.data.record_cache import teacher_top_k
from vlmprune_jax.io.data.records import Record

TEMPERATURE = 1.7
VOCAB = 64
KL = LossConfig(ce=0.3, kl=0.7, temperature=TEMPERATURE, teacher_inputs="own", chunk=4)


# --- the divergence ---------------------------------------------------------------------------------------------------


def _logits(seed, spread):
    return spread * np.random.default_rng(seed).standard_normal((3, 5, VOCAB)).astype(np.float32)


def _softmax(logits):
    e = np.exp(logits.astype(np.float64) / TEMPERATURE - logits.max(-1, keepdims=True) / TEMPERATURE)
    return e / e.sum(-1, keepdims=True)


def _by_numpy(student, teacher, k):
    """Divergence and its gradient with respect to the student's logits: (q - p) / T among the k, and outside them
    q - p(rest) q / q(rest).
    """
    p, q = _softmax(teacher), _softmax(student)
    chosen = np.zeros(p.shape, bool)
    np.put_along_axis(chosen, np.argsort(-p, axis=-1)[..., :k], True, axis=-1)
    value = np.where(chosen, p * np.log(p / q), 0).sum(-1)
    rest_p, rest_q = (np.where(chosen, 0, x).sum(-1, keepdims=True) for x in (p, q))
    target = p
    if k < VOCAB:
        value = value + (rest_p * np.log(rest_p / rest_q))[..., 0]
        target = np.where(chosen, p, rest_p * q / rest_q)
    return value, (q - target) / TEMPERATURE


@pytest.mark.parametrize("k", [1, 20, VOCAB - 1, VOCAB])
@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_value_and_gradient_equal_numpy(k, spread):
    """Also for distributions so sharp that float32 cannot tell 1 minus the probability of the k from 0."""
    student, teacher = _logits(0, spread), _logits(1, spread)
    ids, logprobs = top_k_logprobs(jnp.asarray(teacher), TEMPERATURE, k)
    np.testing.assert_allclose(np.exp(logprobs).sum(-1), 1.0, rtol=1e-6)
    found = top_k_divergence(jnp.asarray(student), ids, logprobs, TEMPERATURE)
    gradient = jax.grad(lambda x: jnp.sum(top_k_divergence(x, ids, logprobs, TEMPERATURE)))(jnp.asarray(student))
    value, expected = _by_numpy(student, teacher, k)
    # Float32 rounds the terms of a sum that may be much smaller than they are.
    np.testing.assert_allclose(found, value, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_log_probabilities_of_less_precision_are_normalised():
    """Bfloat16 changes their sum by 1e-3, which would show as a divergence from oneself (or one below 0)."""
    student = jnp.asarray(_logits(0, 3.0))
    ids, logprobs = top_k_logprobs(student, TEMPERATURE, 5)
    rounded = logprobs.astype(jnp.bfloat16)
    assert np.abs(np.exp(rounded.astype(jnp.float32)).sum(-1) - 1).max() > 1e-3
    divergence = top_k_divergence(student, ids, rounded, TEMPERATURE)
    assert divergence.min() > -1e-6
    assert divergence.max() < 1e-4


# --- in the step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "labels"])
def test_the_whole_vocabulary_gives_the_loss_of_a_teacher_that_runs(positions):
    """Value and gradients within 1e-6, with padding and some labels ignored, whatever the chunk."""
    rng, loss = np.random.default_rng(0), dataclasses.replace(KL, kl_positions=positions)
    table, hidden, taught = (
        jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((VOCAB, 8), (3, 11, 8), (3, 11, 8))
    )
    mask = (np.arange(11) < np.array([[11], [7], [9]])).astype(np.int32)
    labels = jnp.asarray(np.where(mask * (np.arange(11) % 3) > 0, 5, -100))

    def head(states, weight):
        return jnp.einsum("...d,vd->...v", states, weight)

    ids, logprobs = top_k_logprobs(head(taught, 2 * table), TEMPERATURE, VOCAB)
    beside = {"teacher_hidden": taught, "teacher_head": Head(2 * table, None)}
    cached = {"teacher_hidden": None, "teacher_head": None, "top": {"ids": ids, "logprobs": logprobs}}

    def kl(hidden, table, given):
        weights = term_weights(loss, cases.config(), labels, jnp.asarray(mask))
        sums = vocabulary_sums(hidden, Head(table, None), labels, jnp.asarray(mask), loss, **given)
        return sums["kl"] / weights["kl"]

    (expected, gradients), (found, ours) = (
        jax.jit(jax.value_and_grad(lambda h, t, given=given: kl(h, t, given), argnums=(0, 1)))(hidden, table)
        for given in (beside, cached)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for one, other in zip(ours, gradients, strict=True):
        np.testing.assert_allclose(one / jnp.abs(other).max(), other / jnp.abs(other).max(), atol=1e-6)
    counted = np.flatnonzero(np.abs(ours[0]).max(axis=(0, 2)))
    assert counted.tolist() == ([*range(11)] if positions == "all" else [0, 1, 3, 4, 6, 7, 9])


def test_a_teacher_is_computed_in_the_given_precision_and_sees_its_own_ids_only():
    """On one device, and on eight with the vocabulary split over two."""
    teacher, loss = cases.model(cases.config(vision=False, layers=1)), dataclasses.replace(KL, teacher_top_k=VOCAB)
    batch, mesh = next(cases.Stream(teacher.cfg)), make_mesh(2, 2, 2)

    def logprobs(model, dtype, mesh=None):
        ids, found = teacher_top_k(model, loss, compute_dtype=dtype, mesh=mesh)(batch.arrays)
        return np.take_along_axis(found[..., :-1], np.argsort(ids), -1)

    exact, half = logprobs(teacher, "float32"), logprobs(teacher, "bfloat16")
    assert 1e-4 < np.abs(exact - half).max() < 0.1
    split = Model(unflatten(place_params(teacher, mesh)), teacher.cfg)
    np.testing.assert_allclose(logprobs(split, "float32", mesh), exact, atol=1e-5, rtol=0)
    batch.arrays["input_ids"][0, 0] = VOCAB
    refused(f"outside the vocabulary of {VOCAB}", logprobs, teacher, "float32")


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rkl": 0.5}, r"rkl cannot be computed from cached top-k logits .* set rkl=0, or train"),
        ({"l2": 0.5, "cosine": 0.1}, "l2 and cosine cannot be computed .* set l2=0 and cosine=0"),
        ({"kl": 0.0}, "teacher_top_k=5 needs a term that uses it: set kl above 0"),
        ({"teacher_inputs": "student"}, 'a cached teacher needs teacher_inputs="own"'),
        ({"reference_compat": True}, "and reference_compat=False"),
        ({"kl_positions": "labels", "reference_compat": True, "teacher_top_k": 0}, 'needs kl_positions="all"'),
    ],
)
def test_settings_that_contradict_each_other(changes, message):
    refused(message, lambda: check_losses(dataclasses.replace(KL, **{"teacher_top_k": 5, **changes})))


def test_more_tokens_than_there_are_and_batches_without_any():
    cfg, loss = cases.config(vision=False), dataclasses.replace(KL, teacher_top_k=VOCAB + 1)
    refused("teacher_top_k=65 must be at most the vocabulary size, 64", make_teacher, loss, cfg, None, None)
    told = "teacher_top_k=65 needs batches with 65 teacher_ids and 66 teacher_logprobs"
    refused(told, _top_k, {"teacher_ids": jnp.zeros((1, 2, 65), jnp.int32)}, loss)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_keep_the_positions_that_count(tmp_path):
    """Position t counts for label t + 1; what is read back stands there, for records that share an id as well."""
    rows = TeacherRows(ArrayCache(tmp_path, {}), 2, "labels", np.dtype("bfloat16"), 80_000)
    records = [Record("same", (("human", "a"), ("gpt", text)), ()) for text in "bcd"]
    row = {"labels": np.array([-100, -100, 7, 8, -100, 9]), "attention_mask": np.array([1, 1, 1, 1, 1, 1])}
    nothing = {"labels": np.full(6, -100), "attention_mask": row["attention_mask"]}
    ids = np.arange(12).reshape(6, 2) + 70_000
    logprobs = -np.arange(18, dtype=np.float32).reshape(6, 3)
    assert not rows.has(rows.keys(records[0]))
    for record, labels, at in zip(records, (row, row, nothing), (ids, ids - 70_000, ids), strict=True):
        rows.cache.add(rows.arrays(record, labels, at, logprobs))
    rows.cache.publish()
    for number, base in ((0, 70_000), (1, 0)):
        found = dict(row)
        rows.fill(found, records[number])
        assert rows.has(rows.keys(records[number]))
        kept = [rows.cache[f"{record_key(records[number])}.{name}"].dtype for name in ("ids", "logprobs")]
        assert kept == [np.int32 if base else np.uint16, rows.dtype]
        assert found["teacher_ids"].tolist() == [[0, 0], [base + 2, base + 3], [base + 4, base + 5], [0, 0],
                                                 [base + 8, base + 9], [0, 0]]  # fmt: skip
        assert found["teacher_logprobs"].dtype == rows.dtype
        assert found["teacher_logprobs"].astype(np.float32).tolist() == [[0] * 3, [-3, -4, -5], [-6, -7, -8], [0] * 3,
                                                                         [-12, -13, -14], [0] * 3]  # fmt: skip
    empty, padding = dict(nothing), dict(nothing)
    rows.fill(empty, records[2])
    rows.fill(padding, None)
    for found in (empty, padding):
        assert not found["teacher_ids"].any()
        assert not found["teacher_logprobs"].any()
    refused("record same: .* has 3 positions, expected 0: remove that folder", rows.fill, dict(nothing), records[0])
    nan = np.full_like(logprobs, np.nan)
    refused("record same: the teacher's logits are not finite", rows.arrays, records[0], row, ids, nan)
    other = Record("same", records[0].turns, (tmp_path / "image.png",))
    refused("has no array for", rows.fill, dict(nothing), other)


def test_a_record_is_known_by_what_it_says_and_shows(tmp_path, monkeypatch):
    """Runs share a cache: from several working directories, with several data sets, after an image was replaced."""
    turns, found = (("human", "a"), ("gpt", "b")), []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "image.png").write_bytes(b"image")
        monkeypatch.chdir(tmp_path / folder)
        found.append(record_key(Record("r", turns, (Path("image.png"),))))
        assert record_key(Record("r", turns, (tmp_path / folder / "image.png",))) == found[-1]
    Path("image.png").write_bytes(b"another one")
    images = [
        StoredImage("image.png", n, SimpleNamespace(identity=lambda name=name: name))
        for n, name in ((0, "one"), (1, "one"), (0, "two"))
    ]
    others = [(turns, (image,)) for image in (Path("image.png"), *images)] + [(turns, ()), (turns[:1], ())]
    found += [record_key(Record("r", *given)) for given in others]
    clip = Record("r", (("human", "<video>?"),), (), videos=(Path("image.png"),))
    found += [record_key(dataclasses.replace(clip, part=part)) for part in (None, (0.0, 1.0), (0.0, 2.0))]
    assert len(set(found)) == 11


def test_padding_is_not_kept_where_all_positions_count(tmp_path):
    """A longer bucket has more of it."""

    def row(real, length):
        return {"labels": np.full(length, 5), "attention_mask": (np.arange(length) < real).astype(np.int32)}

    rows, record = TeacherRows(ArrayCache(tmp_path, {}), 1, "all", np.dtype("float32"), 100), Record("r", (), ())
    logprobs = np.arange(8, dtype=np.float32).reshape(4, 2)
    rows.cache.add(rows.arrays(record, row(3, 4), np.arange(1, 5)[:, None], logprobs))
    rows.cache.publish()
    found = row(3, 6)
    rows.fill(found, record)
    assert found["teacher_ids"].tolist() == [[1], [2], [3], [0], [0], [0]]
    assert found["teacher_logprobs"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 0], [0, 0], [0, 0]]
    refused("record r: .* has 3 positions, expected 2", rows.fill, row(2, 6), record)


@pytest.mark.parametrize(
    ("ids", "logprobs", "told"),
    [
        (np.zeros((4, 2), np.uint16), np.zeros((4, 4)), "the teacher's top 3 tokens"),
        (np.zeros((4, 3), np.uint16), np.zeros((4, 3)), "the teacher's top 3 tokens"),
        (np.zeros((4, 3), np.uint16), np.zeros((3, 4)), "the teacher's top 3 tokens"),
        (np.zeros((4, 3), np.float32), np.zeros((4, 4)), "the teacher's top 3 tokens"),
        (np.zeros((), np.uint16), np.zeros(()), "the teacher's top 3 tokens"),
        (np.array([[0, 1, -1]] * 4), np.zeros((4, 4)), "-1"),
        (np.full((4, 3), 100), np.zeros((4, 4)), "100, but the vocabulary has 0 to 99"),
    ],
)
def test_a_cache_of_something_else(tmp_path, ids, logprobs, told):
    record, rows = Record("r1", (), ()), TeacherRows(ArrayCache(tmp_path, {}), 3, "all", np.dtype("f4"), 100)
    rows.cache.add(dict(zip(rows.keys(record), (ids, logprobs), strict=True)))
    rows.cache.publish()
    row = {"labels": np.full(4, 5), "attention_mask": np.ones(4, np.int32)}
    refused(f"record r1: the cache .* {told}.*: remove that folder", rows.fill, row, record)
