"""Training losses as (sum, weight) pairs: cross-entropy, forward and reverse KL, hidden-state L2 and cosine.

Vocabulary losses are computed in chunks of the sequence, so that no [batch, seq, vocab] array exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlmprune_jax.checks import one_of
from vlmprune_jax.config import ModelConfig
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.errors import UserError
from vlmprune_jax.models.decoder import head_logits
from vlmprune_jax.models.vlm import Model, Params, encode, to_nnx
from vlmprune_jax.recovery.top_k import top_k_divergence

IGNORED = -100
TEACHER_INPUTS = ("student", "own")
KL_POSITIONS = ("all", "labels")
STRATEGIES = ("kl", "rkl", "l2", "l2+kl", "l2+rkl")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms, and how they are measured.

    `l2_layers` index the student's hidden-state tuple (0 embeddings, -1 after the final norm); `l2` and `cosine`
    compare these states. `teacher_inputs`: "student" feeds the teacher the student's input embeddings (the
    reference), "own" its own from ids and pixels. `chunk`: tokens per row whose logits exist at a time.
    `kl_positions`: where `kl` and `rkl` are measured, at "all" real tokens (the reference) or those before "labels".
    `teacher_top_k`: no teacher runs, batches bring its k likeliest tokens of each of these positions (0 = it runs).

    `reference_compat` measures as the reference does: terms with a teacher over all positions, padding (at the right)
    included, KL divided by the batch size only, and hidden layers index each model's own tuple. Padding is zero
    embeddings in LLaVA's and Bunny's trainers ("student"), its ids at position 0 in InternVL's ("own").
    """

    ce: float = 1.0
    l2: float = 0.0
    kl: float = 0.0
    rkl: float = 0.0
    l2_layers: tuple[int, ...] = (-1,)
    temperature: float = 2.0
    teacher_inputs: str = "student"
    reference_compat: bool = False
    chunk: int = 128
    cosine: float = 0.0
    kl_positions: str = "all"
    teacher_top_k: int = 0

    def __post_init__(self) -> None:
        weights = self.weights()
        if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
            raise UserError(f"loss weights {weights}: none may be negative and at least one must be positive")
        if not 0 < self.temperature < math.inf or self.chunk < 1:
            raise UserError(f"losses: temperature {self.temperature} and chunk {self.chunk} must be positive")
        if self.compares_hidden and not self.l2_layers:
            raise UserError("losses: l2 and cosine need l2_layers, for example [-1] (the state after the final norm)")
        one_of("losses: teacher_inputs", self.teacher_inputs, TEACHER_INPUTS)
        one_of("losses: kl_positions", self.kl_positions, KL_POSITIONS)
        if self.reference_compat and self.kl_positions != "all":
            raise UserError('losses: reference_compat measures kl at all positions: leave kl_positions "all"')
        if self.teacher_top_k:
            self._check_top_k()

    def _check_top_k(self) -> None:
        whole = [name for name in ("rkl", "l2", "cosine") if self.weights()[name]]
        if whole:
            raise UserError(
                f"losses: {' and '.join(whole)} cannot be had from a teacher's cached top-k logits, only kl can: set "
                f"{' and '.join(f'{name}=0' for name in whole)}, or train without teacher_cache"
            )
        if not self.kl or self.teacher_top_k < 0:
            raise UserError(f"losses: teacher_top_k {self.teacher_top_k} must be positive, and is for kl > 0")
        if self.teacher_inputs != "own" or self.reference_compat:
            raise UserError(
                "losses: a cached teacher saw its own embeddings of real tokens, not the student's of this step nor "
                'padding: set teacher_inputs="own" and reference_compat=False, or train without teacher_cache'
            )

    def weights(self) -> dict[str, float]:
        """Weight of every term in the total."""
        return {"ce": self.ce, "l2": self.l2, "cosine": self.cosine, "kl": self.kl, "rkl": self.rkl}

    def terms(self) -> tuple[str, ...]:
        """Names of the terms that are computed: cross-entropy always (it is reported), others where they count."""
        return tuple(name for name, weight in self.weights().items() if weight or name == "ce")

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher runs beside the student: any distillation term counts, and it is not cached."""
        return bool(self.compares_hidden or self.kl or self.rkl) and not self.teacher_top_k

    @property
    def compares_hidden(self) -> bool:
        """Whether a term on hidden states counts."""
        return bool(self.l2 or self.cosine)


def from_alpha(strategy: str, alpha: float, *, kl_norm: float = 1.0, **options: Any) -> LossConfig:
    """The reference's `dist_strategy`/`dist_alpha`/`dist_norm`: alpha * distillation + (1 - alpha) * cross-entropy."""
    one_of("distillation strategy", strategy, STRATEGIES)
    if not 0 <= alpha <= 1 or kl_norm <= 0:
        raise UserError(f"distillation: alpha {alpha} must lie in [0, 1] and norm {kl_norm} be positive")
    parts = strategy.split("+")
    weights: dict[str, Any] = {name: alpha / (1.0 if name == "l2" else kl_norm) for name in parts}
    return LossConfig(ce=1 - alpha, **weights, **options)


