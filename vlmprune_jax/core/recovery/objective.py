"""Requirements of a `LossConfig`: which terms are computed, and what they need of student, teacher and layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlmprune_jax.base.checks import suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.terms import BUILT_IN, LossTerm

TERMS: dict[str, LossTerm] = dict(BUILT_IN)  # users add theirs, see `losses`


def reported_terms(loss: LossConfig) -> dict[str, LossTerm]:
    """Return the loss terms to compute: terms with a positive weight, and terms that are always reported."""
    weights = loss.weights()
    return {name: term for name, term in TERMS.items() if weights.get(name) or term.reported}


def weighted_terms(loss: LossConfig) -> dict[str, LossTerm]:
    """Return the loss terms with a positive weight."""
    weights = loss.weights()
    return {name: term for name, term in TERMS.items() if weights.get(name)}


def needs_teacher(loss: LossConfig) -> bool:
    """Return True if the teacher model must run: a weighted term needs it, and its logits are not cached."""
    return any(term.needs_teacher for term in weighted_terms(loss).values()) and not loss.teacher_top_k


def uses_labels(loss: LossConfig) -> bool:
    """Return True if a weighted loss term learns from labels (not only from a teacher)."""
    return not all(term.needs_teacher for term in weighted_terms(loss).values())


def compares_logits(loss: LossConfig) -> bool:
    """Return True if a weighted loss term needs the teacher's logits."""
    return any(term.needs_teacher and not term.on_hidden for term in weighted_terms(loss).values())


def needs_logits(loss: LossConfig) -> bool:
    """Return True if a weighted loss term needs the student's logits."""
    return not all(term.on_hidden for term in weighted_terms(loss).values())


def only_at_labels(loss: LossConfig) -> bool:
    """Return True if all loss terms use logits only at positions whose next token has a label."""
    return loss.kl_positions == "labels" or all(term.counts != "positions" for term in reported_terms(loss).values())


def on_hidden(loss: LossConfig) -> dict[str, LossTerm]:
    """Return the loss terms that compare hidden states."""
    return {name: term for name, term in reported_terms(loss).items() if term.on_hidden}


def check_losses(loss: LossConfig) -> None:
    """Raise UserError for unknown loss terms, or terms that other settings rule out."""
    for name in loss.weights():
        if name not in TERMS:
            raise UserError(f"recover.losses.extra has no term {name!r}{suggest(name, TERMS)}")
    hidden = on_hidden(loss)
    if hidden and not loss.l2_layers:
        raise UserError(
            f"recover.losses: {_listed(hidden)} needs l2_layers: set it, for example to [-1] (after the final norm)"
        )
    if not loss.teacher_top_k:
        return
    terms = weighted_terms(loss)
    able = [name for name, term in TERMS.items() if term.from_top_k is not None]
    whole = [name for name, term in terms.items() if term.needs_teacher and name not in able]
    if whole:
        raise UserError(
            f"recover.losses: {_listed(whole)} cannot be computed from cached top-k logits of a teacher (only "
            f"{_listed(able)} can): set {' and '.join(f'{name}=0' for name in whole)}, or train without teacher_cache"
        )
    if not set(able) & set(terms):
        raise UserError(
            f"recover.losses: teacher_top_k={loss.teacher_top_k} needs a term that uses it: set {_listed(able)} above 0"
        )


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names)


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


def layer_pairs(
    loss: LossConfig, student: ModelConfig, teacher: ModelConfig, kept: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return pairs of hidden-state indices (student, teacher) that the hidden-state losses compare.

    The state of a depth-pruned student after its i-th layer is compared with the teacher's state after the original
    layer `kept[i - 1]`. Embeddings are compared with embeddings, and states after the final norm with each other.
    Raises UserError if an index is outside the student, or layer counts differ without a plan that aligns them.
    """
    n_student, n_teacher = len(student.text.layers), len(teacher.text.layers)
    if kept is not None and (len(kept) != n_student or max(kept) >= n_teacher):
        raise UserError(
            f"recover: the plan keeps {len(kept)} layers (up to {max(kept)}) but the student has {n_student} and the "
            f"teacher {n_teacher}: pass the plan that this student was pruned with"
        )
    ours, theirs = student_layers(loss, student), []
    for index, i in zip(loss.l2_layers, ours, strict=True):
        if loss.reference_compat:
            theirs.append(index % (n_teacher + 1) if index < 0 else index)
        elif i in (0, n_student):
            theirs.append(0 if i == 0 else n_teacher)
        elif kept is None and n_student != n_teacher:
            raise UserError(f"losses: l2_layers: {index} cannot be aligned without a plan: pass plan, or use -1")
        else:
            theirs.append(i if kept is None else kept[i - 1] + 1)
    return ours, tuple(theirs)


def check_teacher(loss: LossConfig, student: ModelConfig, teacher: ModelConfig | None) -> None:
    """Raise UserError if the teacher is missing, or its widths, vocabulary or image tokens are not the student's."""
    if loss.teacher_top_k > student.text.vocab_size:
        raise UserError(
            f"losses: teacher_top_k={loss.teacher_top_k} must be at most the vocabulary size, {student.text.vocab_size}"
        )
    if not needs_teacher(loss):
        return
    if teacher is None:
        taught = _listed(name for name, term in weighted_terms(loss).items() if term.needs_teacher)
        raise UserError(f"losses: {taught} needs a teacher: pass the unpruned model, or set the weight to 0")
    ours, theirs = student.text, teacher.text
    if ours.hidden_size != theirs.hidden_size:
        raise UserError(
            f"teacher: hidden_size {theirs.hidden_size} differs from the student's {ours.hidden_size}: pass the "
            "unpruned model"
        )
    own = loss.teacher_inputs == "own"
    if (compares_logits(loss) or own) and ours.vocab_size != theirs.vocab_size:
        raise UserError(
            f"teacher: vocab_size {theirs.vocab_size} differs from the student's {ours.vocab_size}: pass the "
            'unpruned model, or use only terms on hidden states with teacher_inputs="student"'
        )
    if own and (student.image_token_id, student.tokens_per_image) != (teacher.image_token_id, teacher.tokens_per_image):
        raise UserError(
            f"teacher: an image has {teacher.tokens_per_image} tokens of id {teacher.image_token_id}, but for the "
            "student "
            f"{student.tokens_per_image} of id {student.image_token_id}: pass the unpruned model, or use "
            'teacher_inputs="student"'
        )
