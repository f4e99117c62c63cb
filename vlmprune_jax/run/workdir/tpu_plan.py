"""`tpu_plan.json`: memory, FLOPs and minimum time of the recovery step on a TPU slice (`vlmprune plan`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from vlmprune_jax.base.files import Count, Finite
from vlmprune_jax.run.workdir.artefact import Artefact, Part

TPU_PLAN = "tpu_plan.json"
NOTES = (
    "Computed from the compiled training step, which was not run. Times are lower bounds: the slowest of arithmetic, "
    "memory and links between chips. Executed FLOPs include recomputation in the backward pass."
)
GIB = 2**30


class PlannedModel(Part, frozen=True, kw_only=True):
    """Numbers of parameters and layers of a student or teacher."""

    layers: Count
    parameters: Count


class Hbm(Part, frozen=True, kw_only=True):
    """Device memory that a compiled program needs and leaves free, in bytes per chip."""

    arguments: Finite
    temporaries: Finite
    free: Finite


class StepFlops(Part, frozen=True, kw_only=True):
    """FLOPs of a training step on all chips: executed FLOPs, and FLOPs that the model needs (total and by part)."""

    executed: Finite
    model: Finite
    student: Finite
    teacher: Finite
    attention: Finite
    vision: Finite


class StepSeconds(Part, frozen=True, kw_only=True):
    """Lower bounds on the step time in seconds, by limiting resource (compute, memory, network)."""

    step: Finite
    compute: Finite
    memory: Finite
    interconnect: Finite


class PlannedStep(Part, frozen=True, kw_only=True):
    """Recovery step that fits in memory; `received`: bytes per chip, by collective operation."""

    topology: str
    chips: Count
    mesh: dict[str, Count]
    student: PlannedModel
    teacher: PlannedModel | None
    batch_size: Count
    accumulation: Count
    remat: str
    tokens_per_row: Count
    images_per_row: Count
    tokens_buckets: list[Count]
    images_buckets: list[Count]
    image_tokens_buckets: list[Count] = []  # for images of any size
    feature_cache: bool
    teacher_top_k: Count
    hbm: Hbm
    flops: StepFlops
    received: dict[str, Finite]
    seconds: StepSeconds
    mfu: Finite
    tokens_per_second: Finite
    steps: Count | None
    compile_seconds: Finite

    @property
    def hours(self) -> float | None:
        """Lower bound on the training time in hours; None if the number of steps is unknown."""
        return None if self.steps is None else self.steps * self.seconds.step / 3600

    @property
    def buckets(self) -> str:
        """Batch shapes of the step as text, such as "768, 1024 tokens and 1, 13 images"; "" for a single shape."""
        named = {
            "tokens": self.tokens_buckets,
            "images": self.images_buckets,
            "tokens an image": self.image_tokens_buckets,
        }
        return " and ".join(f"{', '.join(map(str, sizes))} {what}" for what, sizes in named.items() if len(sizes) > 1)


class PlannedEvaluation(Part, frozen=True, kw_only=True):
    """Evaluation of a model on a TPU slice that fits in memory; all sizes are bytes per chip.

    `rows`, `tokens_per_row`: shape of the compiled batch. `received`: bytes from other chips to decode one token of
    every row in the compiled program. `seconds`: lower bounds for 1,000 questions, by benchmark. `phases`: the same by
    weight format, benchmark and phase, for any mesh.
    """

    topology: str
    chips: Count
    mesh: dict[str, Count]
    model: PlannedModel
    rows: Count
    tokens_per_row: Count
    hbm: Hbm
    largest_batch: Count
    received: Finite
    seconds: dict[str, Finite]
    phases: dict[str, dict[str, dict[str, Finite]]] = {}
    compile_seconds: Finite


class Planned(Part, frozen=True, kw_only=True):
    """One planned recovery: its step, or why the step needs too much memory, and the best steps that searches found."""

    step: PlannedStep | None = None
    problem: str | None = None
    search: dict[str, PlannedStep] = {}


class TpuPlan(Artefact, frozen=True, kw_only=True, tag=1):
    """File `tpu_plan.json`: planned recoveries by name, and planned evaluations by prune variant."""

    HINT: ClassVar[str] = "run `vlmprune plan` again, or remove the file"
    recoveries: dict[str, Planned]
    evaluations: dict[str, PlannedEvaluation] = {}


def as_rows(planned: Planned) -> list[tuple[str, str]]:
    """Return (name, value) rows that describe a planned recovery."""
    rows = [] if planned.step is None else [*_step_rows(planned.step)]
    if planned.problem is not None:
        rows.append(("does not fit", planned.problem))
    return rows + [(f"best {what}", _summary(step)) for what, step in planned.search.items()]


def _step_rows(step: PlannedStep) -> Iterator[tuple[str, str]]:
    hbm, flops, seconds, teacher = step.hbm, step.flops, step.seconds, step.teacher
    mesh = " x ".join(f"{name} {size}" for name, size in step.mesh.items())
    yield "slice", f"{step.topology}: {step.chips} chips, mesh {mesh}"
    models = f"{step.student.parameters:,} parameters in {step.student.layers} layers"
    if teacher:
        models += f", teacher {teacher.parameters:,} in {teacher.layers}"
    if step.teacher_top_k:
        models += f", the teacher's top {step.teacher_top_k} from its cache"
    yield "student", models
    images = f"{step.images_per_row}{' cached' if step.feature_cache else ''} image"
    images += "" if step.images_per_row == 1 else "s"
    yield (
        "step",
        f"{step.batch_size} rows of {step.tokens_per_row:,} tokens and {images}, "
        f"{step.accumulation} micro-batches, remat {step.remat}",
    )
    if step.buckets:
        yield "buckets", f"the largest of {step.buckets}; smaller ones need less"
    yield (
        "HBM per chip",
        f"{hbm.arguments / GIB:.2f} GiB arguments + {hbm.temporaries / GIB:.2f} GiB temporaries, "
        f"{hbm.free / GIB:.2f} GiB free",
    )
    terms = ", ".join(f"{name} {getattr(flops, name):.2e}" for name in ("student", "teacher", "attention", "vision"))
    yield "FLOPs", f"{flops.executed:.2e} executed, {flops.model:.2e} of the model ({terms})"
    received = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in step.received.items()) or "none"
    yield "received", f"per chip, in GiB: {received}"
    limits = ", ".join(f"{name} {getattr(seconds, name):.3f}" for name in ("compute", "memory", "interconnect"))
    yield "step time", f"at least {seconds.step:.3f} s ({limits}); MFU at most {100 * step.mfu:.1f} %"
    yield "throughput", f"at most {step.tokens_per_second:,.0f} tokens/s"
    if step.hours is not None:
        run = f"{step.steps:,} steps: at least {step.hours:.2f} hours, {step.hours * step.chips:.1f} chip-hours"
        largest = " if every batch is of the largest bucket (how many are of each depends on the data)"
        yield "run", run + (largest if step.buckets else "")
    yield "compiled in", f"{step.compile_seconds:.0f} s"


def evaluation_rows(planned: PlannedEvaluation) -> list[tuple[str, str]]:
    """Return (name, value) rows that describe a planned evaluation."""
    hbm, model = planned.hbm, planned.model
    mesh = " x ".join(f"{name} {size}" for name, size in planned.mesh.items())
    return [
        ("slice", f"{planned.topology}: {planned.chips} chips, mesh {mesh}"),
        ("model", f"{model.parameters:,} parameters in {model.layers} layers"),
        (
            "batch",
            f"{planned.rows} rows of {planned.tokens_per_row:,} tokens; about {planned.largest_batch:,} rows fit",
        ),
        (
            "HBM per chip",
            f"{hbm.arguments / GIB:.2f} GiB weights + {hbm.temporaries / GIB:.2f} GiB cache and temporaries, "
            f"{hbm.free / GIB:.2f} GiB free",
        ),
        ("a token", f"{planned.received / 2**20:.2f} MiB received per chip"),
        *((f"1,000 questions, {form}", _phases(phases)) for form, phases in planned.phases.items()),
        ("compiled in", f"{planned.compile_seconds:.0f} s"),
    ]


def _phases(benchmarks: dict[str, dict[str, float]]) -> str:
    """Return the least seconds of benchmarks as text, with those of each phase."""
    texts = [
        f"{name} {sum(phases.values()):.2f} ({' + '.join(f'{value:.2f}' for value in phases.values())})"
        for name, phases in benchmarks.items()
    ]
    return f"at least, in seconds (tower + prefill + decoding): {', '.join(texts)}"


def _summary(step: PlannedStep) -> str:
    return (
        f"{step.batch_size} rows in {step.accumulation}, remat {step.remat}, on {step.topology}: "
        f"{step.hbm.free / GIB:.2f} GiB free, at least {step.seconds.step:.3f} s a step, "
        f"{step.tokens_per_second:,.0f} tokens/s"
    )