def layer_pairs(
    loss: LossConfig, student: ModelConfig, teacher: ModelConfig, kept: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Hidden-state indices (student's, teacher's) of `loss.l2_layers`, all counted from 0.

    A depth-pruned student's state after its i-th layer is compared with the teacher's state after the original layer
    `kept[i - 1]`; embeddings with embeddings, the final-norm state with the final-norm state.

    Raises:
      UserError: an index outside the student, or layer counts that differ without a plan to align them.
    """
    n_student, n_teacher = len(student.text.layers), len(teacher.text.layers)
    if kept is not None and (len(kept) != n_student or max(kept) >= n_teacher):
        raise UserError(
            f"the plan keeps {len(kept)} layers (up to {max(kept)}) but the student has {n_student} and the teacher "
            f"{n_teacher}: pass the plan that made this student from this teacher"
        )
    ours, theirs = [], []
    for index in loss.l2_layers:
        if not -n_student - 1 <= index <= n_student:
            raise UserError(f"losses: l2 layer {index} is outside the student's {n_student + 1} hidden states")
        i = index % (n_student + 1)
        ours.append(i)
        if loss.reference_compat:
            theirs.append(index % (n_teacher + 1) if index < 0 else index)
        elif i in (0, n_student):
            theirs.append(0 if i == 0 else n_teacher)
        elif kept is None and n_student != n_teacher:
            raise UserError(f"losses: l2 layer {index} cannot be aligned without a plan: pass plan, or use layer -1")
        else:
            theirs.append(i if kept is None else kept[i - 1] + 1)
    return tuple(ours), tuple(theirs)


def check_teacher(loss: LossConfig, student: ModelConfig, teacher: ModelConfig | None) -> None:
    """Refuse a teacher that is missing or does not fit.

    Raises:
      UserError: names both sizes.
    """
    if loss.teacher_top_k > student.text.vocab_size:
        raise UserError(
            f"losses: teacher_top_k {loss.teacher_top_k} is more than the vocabulary's {student.text.vocab_size} tokens"
        )
    if not loss.needs_teacher:
        return
    if teacher is None:
        raise UserError(
            "losses: l2, cosine, kl and rkl need a teacher: pass the unpruned model, or set their weights to 0"
        )
    ours, theirs = student.text, teacher.text
    if ours.hidden_size != theirs.hidden_size:
        raise UserError(f"teacher hidden_size {theirs.hidden_size} is not the student's {ours.hidden_size}")
    own = loss.teacher_inputs == "own"
    if (loss.kl or loss.rkl or own) and ours.vocab_size != theirs.vocab_size:
        raise UserError(
            f"teacher vocab_size {theirs.vocab_size} is not the student's {ours.vocab_size}: pass the model that was "
            'pruned, or distil with l2 or cosine and teacher_inputs "student"'
        )
    if own and (student.image_token_id, student.tokens_per_image) != (teacher.image_token_id, teacher.tokens_per_image):
        raise UserError(
            f"teacher images are {teacher.tokens_per_image} tokens of id {teacher.image_token_id}, the student's "
            f"{student.tokens_per_image} of {student.image_token_id}: pass the model that was pruned, or use "
            'teacher_inputs "student"'
        )


def term_weights(loss: LossConfig, cfg: ModelConfig, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """float32[] weight of every term over int[..., batch, seq] labels and mask; known before any forward pass.

    Knowing the totals first makes gradients of micro-batches simply additive.
    """
    n_labels = jnp.sum(labels[..., 1:] != IGNORED, dtype=jnp.float32)
    n_valid = jnp.float32(mask.size) if loss.reference_compat else jnp.sum(mask, dtype=jnp.float32)
    rows = jnp.float32(mask.size // mask.shape[-1])
    kl = rows if loss.reference_compat else n_labels if loss.kl_positions == "labels" else n_valid
    cosine = n_valid * float(len(loss.l2_layers))
    every = {"ce": n_labels, "l2": cosine * float(cfg.text.hidden_size), "cosine": cosine, "kl": kl, "rkl": kl}
    return {name: every[name] for name in loss.terms()}


@dataclass(frozen=True)
class Teacher:
    """What distillation needs beside the student: the teacher's config and the aligned hidden-state indices."""

    cfg: ModelConfig
    student_layers: tuple[int, ...]
    teacher_layers: tuple[int, ...]


def loss_sums(
    params: Params,
    cfg: ModelConfig,
    batch: dict[str, jax.Array],
    loss: LossConfig,
    *,
    teacher: Teacher | None,
    teacher_params: Params | None,
    remat: str,
    dropout_key: jax.Array | None,
) -> dict[str, jax.Array]:
    """float32[] sum of every term over one (micro-)batch of `input_ids, attention_mask, labels` and perhaps images:
    `pixel_values`, or `vision_features` for models without their tower.

    With `loss.teacher_top_k` it has `teacher_ids` and `teacher_logprobs` as well (see `data.teacher.TeacherRows`).

    Sources: the reference's trainers (LLaVA `llava_trainer.py`): KL = T^2 sum p_t (log p_t - log p_s) with
    p = softmax(logits / T), reverse KL with the roles swapped, L2 = squared difference of hidden states. Cosine =
    1 - cos of two hidden states (not in the reference).
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    images: dict[str, Any] = {name: batch.get(name) for name in ("pixel_values", "vision_features")}
    embeds, positions = None, None
    if loss.reference_compat:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        if loss.teacher_inputs == "own":
            positions = positions * mask
        else:
            embeds, _ = to_nnx(Model(params, cfg)).embed(ids, **images)
            embeds = embeds * mask[..., None].astype(embeds.dtype)
    states = teacher.student_layers if teacher is not None and loss.compares_hidden else ()
    inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "remat": remat}
    final, aux = encode(
        params, cfg, ids, **images, inputs_embeds=embeds, states=states, dropout_key=dropout_key, **inputs
    )
    sums: dict[str, Any] = {}
    target, teacher_logits = None, None
    if teacher is not None and teacher_params is not None:
        shared = aux["inputs_embeds"] if loss.teacher_inputs == "student" else None
        states = teacher.teacher_layers if loss.compares_hidden else ()
        target, taught = encode(
            teacher_params, teacher.cfg, ids, **images, inputs_embeds=shared, states=states, **inputs
        )
        target, taught = jax.lax.stop_gradient((target, taught.get("states", ())))
        for name in (term for term in loss.terms() if term in HIDDEN_DISTANCES):
            sums[name] = sum(_distance(name, a, b, mask, loss) for a, b in zip(aux["states"], taught, strict=True))
        if loss.kl or loss.rkl:
            teacher_logits = head_of(jax.lax.stop_gradient(teacher_params), teacher.cfg)
    top = _top_k(batch, loss) if loss.teacher_top_k else None
    sums |= vocabulary_sums(final, head_of(params, cfg), batch["labels"], mask, loss, target, teacher_logits, top)
    return {name: sums[name] for name in loss.terms()}


def _top_k(batch: dict[str, jax.Array], loss: LossConfig) -> dict[str, jax.Array]:
    """The teacher's part of a batch."""
    top, k = {name: batch.get(f"teacher_{name}") for name in ("ids", "logprobs")}, loss.teacher_top_k
    widths = {name: None if array is None else array.shape[-1] for name, array in top.items()}
    if widths != {"ids": k, "logprobs": k + 1}:
        raise UserError(f"losses: teacher_top_k={k} needs batches with {k} teacher_ids and {k + 1} teacher_logprobs")
    return top  # type: ignore[return-value]


def head_of(params: Params, cfg: ModelConfig) -> Callable[[jax.Array], jax.Array]:
    """Float32 logits of final-norm states. The matrix is gathered here, once, and not again in every chunk: over 64
    chips a 7B step in 8 chunks, forward and backward, received 3.9 GiB for it instead of 0.5.
    """
    table = params["text"]["embed_tokens" if cfg.text.tie_embeddings else "lm_head"]
    weight = constrain(table["weight"], ("vocab", None))
    return lambda hidden: head_logits(hidden, weight, table.get("bias")).astype(jnp.float32)


# Of float32[..., embed] pairs -> [...]. Both are finite, and so are their gradients, for states that are all zero.
HIDDEN_DISTANCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "l2": lambda a, b: jnp.sum(jnp.square(a - b), axis=-1),
    "cosine": lambda a, b: 1.0 - optax.cosine_similarity(a, b, epsilon=1e-16),
}


