"""Training losses as (sum, weight) pairs over the terms of `losses`, which a file of the user may extend.

Vocabulary terms are computed in chunks of positions, so that no array of shape [batch, seq, vocab] exists.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlmprune_jax.base.checks import blaming
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import IGNORED, ModelConfig
from vlmprune_jax.core.mesh.mesh import mesh_of, use_mesh
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.inputs import check_batch
from vlmprune_jax.core.models.vlm import ENCODED, Model, Params, encode, head_of, to_nnx
from vlmprune_jax.core.models.vocabulary import Head, chunk_sums
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.core.recovery.config import LossConfig, RecoverConfig
from vlmprune_jax.core.recovery.terms import TERMS, LossTerm, Teacher, make_teacher, student_layers, terms_of


class LossTerms(UserDict[str, LossTerm]):
    """Mapping of loss terms; `vp.losses["mine"] = vp.LossTerm(...)` adds a term; calling it evaluates all terms."""

    def __setitem__(self, name: str, term: LossTerm) -> None:
        if not isinstance(term, LossTerm) or not name.isidentifier():
            raise UserError(f"losses: {name!r} must be a Python identifier and its value a LossTerm, got {term!r}")
        super().__setitem__(name, term)

    def __call__(
        self,
        model: Model,
        batch: Any,
        config: LossConfig | RecoverConfig,
        *,
        teacher: Model | None = None,
        plan: PrunePlan | None = None,
    ) -> dict[str, float]:
        """Return the mean of each loss term over one batch (without dropout), and their weighted sum "total".

        Args:
          model: the student, with or without adapters.
          batch: a mapping of arrays, or an object with the attribute `arrays`: input_ids, attention_mask and labels,
            int[batch, seq] (labels are not shifted; -100 = no label), and optionally "media" or a processor's arrays.
          config: weights of the terms; a `RecoverConfig` also sets the precision (default: the model's own).
          teacher, plan: see `recover`.

        Raises UserError for terms that need a missing teacher or label, or a teacher or batch that does not match the
        model.
        """
        loss, dtype = (config.losses, config.compute_dtype) if isinstance(config, RecoverConfig) else (config, None)
        theirs = None if teacher is None else teacher.cfg
        taught = make_teacher(loss, model.cfg, theirs, getattr(plan, "kept_layers", None))
        host = getattr(batch, "arrays", batch)
        missing = [name for name in ("input_ids", "attention_mask", "labels") if name not in host]
        if missing:
            raise UserError(f"losses: the batch has no {', '.join(missing)}: add the array")
        arrays = jax.tree.map(jnp.asarray, check_batch(model.cfg, host))
        params = None if teacher is None or taught is None else teacher.params
        with use_mesh(mesh_of(model.params)):
            values = _means(model.params, model.cfg, arrays, loss, taught, params, dtype, tuple(self.items()))
        return {name: float(values[name]) for name in (*terms_of(loss, reported=True), "total")}


losses = LossTerms()
losses.data = TERMS


def term_weights(loss: LossConfig, cfg: ModelConfig, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Return the denominator of each loss term, float32[], from labels and mask int[..., batch, seq].

    The denominators cover all micro-batches, so that gradients of the micro-batches can be added without rescaling.
    """
    n_labels = jnp.sum(labels[..., 1:] != IGNORED, dtype=jnp.float32)
    n_valid = jnp.float32(mask.size) if loss.reference_compat else jnp.sum(mask, dtype=jnp.float32)
    rows = jnp.float32(mask.size // mask.shape[-1])
    places = rows if loss.reference_compat else n_labels if loss.kl_positions == "labels" else n_valid
    tokens = n_valid * float(len(loss.l2_layers))
    every = {
        "labels": n_labels,
        "positions": places,
        "tokens": tokens,
        "features": tokens * float(cfg.text.hidden_size),
    }
    return {name: every[term.counts] for name, term in terms_of(loss, reported=True).items()}


def loss_sums(
    params: Params,
    cfg: ModelConfig,
    batch: dict[str, Any],
    loss: LossConfig,
    *,
    teacher: Teacher | None,
    teacher_params: Params | None,
    remat: str,
    dropout_key: jax.Array | None,
) -> dict[str, jax.Array]:
    """Return the sum of each loss term over one micro-batch, float32[].

    The batch holds `input_ids`, `attention_mask`, `labels` and optionally "media" (`models.media.Media`). With
    `loss.teacher_top_k` it also holds `teacher_ids` and `teacher_logprobs` (see `data.cached_arrays`).
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    inputs: dict[str, Any] = {name: batch.get(name) for name in ENCODED} | {"remat": remat}
    embeds: dict[str, Any] = {}
    if loss.reference_compat and inputs["position_ids"] is None:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        inputs["position_ids"] = positions * mask if loss.teacher_inputs == "own" else positions
        if loss.teacher_inputs != "own":
            x, layer_embeds = to_nnx(Model(params, cfg)).embed(ids, inputs["media"])
            embeds = {"inputs_embeds": x * mask[..., None].astype(x.dtype), "layer_embeds": layer_embeds}
    hidden = terms_of(loss, reported=True, hidden=True)
    states = student_layers(loss, cfg) if hidden else ()
    final, aux = encode(params, cfg, ids, states=states, dropout_key=dropout_key, **inputs, **embeds)
    sums: dict[str, Any] = {}
    target, teacher_head = None, None
    taught: Sequence[jax.Array | None] = (None,) * len(states)
    if teacher is not None and teacher_params is not None:
        shared = ("inputs_embeds", "layer_embeds") if loss.teacher_inputs == "student" else ()
        inputs |= {name: aux[name] for name in shared}
        target, seen = encode(teacher_params, teacher.cfg, ids, states=teacher.layers if hidden else (), **inputs)
        target, taught = jax.lax.stop_gradient((target, seen.get("states", ())))
        if terms_of(loss, teacher=True, hidden=False):
            teacher_head = gathered_head(jax.lax.stop_gradient(teacher_params), teacher.cfg)
    for name, term in hidden.items():
        sums[name] = 0
        for ours, theirs in zip(aux["states"], taught, strict=True):
            arguments = [{"hidden": ours, "teacher_hidden": theirs}[need] for need in term.needs]
            values = _at_positions(name, term.value, [x.astype(jnp.float32) for x in arguments], mask)
            sums[name] += jnp.sum(values if loss.reference_compat else values * mask.astype(jnp.float32))
    top = _top_k(batch, loss) if loss.teacher_top_k else None
    sums |= vocabulary_sums(final, gathered_head(params, cfg), batch["labels"], mask, loss, target, teacher_head, top)
    return {name: sums[name] for name in terms_of(loss, reported=True)}


def _top_k(batch: dict[str, jax.Array], loss: LossConfig) -> dict[str, jax.Array]:
    """Return the teacher's cached top-k outputs in a batch."""
    k = loss.teacher_top_k
    top = {name: batch[f"teacher_{name}"] for name in ("ids", "logprobs") if f"teacher_{name}" in batch}
    if {name: array.shape[-1] for name, array in top.items()} != {"ids": k, "logprobs": k + 1}:
        raise UserError(
            f"losses: teacher_top_k={k} needs batches with {k} teacher_ids and {k + 1} teacher_logprobs per position"
        )
    return top


def gathered_head(params: Params, cfg: ModelConfig) -> Head:
    """Return the output head with its matrix gathered to all devices, once for all chunks of logits.

    Gathering it in every chunk cost 3.9 GiB of traffic instead of 0.5 in a 7B step of 8 chunks on 64 chips.
    """
    head = head_of(params, cfg)
    return dataclasses.replace(head, weight=constrain(head.weight, ("vocab", None)))


def vocabulary_sums(
    hidden: jax.Array,
    head: Head,
    labels: jax.Array,
    mask: jax.Array,
    loss: LossConfig,
    teacher_hidden: jax.Array | None,
    teacher_head: Head | None,
    top: dict[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """Return the sums, float32[], of the loss terms that use logits.

    Position t is compared with label t + 1 and, with a teacher head, with the teacher's logits at t.

    `hidden`: states after the final norm, [batch, seq, embed]. `top`: the teacher's likeliest tokens, used instead of a
    teacher: ids int[batch, seq, k] and logprobs [batch, seq, k + 1]. Logits are computed for one chunk of the needed
    positions at a time, and again for the gradient, so that the largest array has the shape [batch, chunk, vocab].
    """
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    weigh = jnp.ones_like(mask) if loss.reference_compat else mask
    if loss.kl_positions == "labels":
        weigh = (targets != IGNORED).astype(mask.dtype)
    cached = top is not None
    alone = teacher_head is None and not cached
    terms = terms_of(loss, reported=True, teacher=False if alone else None, hidden=False)
    counted = targets != IGNORED
    if any(term.counts == "positions" for term in terms.values()):
        counted |= weigh > 0
    xs: dict[str, Any] = {"y": targets, "w": weigh, **(top or {})}
    if teacher_head is not None and teacher_hidden is not None:
        xs["t"] = teacher_hidden

    def body(
        head: Head, states: jax.Array, counted: jax.Array, x: dict[str, jax.Array], teacher_head: Head | None
    ) -> dict[str, jax.Array]:
        x = {**x, "y": jnp.where(counted, x["y"], IGNORED)}  # padding of the last chunk has no label
        inputs = {"logits": head(states), "targets": x["y"]}
        if teacher_head is not None:
            inputs["teacher_logits"] = teacher_head(x["t"])
        if any(term.tempered and not (term.needs_teacher and cached) for term in terms.values()):
            for name in [name for name in inputs if name.endswith("logits")]:
                logprobs = jax.nn.log_softmax(inputs[name] / loss.temperature, axis=-1)
                inputs[name.replace("logits", "log_probs")] = logprobs
        weight, sums = x["w"].astype(jnp.float32), {}
        for name, term in terms.items():
            function: Callable[..., jax.Array] = term.value
            arguments: list[Any] = [inputs.get(need) for need in term.needs]
            if term.needs_teacher and cached and term.from_top_k is not None:
                function = term.from_top_k
                arguments = [inputs["logits"], x["ids"], x["logprobs"], loss.temperature]
            values = _at_positions(name, function, arguments, weight)
            total = jnp.sum(jnp.where(x["y"] == IGNORED, 0.0, values) if term.counts == "labels" else values * weight)
            sums[name] = loss.temperature**2 * total if term.tempered else total
        return sums

    return chunk_sums(body, loss.chunk, head, hidden, counted, xs, teacher_head)


def _at_positions(
    name: str, function: Callable[..., jax.Array], inputs: Sequence[Any], positions: jax.Array
) -> jax.Array:
    """Call `function(*inputs)`; raise UserError unless it returns one number per position [batch, seq]."""
    with blaming(f"loss term {name!r}", function):
        values = function(*inputs)
    if getattr(values, "shape", None) != positions.shape or jnp.iscomplexobj(values):
        output = f"{values.dtype}{list(values.shape)}" if isinstance(values, jax.Array) else repr(values)
        expected = f"a real number for each position, {list(positions.shape)}"
        raise UserError(
            f"loss term {name!r}: its function returned {output}, expected {expected}: correct the function"
        )
    return values


def combine(sums: dict[str, jax.Array], weights: dict[str, jax.Array], loss: LossConfig) -> jax.Array:
    """Return the total loss: each term is its coefficient times its mean over tokens (0 without tokens)."""
    coefficients = loss.weights()
    total = jnp.float32(0)
    for name, value in sums.items():
        if coefficients.get(name):
            total += coefficients[name] * value / jnp.maximum(weights[name], 1.0)
    return total


@functools.partial(jax.jit, static_argnames=("cfg", "loss", "teacher", "dtype", "terms"))
def _means(
    params: Params,
    cfg: ModelConfig,
    batch: dict[str, Any],
    loss: LossConfig,
    teacher: Teacher | None,
    teacher_params: Params | None,
    dtype: str | None,
    terms: tuple[tuple[str, LossTerm], ...],
) -> dict[str, jax.Array]:
    del terms  # part of the cache key: replacing a term compiles again
    if dtype is not None:
        params, teacher_params = jax.tree.map(lambda x: x.astype(dtype), (params, teacher_params))
    weights = term_weights(loss, cfg, batch["labels"], batch["attention_mask"])
    sums = loss_sums(
        params, cfg, batch, loss, teacher=teacher, teacher_params=teacher_params, remat="none", dropout_key=None
    )
    means = {name: value / jnp.maximum(weights[name], 1.0) for name, value in sums.items()}
    return {**means, "total": combine(sums, weights, loss)}
