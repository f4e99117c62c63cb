"""Every setting of training, declared once: what trains, on which losses, and how; no arrays and no jax here."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmprune_jax.core.checks import one_of
from vlmprune_jax.core.config import LoraConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.settings import MAX_ROWS, check_settings, setting, settings_of

# (regex over the whole path, True | False | group name); the first rule that matches a path decides.
Rule = tuple[str, bool | str]
Rules = tuple[Rule, ...]

MAIN, PROJECTOR = "main", "projector"
GROUPS = (MAIN, PROJECTOR)
PRESETS: dict[str, Rules] = {
    "projector": ((r"projector/.*", PROJECTOR),),
    "lora": ((r"projector/.*", PROJECTOR), (r".*/lora_[ab]", MAIN)),
    "decoder": ((r"projector/.*", PROJECTOR), (r"text/.*", MAIN)),
    "tower": ((r"projector/.*", PROJECTOR), (r"vision/layers/\d+/(self_attn|mlp)/.*", MAIN)),
    "all": ((r"projector/.*", PROJECTOR), (r".*", MAIN)),
}
REMAT = ("none", "dots", "full")  # from the least recomputation to the most
SCHEDULES = ("cosine", "linear", "constant")
COMPUTE_DTYPES = ("float32", "bfloat16")
STRATEGIES = ("kl", "rkl", "l2", "l2+kl", "l2+rkl")
WEIGHT = "weight"  # the unit of a loss term's setting

_RECOVER = ("recover",)
_TEACHER = ("recover", "teacher_cache")


class _Weights(dict[str, float]):
    """A mapping that can be part of a static argument."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms, and how they are measured.

    `reference_compat` measures as the reference does: terms with a teacher over all positions, padding (at the right)
    included, divergences divided by the batch size only, and hidden layers index each model's own tuple. Padding is
    zero embeddings in LLaVA's and Bunny's trainers ("student"), its ids at position 0 in InternVL's ("own").
    """

    ce: float = setting(
        1.0, "Cross-entropy of the next token, over labelled positions.", affects=_RECOVER, unit=WEIGHT, least=0
    )
    l2: float = setting(
        0.0, "Squared difference of student's and teacher's hidden states.", affects=_RECOVER, unit=WEIGHT, least=0
    )
    kl: float = setting(
        0.0, "Forward KL, teacher to student, at `temperature`.", affects=_RECOVER, unit=WEIGHT, least=0
    )
    rkl: float = setting(
        0.0, "Reverse KL, student to teacher, at `temperature`.", affects=_RECOVER, unit=WEIGHT, least=0
    )
    l2_layers: tuple[int, ...] = setting(
        (-1,),
        "Hidden states that terms on them compare: indices of the student's (0 embeddings, -1 after the final norm).",
        affects=_RECOVER,
        unit="layers",
    )
    temperature: float = setting(2.0, "Softens both distributions of a divergence.", affects=_TEACHER, above=0)
    teacher_inputs: str = setting(
        "student",
        'What the teacher sees: the "student"\'s input embeddings (the reference), or its "own" of ids and pixels.',
        affects=_RECOVER,
        choices=("student", "own"),
    )
    reference_compat: bool = setting(
        False, "Measure exactly as the paper's trainers do, padding included.", affects=_RECOVER
    )
    chunk: int = setting(
        128, "Positions of a row whose logits exist at a time.", affects=_RECOVER, unit="tokens", least=1
    )
    cosine: float = setting(
        0.0, "1 - cosine of student's and teacher's hidden states.", affects=_RECOVER, unit=WEIGHT, least=0
    )
    kl_positions: str = setting(
        "all",
        'Where divergences are measured: at "all" real tokens (the reference), or before "labels".',
        affects=_TEACHER,
        choices=("all", "labels"),
    )
    teacher_top_k: int = setting(
        0,
        "No teacher runs, batches bring its k likeliest tokens of every position that counts; 0: it runs.",
        affects=_RECOVER,
        unit="tokens",
        least=0,
        offered=False,
    )
    extra: Mapping[str, float] = setting(
        {},
        "Weights of terms that a file of yours adds to `vp.losses`, by name.",
        affects=_RECOVER,
        unit=WEIGHT,
        least=0,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", _Weights(self.extra))
        check_settings("recover.losses", self)
        for name in settings_of(self).keys() & self.extra.keys():
            raise UserError(f"recover.losses.extra: {name} has a setting of its own, recover.losses.{name}")
        if not any(self.weights().values()):
            raise UserError(f"recover.losses: of the weights {self.weights()} at least one must be positive")
        if self.reference_compat and self.kl_positions != "all":
            raise UserError('recover.losses: reference_compat measures at all positions: leave kl_positions "all"')
        if self.teacher_top_k and (self.teacher_inputs != "own" or self.reference_compat):
            raise UserError(
                "recover.losses: a cached teacher saw its own embeddings of real tokens, not the student's of this "
                'step nor padding: set teacher_inputs="own" and reference_compat=False, or train without teacher_cache'
            )

    def weights(self) -> dict[str, float]:
        """Weight of every term that has a setting."""
        found = settings_of(self).items()
        return {n: getattr(self, n) for n, about in found if about.unit == WEIGHT and n != "extra"} | dict(self.extra)


def from_alpha(strategy: str, alpha: float, *, kl_norm: float = 1.0, **options: Any) -> LossConfig:
    """The reference's `dist_strategy`/`dist_alpha`/`dist_norm`: alpha * distillation + (1 - alpha) * cross-entropy."""
    one_of("distillation strategy", strategy, STRATEGIES)
    if not 0 <= alpha <= 1 or kl_norm <= 0:
        raise UserError(f"distillation: alpha {alpha} must lie in [0, 1] and norm {kl_norm} be positive")
    parts = strategy.split("+")
    weights: dict[str, Any] = {name: alpha / (1.0 if name == "l2" else kl_norm) for name in parts}
    return LossConfig(ce=1 - alpha, **weights, **options)