def _distance(name: str, a: jax.Array, b: jax.Array, mask: jax.Array, loss: LossConfig) -> jax.Array:
    """float32[] sum of a term of HIDDEN_DISTANCES over all positions, or the valid ones."""
    distance = HIDDEN_DISTANCES[name](a.astype(jnp.float32), b.astype(jnp.float32))
    return jnp.sum(distance if loss.reference_compat else distance * mask.astype(jnp.float32))


def vocabulary_sums(
    hidden: jax.Array,
    head: Callable[[jax.Array], jax.Array],
    labels: jax.Array,
    mask: jax.Array,
    loss: LossConfig,
    teacher_hidden: jax.Array | None,
    teacher_head: Callable[[jax.Array], jax.Array] | None,
    top: dict[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """float32[] sums of cross-entropy (position t against label t + 1) and, with a teacher head, KL and reverse KL.

    `head` maps final-norm states [..., embed] to float32 logits. `top`: instead of a teacher its likeliest tokens, ids
    int[batch, seq, k] and logprobs [batch, seq, k + 1]. The sequence is cut into chunks whose logits are recomputed in
    the backward pass: the largest array is [batch, chunk, vocab].
    """
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    weigh = jnp.ones_like(mask) if loss.reference_compat else mask
    if loss.kl_positions == "labels":
        weigh = (targets != IGNORED).astype(mask.dtype)
    xs: dict[str, Any] = {"h": hidden, "w": weigh, **(top or {})}
    if teacher_head is not None and teacher_hidden is not None:
        xs["t"] = teacher_hidden
    xs = {name: chunks(x, loss.chunk, 0) for name, x in xs.items()} | {"y": chunks(targets, loss.chunk, IGNORED)}

    @jax.checkpoint
    def body(totals: dict[str, jax.Array], x: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], None]:
        logits = head(x["h"])
        new = {"ce": jnp.sum(_cross_entropy(logits, x["y"]))}
        weight = x["w"].astype(jnp.float32)
        if teacher_head is not None:
            new |= _divergences(logits, teacher_head(x["t"]), weight, loss)
        if top is not None:
            divergence = top_k_divergence(logits, x["ids"], x["logprobs"], loss.temperature)
            new["kl"] = loss.temperature**2 * jnp.sum(divergence * weight)
        return {name: totals[name] + new[name] for name in totals}, None

    has_teacher = teacher_head is not None or top is not None
    names = tuple(n for n in loss.terms() if n not in HIDDEN_DISTANCES) if has_teacher else ("ce",)
    return jax.lax.scan(body, {name: jnp.float32(0) for name in names}, xs)[0]


def chunks(x: jax.Array, size: int, fill: int) -> jax.Array:
    """[batch, seq, ...] -> [n, batch, chunk, ...]: at least two chunks of at most `size`; `fill` fills up the last."""
    batch, seq = x.shape[:2]
    size = min(size, -(-seq // 2))
    x = jnp.pad(x, ((0, 0), (0, -seq % size)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """float32[...] negative log-probability of int[...] targets, 0 where ignored.

    The target is picked with a mask instead of a gather, so that a vocabulary split over devices stays split; times the
    mask, not by a select, whose zeros XLA would keep in memory as an array of the logits' size.
    """
    hit = jnp.arange(logits.shape[-1]).reshape((1,) * targets.ndim + (-1,)) == targets[..., None]
    picked = jnp.sum(logits * hit.astype(logits.dtype), axis=-1)
    return jnp.where(targets == IGNORED, 0.0, jax.nn.logsumexp(logits, axis=-1) - picked)


def _divergences(student: jax.Array, teacher: jax.Array, weight: jax.Array, loss: LossConfig) -> dict[str, jax.Array]:
    """float32[] T^2-scaled sums of KL(teacher || student) and KL(student || teacher), weighted per position."""
    ours, theirs = (jax.nn.log_softmax(x / loss.temperature, axis=-1) for x in (student, teacher))
    scale = loss.temperature**2
    sums = {}
    if loss.kl:
        sums["kl"] = scale * jnp.sum(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1) * weight)
    if loss.rkl:
        sums["rkl"] = scale * jnp.sum(jnp.sum(jnp.exp(ours) * (ours - theirs), axis=-1) * weight)
    return sums


def combine(sums: dict[str, jax.Array], weights: dict[str, jax.Array], loss: LossConfig) -> jax.Array:
    """float32[] total = sum over terms of coefficient * sum / weight; a term without any weight (no labels) adds 0."""
    coefficients = loss.weights()
    total = jnp.float32(0)
    for name, value in sums.items():
        if coefficients[name]:
            total += coefficients[name] * value / jnp.maximum(weights[name], 1.0)
    return total
