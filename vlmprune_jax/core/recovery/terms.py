"""The class of loss terms and the five built-in terms: functions of logits or hidden states at one position.

A teacher's distribution may be stored as its k likeliest tokens and the total probability of all others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from vlmprune_jax.base.checks import file_of_users, one_of, suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.vocabulary import cross_entropy
from vlmprune_jax.core.prune.criteria.distance import cosine_distance
from vlmprune_jax.core.recovery.config import LossConfig

# Inputs of terms: vocabulary terms get a chunk of positions, [batch, chunk, vocab], terms on hidden states all
# positions, [batch, seq, embed]; all are float32 except the targets.
VOCABULARY = ("logits", "targets", "log_probs", "teacher_logits", "teacher_log_probs")
HIDDEN = ("hidden", "teacher_hidden")
_ABSENT = -1e30  # log-probability of tokens outside the k; finite, so that exp(_ABSENT) * _ABSENT is 0
COUNTS = {"vocabulary": ("labels", "positions"), "hidden": ("tokens", "features")}


@dataclass(frozen=True)
class LossTerm:
    """A training loss term: the mean of `value` over token positions.

    `needs` lists the arguments of `value`, in order:
      "logits", "teacher_logits": float32[batch, chunk, vocab] for the next token.
      "log_probs", "teacher_log_probs": log_softmax of these logits at `losses.temperature`; the term is multiplied by
        the square of the temperature, so that its gradients keep their size (Hinton et al. 2015).
      "targets": int[batch, chunk], the next token; -100 = no label.
      "hidden", "teacher_hidden": float32[batch, seq, embed], hidden states of one layer of `losses.l2_layers`; the term
        is summed over these layers. `value` returns float32[batch, chunk] or [batch, seq]; its gradient must be finite
        at padding as well. `counts` is the denominator of the mean. For terms on logits: "labels" (positions before a
        label) or "positions" (those that `losses.kl_positions` selects). For terms on hidden states: "tokens" (valid
        tokens of every layer) or "features" (tokens times hidden size). `from_top_k` computes `value` from a teacher's
        k likeliest tokens: (float32[batch, chunk, vocab] logits, int[..., k] ids, [..., k + 1] log-probabilities,
        temperature), see `top_k_logprobs`. Terms without it cannot use a cached teacher. `reported`: compute the term
        even if its weight is 0. `label`: name in plots ("" = the name of the term).
    """

    value: Callable[..., jax.Array]
    needs: tuple[str, ...]
    counts: str
    from_top_k: Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array] | None = None
    reported: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        for name in self.needs:
            one_of("loss term: needs", name, (*VOCABULARY, *HIDDEN))
        if not self.needs or len({name in HIDDEN for name in self.needs}) > 1:
            raise UserError(f"loss term: needs={self.needs} must list names of {VOCABULARY}, or of {HIDDEN}")
        one_of("loss term: counts", self.counts, COUNTS["hidden" if self.on_hidden else "vocabulary"])
        if self.reported and self.needs_teacher:
            raise UserError("loss term: reported=True is not allowed for a term that needs a teacher")

    @property
    def on_hidden(self) -> bool:
        """True if the loss term uses hidden states, False if it uses logits."""
        return self.needs[0] in HIDDEN

    @property
    def needs_teacher(self) -> bool:
        """True if the loss term compares the student with a teacher."""
        return any(name.startswith("teacher_") for name in self.needs)

    @property
    def file(self) -> Path | None:
        """Source file of a user's loss term; None for built-in terms."""
        return file_of_users(self.value)

    @property
    def tempered(self) -> bool:
        """True if the loss term uses softmax distributions at the setting `temperature`."""
        return any(name.endswith("log_probs") for name in self.needs)


def divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return the KL divergence KL(p || q), float32[...], of log-probabilities float32[..., vocab]."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def squared_difference(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    """Return the squared distance, float32[...], between states float32[..., embed]."""
    return jnp.sum(jnp.square(ours - theirs), axis=-1)


def top_k_logprobs(logits: jax.Array, temperature: float, k: int) -> tuple[jax.Array, jax.Array]:
    """Return the k most likely token ids int32[..., k], and their log-probabilities float32[..., k + 1].

    The last log-probability is the joint one of all other tokens (-inf without other tokens); probabilities sum to 1.
    """
    logprobs = jax.nn.log_softmax(logits / temperature, axis=-1)
    values, ids = jax.lax.top_k(logprobs, k)
    rest = _log_rest(logprobs, _spread(ids, values, logits.shape[-1]))
    return ids, jnp.concatenate([values, rest[..., None]], axis=-1)


def top_k_divergence(student: jax.Array, ids: jax.Array, logprobs: jax.Array, temperature: float) -> jax.Array:
    """Return KL(teacher || student), float32[...], over the teacher's top k tokens plus all others as one.

    In both distributions, all tokens outside the top k are summed to one token (the "ghost token" of arXiv 2503.16870).
    The result equals the exact KL if there are no other tokens, and is never larger (log-sum inequality). The gradient
    of the ghost token is distributed over the other tokens as in the student. Without the ghost token, or with the top
    k scaled to sum to 1, the student would learn that all other tokens are impossible.

    Args:
      student: logits of the student, float32[..., vocab].
      ids: the teacher's top k token ids, int[..., k].
      logprobs: [..., k + 1] of any precision, see `top_k_logprobs`; normalised again here.
      temperature: temperature of both distributions.
    """
    ours, theirs = jax.nn.log_softmax(student / temperature, axis=-1), logprobs.astype(jnp.float32)
    theirs -= jax.nn.logsumexp(theirs, axis=-1, keepdims=True)
    chosen = _spread(ids, theirs[..., :-1], student.shape[-1])
    # Computed like the KL of two full distributions, which keeps the precision of small differences.
    divergence = jnp.sum(jnp.exp(chosen) * (chosen - ours), axis=-1)
    if ids.shape[-1] == student.shape[-1]:
        return divergence
    rest = theirs[..., -1]
    return divergence + jnp.exp(rest) * (rest - _log_rest(ours, chosen))


def _spread(ids: jax.Array, values: jax.Array, vocab: int) -> jax.Array:
    """Scatter values [..., k] to their token ids: float32[..., vocab], with _ABSENT elsewhere.

    The scatter is batched over positions, so that each device fills its own part of a sharded vocabulary. It carries no
    gradient, whereas gathering the student's k values would need a scatter in the backward pass.
    """
    scatter = functools.reduce(lambda f, _: jax.vmap(f), ids.shape[:-1], lambda row, i, x: row.at[i].set(x))
    return scatter(jnp.full((*ids.shape[:-1], vocab), _ABSENT), ids, values)


def _log_rest(logprobs: jax.Array, chosen: jax.Array) -> jax.Array:
    """Return the log of the summed probability, float32[...], of all tokens that are not in `chosen`."""
    return jax.nn.logsumexp(jnp.where(chosen > _ABSENT, -jnp.inf, logprobs), axis=-1)


# Sources: the reference's trainers (LLaVA `llava_trainer.py`): KL = T^2 sum p_t (log p_t - log p_s) with
# p = softmax(logits / T), reverse KL with the roles swapped, L2 = squared difference of hidden states. Cosine is not in
# the reference.
TERMS: dict[str, LossTerm] = {  # users add theirs, see `losses`
    "ce": LossTerm(cross_entropy, ("logits", "targets"), "labels", reported=True, label="cross-entropy"),
    "l2": LossTerm(squared_difference, HIDDEN, "features", label="hidden-state L2"),
    "cosine": LossTerm(cosine_distance, HIDDEN, "tokens", label="hidden-state cosine"),
    "kl": LossTerm(
        divergence, ("teacher_log_probs", "log_probs"), "positions", from_top_k=top_k_divergence, label="forward KL"
    ),
    "rkl": LossTerm(divergence, ("log_probs", "teacher_log_probs"), "positions", label="reverse KL"),
}


def terms_of(
    loss: LossConfig, *, reported: bool = False, teacher: bool | None = None, hidden: bool | None = None
) -> dict[str, LossTerm]:
    """Return the loss terms with a positive weight and, if `reported`, those that are always reported.

    `teacher`, `hidden`: only terms that need a teacher, or use hidden states (True), or only terms that do not (False).
    """
    weights = loss.weights()
    return {
        name: term
        for name, term in TERMS.items()
        if (weights.get(name) or (reported and term.reported))
        and teacher in (None, term.needs_teacher)
        and hidden in (None, term.on_hidden)
    }


def needs_teacher(loss: LossConfig) -> bool:
    """Return True if the teacher model must run: a weighted term needs it, and its logits are not cached."""
    return not loss.teacher_top_k and bool(terms_of(loss, teacher=True))


def check_losses(loss: LossConfig) -> None:
    """Raise UserError for unknown loss terms, or terms that other settings rule out."""
    for name in loss.weights():
        if name not in TERMS:
            raise UserError(f"recover.losses.extra has no term {name!r}{suggest(name, TERMS)}")
    hidden = " and ".join(terms_of(loss, reported=True, hidden=True))
    if hidden and not loss.l2_layers:
        raise UserError(f"recover.losses: {hidden} needs l2_layers: set it, for example to [-1] (after the final norm)")
    if not loss.teacher_top_k:
        return
    cached = [name for name, term in TERMS.items() if term.from_top_k is not None]
    others = [name for name in terms_of(loss, teacher=True) if name not in cached]
    if others:
        raise UserError(
            f"recover.losses: {' and '.join(others)} cannot be computed from cached top-k logits of a teacher (only "
            f"{' and '.join(cached)} can): set {' and '.join(f'{name}=0' for name in others)}, or train without "
            "teacher_cache"
        )
    if not terms_of(loss).keys() & {*cached}:
        raise UserError(
            f"recover.losses: teacher_top_k={loss.teacher_top_k} needs a term that uses it: set {' and '.join(cached)} "
            "above 0"
        )


def student_layers(loss: LossConfig, cfg: ModelConfig) -> tuple[int, ...]:
    """Return the layer indices in `loss.l2_layers` as non-negative numbers; raise UserError if out of range."""
    n_layers = len(cfg.text.layers)
    for index in loss.l2_layers:
        if not -n_layers - 1 <= index <= n_layers:
            raise UserError(
                f"losses: l2_layers: {index} is outside the student's {n_layers + 1} hidden states (-{n_layers + 1} to "
                f"{n_layers})"
            )
    return tuple(index % (n_layers + 1) for index in loss.l2_layers)


@dataclass(frozen=True)
class Teacher:
    """Distillation teacher of a training run."""

    cfg: ModelConfig

    layers: tuple[int, ...]
    """Index of the hidden state with which each one in `student_layers` is compared."""


def make_teacher(
    loss: LossConfig, student: ModelConfig, teacher: ModelConfig | None, kept: Sequence[int] | None
) -> Teacher | None:
    """Return the teacher that the loss terms need, None if there is none to run.

    The state of a depth-pruned student after its i-th layer is compared with the teacher's state after the original
    layer `kept[i - 1]`. Embeddings are compared with embeddings, and states after the final norm with each other.

    Raises UserError if loss terms are unknown or contradict other settings; the teacher is missing, or its widths,
    vocabulary or image tokens are not the student's; an index of `loss.l2_layers` is outside the student; or layer
    counts differ without a plan that aligns them.
    """
    check_losses(loss)
    if loss.teacher_top_k > student.text.vocab_size:
        raise UserError(
            f"losses: teacher_top_k={loss.teacher_top_k} must be at most the vocabulary size, {student.text.vocab_size}"
        )
    if not needs_teacher(loss):
        return None
    if teacher is None:
        names = " and ".join(terms_of(loss, teacher=True))
        raise UserError(f"losses: {names} needs a teacher: pass the unpruned model, or set the weight to 0")
    _check_teacher(loss, student, teacher)
    n_student, n_teacher = len(student.text.layers), len(teacher.text.layers)
    if kept is not None and (len(kept) != n_student or max(kept) >= n_teacher):
        raise UserError(
            f"recover: the plan keeps {len(kept)} layers (up to {max(kept)}) but the student has {n_student} and the "
            f"teacher {n_teacher}: pass the plan that this student was pruned with"
        )
    layers = list[int]()
    for index, i in zip(loss.l2_layers, student_layers(loss, student), strict=True):
        if loss.reference_compat:
            layers.append(index % (n_teacher + 1) if index < 0 else index)
        elif i in (0, n_student):
            layers.append(0 if i == 0 else n_teacher)
        elif kept is None and n_student != n_teacher:
            raise UserError(f"losses: l2_layers: {index} cannot be aligned without a plan: pass plan, or use -1")
        else:
            layers.append(i if kept is None else kept[i - 1] + 1)
    return Teacher(teacher, tuple(layers))


def _check_teacher(loss: LossConfig, student: ModelConfig, teacher: ModelConfig) -> None:
    uses_inputs, remedy = loss.teacher_inputs == "own", "pass the unpruned model"
    facts: dict[str, tuple[object, object, str]] = {}
    facts["hidden_size"] = student.text.hidden_size, teacher.text.hidden_size, remedy
    if uses_inputs or terms_of(loss, teacher=True, hidden=False):
        other = f'{remedy}, or use only terms on hidden states with teacher_inputs="student"'
        facts["vocab_size"] = student.text.vocab_size, teacher.text.vocab_size, other
    if uses_inputs:
        other = f'{remedy}, or use teacher_inputs="student"'
        facts["image_token_id"] = student.image_token_id, teacher.image_token_id, other
        facts["tokens per image"] = student.tokens_per_image, teacher.tokens_per_image, other
    for name, (ours, theirs, advice) in facts.items():
        if ours != theirs:
            raise UserError(f"teacher: {name} {theirs} differs from the student's {ours}: {advice}")
