"""`tpu_plan.json`: memory, FLOPs and minimum time of recovery and evaluation on a TPU slice (`vlmprune plan`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from vlmprune_jax.base.files import Count, Finite
from vlmprune_jax.run.workdir.artefact import Artefact, Part

TPU_PLAN = "tpu_plan.json"
NOTES = (
    "Computed from the compiled training step, which was not run. Times are lower bounds: the slowest of arithmetic, "
    "memory and links between chips. Executed FLOPs include recomputation in the backward pass; bytes from other chips "
    "are computed from the shards of weights, gradients and activations."
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


class PlannedStep(Part, frozen=True, kw_only=True):
    """Recovery step that fits in memory; the planned batch has the largest bucket of each kind."""

    topology: str
    chips: Count
    mesh: dict[str, Count]
    student: PlannedModel
    teacher: PlannedModel | None
    batch_size: Count
    accumulation: Count
    remat: str
    tokens_buckets: list[Count]  # per row
    images_buckets: list[Count]  # per row
    image_tokens_buckets: list[Count] = []  # per row, for images of any size
    feature_cache: bool
    teacher_top_k: Count
    hbm: Hbm
    executed_flops: Finite  # of all chips, with recomputation
    flops: dict[str, Finite]  # that the models need: student, teacher, attention, vision
    received: dict[str, Finite]  # bytes per chip from other chips: weights, gradients, activations
    seconds: dict[str, Finite]  # lower bounds on the step time: compute, memory, interconnect
    mfu: Finite
    steps: Count | None
    compile_seconds: Finite

    def table(self) -> Iterator[tuple[str, str]]:
        """Yield (name, value) rows that describe the step."""
        hbm, teacher, tokens = self.hbm, self.teacher, max(self.tokens_buckets, default=0)
        yield "slice", _slice(self)
        models = f"{self.student.parameters:,} parameters in {self.student.layers} layers"
        if teacher:
            models += f", teacher {teacher.parameters:,} in {teacher.layers}"
        if self.teacher_top_k:
            models += f", the teacher's top {self.teacher_top_k} from its cache"
        yield "student", models
        n_images = max(self.images_buckets, default=0)
        images = f"{n_images}{' cached' if self.feature_cache else ''} image{'' if n_images == 1 else 's'}"
        yield (
            "step",
            f"{self.batch_size} rows of {tokens:,} tokens and {images}, {self.accumulation} micro-batches, "
            f"remat {self.remat}",
        )
        named = {"tokens": self.tokens_buckets, "images": self.images_buckets}
        named["tokens an image"] = self.image_tokens_buckets
        buckets = [f"{', '.join(map(str, sizes))} {what}" for what, sizes in named.items() if len(sizes) > 1]
        if buckets:
            yield "buckets", f"the largest of {' and '.join(buckets)}; smaller ones need less"
        memory = f"{hbm.arguments / GIB:.2f} GiB arguments + {hbm.temporaries / GIB:.2f} GiB temporaries"
        yield "HBM per chip", f"{memory}, {hbm.free / GIB:.2f} GiB free"
        terms = ", ".join(f"{name} {value:.2e}" for name, value in self.flops.items())
        yield "FLOPs", f"{self.executed_flops:.2e} executed, {sum(self.flops.values()):.2e} of the model ({terms})"
        received = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in self.received.items()) or "none"
        yield "received", f"per chip, in GiB: {received}"
        seconds = max(self.seconds.values(), default=0)
        by_limit = ", ".join(f"{name} {value:.3f}" for name, value in self.seconds.items())
        yield "step time", f"at least {seconds:.3f} s ({by_limit}); MFU at most {100 * self.mfu:.1f} %"
        if seconds > 0:
            yield "throughput", f"at most {self.batch_size * tokens / seconds:,.0f} tokens/s"
        if self.steps is not None:
            hours = self.steps * seconds / 3600
            run = f"{self.steps:,} steps: at least {hours:.2f} hours, {hours * self.chips:.1f} chip-hours"
            largest = " if every batch is of the largest bucket (how many are of each depends on the data)"
            yield "run", run + (largest if buckets else "")
        yield "compiled in", f"{self.compile_seconds:.0f} s"


class PlannedEvaluation(Part, frozen=True, kw_only=True):
    """Evaluation of a model on a TPU slice, computed from shapes; all sizes are bytes per chip."""

    topology: str
    chips: Count
    mesh: dict[str, Count]
    model: PlannedModel
    rows: Count  # of a batch
    tokens_per_row: Count
    weights: Finite
    cache: Finite
    largest_batch: Count
    phases: dict[str, dict[str, dict[str, Finite]]]  # least seconds of 1,000 questions: format, benchmark, phase

    def table(self) -> Iterator[tuple[str, str]]:
        """Yield (name, value) rows that describe the evaluation."""
        yield "slice", _slice(self)
        yield "model", f"{self.model.parameters:,} parameters in {self.model.layers} layers"
        yield (
            "batch",
            f"{self.rows} rows of {self.tokens_per_row:,} tokens; at most {self.largest_batch:,} rows fit",
        )
        yield "HBM per chip", f"{self.weights / GIB:.2f} GiB weights + {self.cache / GIB:.2f} GiB cache"
        for form, benchmarks in self.phases.items():
            texts = [
                f"{name} {sum(phases.values()):.2f} ({' + '.join(f'{value:.2f}' for value in phases.values())})"
                for name, phases in benchmarks.items()
            ]
            least = f"at least, in seconds (tower + prefill + decoding): {', '.join(texts)}"
            yield f"1,000 questions, {form}", least


class TpuPlan(Artefact, frozen=True, kw_only=True, tag=3):
    """File `tpu_plan.json`: planned recoveries by name, and planned evaluations by prune variant."""

    HINT: ClassVar[str] = "run `vlmprune plan` again, or remove the file"
    recoveries: dict[str, PlannedStep]
    evaluations: dict[str, PlannedEvaluation] = {}


def _slice(planned: PlannedStep | PlannedEvaluation) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in planned.mesh.items())
    return f"{planned.topology}: {planned.chips} chips, mesh {mesh}"
