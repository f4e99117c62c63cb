"""What a loss term is, and the five that are always there: functions of one position's logits or hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from vlmprune_jax.core.checks import file_of_users, one_of
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.models.vocabulary import cross_entropy
from vlmprune_jax.recovery.top_k import top_k_divergence

# What a term may ask for. Vocabulary terms see a chunk of positions, [batch, chunk, vocab], terms on hidden states all
# of them, [batch, seq, embed]; everything is float32 but the targets.
VOCABULARY = ("logits", "targets", "log_probs", "teacher_logits", "teacher_log_probs")
HIDDEN = ("hidden", "teacher_hidden")
COUNTS = {"vocabulary": ("labels", "positions"), "hidden": ("tokens", "features")}


@dataclass(frozen=True)
class LossTerm:
    """One term of the loss: the mean over positions of `value`.

    `needs` names what `value` takes, in this order:
      "logits", "teacher_logits": float32[batch, chunk, vocab] for the next token.
      "log_probs", "teacher_log_probs": log_softmax of these at `losses.temperature`; a term of them is multiplied by
        the temperature's square, so that its gradients keep their size (Hinton et al. 2015).
      "targets": int[batch, chunk], the next token, -100 where none is to be learnt.
      "hidden", "teacher_hidden": float32[batch, seq, embed], the states of one layer of `losses.l2_layers`; the term is
        summed over these layers.
    `value` returns float32[batch, chunk] or [batch, seq], and must have a finite gradient at padding, too.
    `counts` says over what the mean goes: "labels" (positions before a label) or "positions" (those of
    `losses.kl_positions`) of vocabulary terms; "tokens" (real tokens of every layer) or "features" (numbers of their
    states) of terms on hidden states.
    `from_top_k` is `value` from a teacher's k likeliest tokens instead: (float32[batch, chunk, vocab] logits, int[...,
    k] ids, [..., k + 1] log-probabilities, temperature), see `top_k`; without it a cached teacher cannot serve it.
    `reported`: it is measured even where its weight is 0. `label` is what plots call it ("": its name).
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
            raise UserError(f"loss term: needs={self.needs} must be of {VOCABULARY}, or of {HIDDEN}")
        one_of("loss term: counts", self.counts, COUNTS["hidden" if self.on_hidden else "vocabulary"])
        if self.reported and self.needs_teacher:
            raise UserError("loss term: one that needs a teacher cannot be reported where none is asked for")

    @property
    def on_hidden(self) -> bool:
        """Whether it is about hidden states, not about logits."""
        return self.needs[0] in HIDDEN

    @property
    def needs_teacher(self) -> bool:
        """Whether it needs a teacher."""
        return any(name.startswith("teacher_") for name in self.needs)

    @property
    def file(self) -> Path | None:
        """The file of a term that is not this package's own: what it gives changes with that file."""
        return file_of_users(self.value)

    @property
    def tempered(self) -> bool:
        """Whether it is about distributions at the temperature."""
        return any(name.endswith("log_probs") for name in self.needs)


def divergence(of: jax.Array, to: jax.Array) -> jax.Array:
    """float32[...] KL(of || to) of float32[..., vocab] log-probabilities."""
    return jnp.sum(jnp.exp(of) * (of - to), axis=-1)


def squared_difference(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    """float32[...] of float32[..., embed] states."""
    return jnp.sum(jnp.square(ours - theirs), axis=-1)


def cosine_distance(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    """float32[...] 1 - cos; finite, as its gradient, for states that are all zero."""
    return 1.0 - optax.cosine_similarity(ours, theirs, epsilon=1e-16)


# Sources: the reference's trainers (LLaVA `llava_trainer.py`): KL = T^2 sum p_t (log p_t - log p_s) with
# p = softmax(logits / T), reverse KL with the roles swapped, L2 = squared difference of hidden states. Cosine is not in
# the reference.
BUILT_IN = {
    "ce": LossTerm(cross_entropy, ("logits", "targets"), "labels", reported=True, label="cross-entropy"),
    "l2": LossTerm(squared_difference, HIDDEN, "features", label="hidden-state L2"),
    "cosine": LossTerm(cosine_distance, HIDDEN, "tokens", label="hidden-state cosine"),
    "kl": LossTerm(
        divergence, ("teacher_log_probs", "log_probs"), "positions", from_top_k=top_k_divergence, label="forward KL"
    ),
    "rkl": LossTerm(divergence, ("log_probs", "teacher_log_probs"), "positions", label="reverse KL"),
}
