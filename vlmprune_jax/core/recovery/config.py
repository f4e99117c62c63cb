"""Settings of recovery training: trained parameters, losses and optimizer; no jax."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import MAX_ROWS, check_settings, recover_setting, setting, settings_of
from vlmprune_jax.core.recovery.loggers import LOGGERS
from vlmprune_jax.core.sections import LoraConfig

# (regex over the whole path, True | False | group name); the first rule that matches a path decides.
Rule = tuple[str, bool | str]
Rules = tuple[Rule, ...]

MAIN, PROJECTOR = "main", "projector"
GROUPS = (MAIN, PROJECTOR)
PRESETS: dict[str, Rules] = {
    "projector": ((r"projector/.*", PROJECTOR),),
    "lora": ((r"projector/.*", PROJECTOR), (r".*/lora_[ab]", MAIN)),
    "routers": ((r"text/layers/\d+/mlp/(router|router_scale|expert_scale)/weight", MAIN),),
    "decoder": ((r"projector/.*", PROJECTOR), (r"text/.*", MAIN)),
    "tower": ((r"projector/.*", PROJECTOR), (r"vision/layers/\d+/(self_attn|mlp)/.*", MAIN)),
    "all": ((r"projector/.*", PROJECTOR), (r".*", MAIN)),
}
RECOVERIES = ("train", "none")
REMAT = ("none", "dots", "full")  # by increasing recomputation
SCHEDULES = ("cosine", "linear", "constant")
WEIGHT = "weight"  # unit of settings that weight loss terms

teacher_setting = functools.partial(setting, affects=("recover", "teacher_cache"))
weight_setting = functools.partial(recover_setting, unit=WEIGHT, least=0)


class _Weights(dict[str, float]):
    """Hashable mapping, so that a config that contains it can be a static argument of jax.jit."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