@dataclass(frozen=True)
class RecoverConfig:
    """How to train; the defaults are the reference's optimizer and LLaVA's adapters, in float32, without a teacher."""

    trainable: str | Rules = setting(
        "lora",
        "What trains: adapters, the decoder, the projections of the tower or everything, each with the projector; or "
        "the projector alone. In Python also rules (regex of paths, True | False | optimizer group) in order.",
        affects=_RECOVER,
        choices=tuple(PRESETS),
    )
    learning_rate: float = setting(2e-4, "Peak learning rate.", affects=_RECOVER, above=0)
    batch_size: int = setting(
        128, "Rows per optimizer step, over all devices.", affects=_RECOVER, unit="rows", least=1, most=MAX_ROWS
    )
    losses: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    projector_learning_rate: float | None = setting(
        None, "The projector's own peak learning rate; None: the same.", affects=_RECOVER, above=0
    )
    weight_decay: float = setting(0.0, "AdamW's decay of matrices.", affects=_RECOVER, least=0)
    schedule: str = setting("cosine", "Learning rate after the warm-up.", affects=_RECOVER, choices=SCHEDULES)
    warmup_ratio: float = setting(
        0.03, "Share of the steps in which the learning rate rises.", affects=_RECOVER, least=0, below=1
    )
    b1: float = setting(0.9, "AdamW's decay of the mean gradient.", affects=_RECOVER, least=0, below=1)
    b2: float = setting(0.999, "AdamW's decay of the mean square.", affects=_RECOVER, least=0, below=1)
    eps: float = setting(1e-8, "AdamW's epsilon.", affects=_RECOVER, above=0)
    clip_norm: float | None = setting(
        1.0, "Gradients are scaled down to this norm; None: never.", affects=_RECOVER, above=0
    )
    steps: int | None = setting(
        None, "Optimizer steps, in place of `epochs`.", affects=_RECOVER, unit="steps", least=1, most=10**9
    )
    epochs: float = setting(
        1.0, "Passes over the training records.", affects=_RECOVER, unit="epochs", above=0, most=10_000
    )
    accumulation: int = setting(
        1, "Micro-batches that an optimizer step is computed in.", affects=_RECOVER, unit="micro-batches", least=1
    )
    compute_dtype: str = setting(
        "float32",
        "What passes are computed in; what trains has float32 masters in any case.",
        affects=_TEACHER,
        choices=COMPUTE_DTYPES,
    )
    remat: str = setting(
        "dots",
        'What the backward pass computes again: nothing, all but matrix products ("dots"), or whole blocks.',
        affects=_RECOVER,
        choices=REMAT,
    )
    seed: int = setting(42, "Of adapters, dropout and the order of records.", affects=_RECOVER, least=0, below=2**32)
    merge_lora: bool = setting(True, "The returned model has its adapters merged.", offered=False)
    save_every: int = setting(100, "Steps between checkpoints; 0: only at the end.", unit="steps", least=0)
    keep_checkpoints: int = setting(2, "Newest checkpoints that are kept.", unit="checkpoints", least=1)
    log_every: int = setting(10, "Steps between lines of metrics.jsonl.", unit="steps", least=1)

    def __post_init__(self) -> None:
        check_settings("recover", self)
        resolve_rules(self.trainable)
        if self.batch_size % self.accumulation:
            raise UserError(
                f"recover.batch_size={self.batch_size} must be a multiple of recover.accumulation={self.accumulation}"
            )

    @property
    def adapters(self) -> LoraConfig | None:
        """`lora` where a rule of what trains names adapters ("lora_a", "lora_b"), else None."""
        rules, _ = resolve_rules(self.trainable)
        return self.lora if any("lora_" in pattern and value is not False for pattern, value in rules) else None

    def num_steps(self, n_records: int) -> int:
        """Optimizer steps of a run over `n_records` training rows."""
        if self.steps is not None:
            return self.steps
        return max(math.floor(self.epochs * n_records / self.batch_size), 1)

    def identity(self) -> dict[str, Any]:
        """What two runs must agree on to be one: every setting that changes the numbers, None where it is of no use."""
        free = [name for name, about in settings_of(self).items() if not about.affects]
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
        unused: dict[str, Any] = {} if self.steps is None else {"epochs": None}
        if self.adapters is None:
            unused["lora"] = None
        if not self.losses.extra:
            del values["losses"]["extra"]
        return {**values, **unused}


def resolve_rules(trainable: str | Sequence[Rule]) -> tuple[Rules, bool]:
    """The rules of a preset or a list of rules, and whether each of them has to match something (a user's own do)."""
    if isinstance(trainable, str):
        return PRESETS[one_of("recover.trainable", trainable, PRESETS)], False
    for rule in trainable:
        if len(rule) != 2 or not isinstance(rule[0], str) or not (isinstance(rule[1], bool) or rule[1] in GROUPS):
            raise UserError(f"trainable: rule {rule!r} must be (regex, True | False | one of {', '.join(GROUPS)})")
        try:
            re.compile(rule[0])
        except re.error as error:
            raise UserError(f"trainable: {rule[0]!r} is not a regular expression: {error}") from None
    if not trainable:
        raise UserError(f"trainable: no rules given: use {', '.join(PRESETS)} or (regex, True | False | group) pairs")
    return tuple((str(pattern), value) for pattern, value in trainable), True