@dataclass(frozen=True)
class LossConfig:
    """Weights of the training loss terms, and options for computing them.

    With `reference_compat`, losses are computed as in the paper's trainers: distillation losses include padding
    positions, KL losses are divided by the batch size only, and `l2_layers` index the hidden states of teacher and
    student separately. `teacher_inputs="student"` then reproduces LLaVA's and Bunny's trainers, which pad with zero
    embeddings; "own" reproduces InternVL's trainer, which pads with token ids.
    """

    ce: float = weight_setting(1.0, "Weight of the next-token cross-entropy on labelled positions.")
    l2: float = weight_setting(
        0.0, "Weight of the mean squared difference between the student's and teacher's hidden states."
    )
    kl: float = weight_setting(0.0, "Weight of the forward KL divergence (teacher to student) at `temperature`.")
    rkl: float = weight_setting(0.0, "Weight of the reverse KL divergence (student to teacher) at `temperature`.")
    l2_layers: tuple[int, ...] = recover_setting(
        (-1,),
        "Hidden states that `l2` and `cosine` compare, by index in the student (0 = embeddings, -1 = after the final "
        "norm).",
        unit="layers",
    )
    temperature: float = teacher_setting(2.0, "Softmax temperature of teacher and student in the KL terms.", above=0)
    teacher_inputs: str = recover_setting(
        "student",
        'Input embeddings of the teacher: the student\'s ("student", as in the paper), or the teacher\'s own ("own").',
        choices=("student", "own"),
    )
    reference_compat: bool = recover_setting(
        False, "Compute the losses exactly as the paper's trainers do, padding included."
    )
    chunk: int = recover_setting(
        128, "Number of positions per row whose logits are in memory at a time.", unit="tokens", least=1
    )
    cosine: float = weight_setting(
        0.0, "Weight of 1 - cosine similarity between the student's and teacher's hidden states."
    )
    kl_positions: str = teacher_setting(
        "all",
        'Positions that the KL terms cover: all tokens ("all", as in the paper), or only those that predict labels '
        '("labels").',
        choices=("all", "labels"),
    )
    teacher_top_k: int = recover_setting(
        0,
        "Number of cached teacher logits per position to use, instead of running the teacher (0 = run the teacher).",
        unit="tokens",
        least=0,
        offered=False,
    )
    extra: Mapping[str, float] = weight_setting(
        {}, "Weights of loss terms that a user's file adds to `vp.losses`, by name."
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", _Weights(self.extra))
        check_settings("recover.losses", self)
        for name in settings_of(self).keys() & self.extra.keys():
            raise UserError(f"recover.losses.extra: {name} is a built-in term: set recover.losses.{name} instead")
        if not any(self.weights().values()):
            raise UserError(
                f"recover.losses: all weights are 0 ({', '.join(self.weights())}): set at least one above 0"
            )
        if self.reference_compat and self.kl_positions != "all":
            raise UserError(
                'recover.losses: reference_compat needs kl_positions="all", not "labels": change one of them'
            )
        if self.teacher_top_k and (self.teacher_inputs != "own" or self.reference_compat):
            raise UserError(
                'recover.losses: a cached teacher needs teacher_inputs="own" and reference_compat=False: set both, or '
                "train without teacher_cache"
            )

    def weights(self) -> dict[str, float]:
        """Return {name of a loss term: its weight}, for built-in and user-defined terms."""
        names = [name for name, about in settings_of(self).items() if about.unit == WEIGHT and name != "extra"]
        return {name: getattr(self, name) for name in names} | dict(self.extra)


@dataclass(frozen=True)
class RecoverConfig:
    """Settings of recovery, the training after pruning (the recipe "llava" has the paper's settings)."""

    method: str = setting(
        "train",
        '"train" trains the pruned model (after its reconstruction, if there is one); "none" leaves it untrained.',
        choices=RECOVERIES,
    )
    name: str = setting("recovered", "Name of this recovery setup in tables.")
    control: bool = setting(
        True,
        "If the loss uses labels, also train the unpruned model in the same way, and give retention relative to "
        "this control, which excludes gains from training on the task. Costs one more training, shared by all prune "
        "variants and all runs of a sweep.",
    )
    save_adapter: bool = recover_setting(
        False,
        "Also write the LoRA adapters to the folder adapter/ in the format of `peft`, to load on the model in pruned/ "
        "(they are already merged into the model in recovered/).",
    )
    teacher_cache: str | None = setting(
        None,
        "Folder for a cache of the teacher's top-k logits at all positions in the loss; vlmprune computes missing "
        "logits, then trains without the teacher (None = no cache). Several runs may share the folder. Needs "
        '`losses.teacher_inputs="own"`, and no loss `l2` or `cosine`.',
    )
    teacher_top_k: int = setting(
        64,
        "Number of logits per position that `teacher_cache` stores.",
        affects=("recover", "teacher_cache"),
        unit="tokens",
        least=1,
    )

    trainable: str | Rules = recover_setting(
        "lora",
        "Parameters to train: LoRA adapters, decoder, projections of the vision tower, or all, each with the "
        "projector; or only the projector, or only the routers of experts. In Python also rules (regex of parameter "
        "paths, True | False | optimizer group), of which the first match decides.",
        choices=tuple(PRESETS),
    )
    learning_rate: float = recover_setting(2e-4, "Peak learning rate, reached after the warm-up.", above=0)
    batch_size: int = recover_setting(
        128,
        "Number of rows per optimizer step, over all devices; lowered if there are fewer training records.",
        unit="rows",
        least=1,
        most=MAX_ROWS,
    )
    losses: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    projector_learning_rate: float | None = recover_setting(
        None, "Peak learning rate of the projector (None = `learning_rate`).", above=0
    )
    weight_decay: float = recover_setting(0.0, "Weight decay of AdamW, applied to matrices only.", least=0)
    schedule: str = recover_setting("cosine", "Decay of the learning rate after the warm-up.", choices=SCHEDULES)
    warmup_ratio: float = recover_setting(
        0.03,
        "Share of the optimizer steps in which the learning rate rises linearly from 0 (always less than all steps).",
        least=0,
        below=1,
    )
    b1: float = recover_setting(0.9, "Decay rate of AdamW's first moment (beta 1).", least=0, below=1)
    b2: float = recover_setting(0.999, "Decay rate of AdamW's second moment (beta 2).", least=0, below=1)
    eps: float = recover_setting(1e-8, "AdamW's epsilon, added to the root of the second moment.", above=0)
    clip_norm: float | None = recover_setting(
        1.0, "Maximum global gradient norm; larger gradients are scaled down (None = no clipping).", above=0
    )
    steps: int | None = recover_setting(
        None, "Number of optimizer steps, instead of `epochs`.", unit="steps", least=1, most=10**9
    )
    epochs: float = recover_setting(
        1.0, "Number of passes over the training records.", unit="epochs", above=0, most=10_000
    )
    accumulation: int = recover_setting(
        1, "Number of micro-batches per optimizer step (gradient accumulation).", unit="micro-batches", least=1
    )
    compute_dtype: str = teacher_setting(
        "float32",
        "Data type of the forward and backward passes; trained parameters always have float32 master copies.",
        choices=("float32", "bfloat16"),
    )
    quantize: str = recover_setting(
        "none",
        "Quantisation-aware training for `export.quantize`: the forward pass rounds the decoder's matrices to integers "
        "(symmetric, default group size), and for w8a8 also their inputs. Not possible with LoRA adapters.",
        choices=("none", "w4a16", "w8a16", "w8a8"),
    )
    remat: str = recover_setting(
        "dots",
        'Recomputation in the backward pass to save memory: none ("none"), everything but matrix products ("dots"), '
        'or whole blocks ("full").',
        choices=REMAT,
    )
    seed: int = recover_setting(
        42, "Random seed for adapter initialisation, dropout and order of records.", least=0, below=2**32
    )
    merge_lora: bool = setting(True, "Merge the LoRA adapters into the weights of the returned model.", offered=False)
    save_every: int = setting(
        100, "Number of optimizer steps between checkpoints (0 = only at the end).", unit="steps", least=0
    )
    keep_checkpoints: int = setting(2, "Number of checkpoints to keep, newest first.", unit="checkpoints", least=1)
    log_every: int = setting(10, "Number of optimizer steps between lines of metrics.jsonl.", unit="steps", least=1)
    loggers: tuple[str, ...] = setting(
        ("tensorboard",),
        "Additional loggers of training metrics, besides metrics.jsonl; wandb needs vlmprune-jax[wandb], and trackio "
        "vlmprune-jax[trackio].",
        choices=LOGGERS,
    )

    def __post_init__(self) -> None:
        check_settings("recover", self)
        resolve_rules(self.trainable)
        if self.quantize != "none" and self.adapters is not None:
            raise UserError(
                f'recover.quantize="{self.quantize}" rounds the decoder\'s weights, which trainable="lora" does not '
                'train: set recover.trainable to "decoder", "all" or "projector"'
            )
        if self.batch_size % self.accumulation:
            raise UserError(
                f"recover.batch_size={self.batch_size} must be a multiple of recover.accumulation={self.accumulation}"
            )

    @property
    def adapters(self) -> LoraConfig | None:
        """LoRA settings if `trainable` includes adapter weights (lora_a, lora_b); None otherwise."""
        rules = [pattern for pattern, value in resolve_rules(self.trainable) if value is not False]
        return self.lora if any("lora_" in pattern for pattern in rules) else None

    def fit_records(self, n_records: int, devices: int) -> RecoverConfig:
        """Return the settings with a batch size of at most `n_records`, unless `steps` is set.

        `devices`: number of devices that share the rows of a micro-batch. Raises UserError if the records do not fill a
        batch of one row per micro-batch and device.
        """
        rows = min(n_records, math.floor(self.epochs * n_records))
        if self.steps is not None or rows >= self.batch_size:
            return self
        unit = self.accumulation * devices
        if rows < unit:
            raise UserError(
                f"recover: {n_records} training records in {self.epochs:g} epochs fill no batch of {unit} "
                f"row{'s' * (unit > 1)} (accumulation {self.accumulation} x {devices} device{'s' * (devices > 1)}), so "
                f"no step would train at learning rate {self.learning_rate:g}: add records or epochs, set "
                "recover.steps, or lower recover.accumulation or the number of devices (mesh)"
            )
        return dataclasses.replace(self, batch_size=rows // unit * unit)

    def num_steps(self, n_records: int) -> int:
        """Return the number of optimizer steps for `n_records` training records."""
        if self.steps is not None:
            return self.steps
        return max(math.floor(self.epochs * n_records / self.batch_size), 1)

    def identity(self) -> dict[str, Any]:
        """Return the settings that must not change between a checkpoint and its resumption."""
        values = dataclasses.asdict(self)
        for name, about in settings_of(self).items():
            if not about.affects or name in ("save_adapter", "teacher_top_k"):  # change files, not the training
                del values[name]
        if self.steps is not None:
            values["epochs"] = None
        if self.adapters is None:
            values["lora"] = None
        if not self.losses.extra:
            del values["losses"]["extra"]
        return values


def resolve_rules(trainable: str | Sequence[Rule]) -> Rules:
    """Return the rules (regexes) that select trained parameters, from a preset or the user's list."""
    if isinstance(trainable, str):
        return PRESETS[one_of("recover.trainable", trainable, PRESETS)]
    for rule in trainable:
        if len(rule) != 2 or not isinstance(rule[0], str) or not (isinstance(rule[1], bool) or rule[1] in GROUPS):
            raise UserError(
                f"recover.trainable: rule {rule!r} must be (regex, True | False | one of {', '.join(GROUPS)})"
            )
        try:
            re.compile(rule[0])
        except re.error as error:
            raise UserError(f"recover.trainable: {rule[0]!r} is not a regular expression ({error})") from None
    if not trainable:
        raise UserError(f"recover.trainable: empty: use {', '.join(PRESETS)}, or pairs (regex, True | False | group)")
    return tuple((str(pattern), value) for pattern, value in trainable)
