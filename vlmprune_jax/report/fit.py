"""What `vlmprune plan` found, in words: on the terminal, and in the report where the workdir holds the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from vlmprune_jax.core.errors import UserError, printable
from vlmprune_jax.core.files import Count, Finite, checked, read_json

Json = dict[str, Any]
PLANNED = "tpu_plan.json"
NOTES = (
    "From the training step as compiled ahead of time; nothing ran. Times are lower bounds: the slowest of arithmetic, "
    "memory and links between chips. Executed FLOPs include what the backward pass computes again."
)
GIB = 2**30
_TODO = "plan again, or remove it"


class _Size(TypedDict):
    layers: Count
    parameters: Count


class _Memory(TypedDict):
    arguments: Finite
    temporaries: Finite
    free: Finite


class _Flops(TypedDict):
    executed: Finite
    model: Finite
    student: Finite
    teacher: Finite
    attention: Finite
    vision: Finite


class _Seconds(TypedDict):
    step: Finite
    compute: Finite
    memory: Finite
    interconnect: Finite


class _Step(TypedDict):
    """What `planning.fit.facts` tells of a step that fits."""

    topology: str
    chips: Count
    mesh: dict[str, Count]
    student: _Size
    teacher: _Size | None
    batch_size: Count
    accumulation: Count
    remat: str
    tokens_per_row: Count
    images_per_row: Count
    tokens_buckets: list[Count]
    images_buckets: list[Count]
    image_tokens_buckets: NotRequired[list[Count]]  # of images of any size
    feature_cache: bool
    teacher_top_k: Count
    hbm: _Memory
    flops: _Flops
    received: dict[str, Finite]
    seconds: _Seconds
    mfu: Finite
    tokens_per_second: Finite
    steps: Count | None
    hours: Finite | None
    chip_hours: Finite | None
    compile_seconds: Finite


class _Searched(TypedDict, total=False):
    problem: str
    search: dict[str, _Step]


class _Fitting(_Step, _Searched):
    """A step that fits, and what a search found beside it."""


def as_rows(told: Json) -> list[tuple[str, str]]:
    """(what, value) of one recovery on one slice: its step, or why there is none, and what a search found."""
    rows = [*_step_rows(told)] if "hbm" in told else []
    if "problem" in told:
        rows.append(("does not fit", told["problem"]))
    for what, found in told.get("search", {}).items():
        rows.append((f"best {what}", _summary(found)))
    return rows


def _step_rows(told: Json) -> Iterator[tuple[str, str]]:
    hbm, flops, seconds, teacher = told["hbm"], told["flops"], told["seconds"], told["teacher"]
    mesh = " x ".join(f"{name} {size}" for name, size in told["mesh"].items())
    yield "slice", f"{told['topology']}: {told['chips']} chips, mesh {mesh}"
    models = f"{told['student']['parameters']:,} parameters in {told['student']['layers']} layers"
    if teacher:
        models += f", teacher {teacher['parameters']:,} in {teacher['layers']}"
    if told["teacher_top_k"]:
        models += f", the teacher's top {told['teacher_top_k']} from its cache"
    yield "student", models
    images = f"{told['images_per_row']}{' cached' if told['feature_cache'] else ''} image"
    images += "" if told["images_per_row"] == 1 else "s"
    yield (
        "step",
        f"{told['batch_size']} rows of {told['tokens_per_row']:,} tokens and {images}, "
        f"{told['accumulation']} micro-batches, remat {told['remat']}",
    )
    if _buckets(told):
        yield "buckets", f"the largest of {_buckets(told)}; smaller ones need less"
    yield (
        "HBM per chip",
        f"{hbm['arguments'] / GIB:.2f} GiB arguments + {hbm['temporaries'] / GIB:.2f} GiB temporaries, "
        f"{hbm['free'] / GIB:.2f} GiB free",
    )
    parts = ", ".join(f"{name} {flops[name]:.2e}" for name in ("student", "teacher", "attention", "vision"))
    yield "FLOPs", f"{flops['executed']:.2e} executed, {flops['model']:.2e} of the model ({parts})"
    received = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in told["received"].items()) or "none"
    yield "received", f"per chip, in GiB: {received}"
    limits = ", ".join(f"{name} {seconds[name]:.3f}" for name in ("compute", "memory", "interconnect"))
    yield "step time", f"at least {seconds['step']:.3f} s ({limits}); MFU at most {100 * told['mfu']:.1f} %"
    yield "throughput", f"at most {told['tokens_per_second']:,.0f} tokens/s"
    if told["hours"] is not None:
        run = f"{told['steps']:,} steps: at least {told['hours']:.2f} hours, {told['chip_hours']:.1f} chip-hours"
        largest = " if every batch is of the largest bucket (how many are of each depends on the data)"
        yield "run", run + (largest if _buckets(told) else "")
    yield "compiled in", f"{told['compile_seconds']:.0f} s"


def _buckets(told: Json) -> str:
    """ "768, 1024, 2048 tokens and 1, 13 images": the shapes that a batch can have, where there are several."""
    named = {what: told[f"{what}_buckets"] for what in ("tokens", "images")}
    named["tokens an image"] = told.get("image_tokens_buckets", [])
    return " and ".join(f"{', '.join(map(str, sizes))} {what}" for what, sizes in named.items() if len(sizes) > 1)


def _summary(found: Json) -> str:
    return (
        f"{found['batch_size']} rows in {found['accumulation']}, remat {found['remat']}, on {found['topology']}: "
        f"{found['hbm']['free'] / GIB:.2f} GiB free, at least {found['seconds']['step']:.3f} s a step, "
        f"{found['tokens_per_second']:,.0f} tokens/s"
    )


def read_planned(workdir: Path) -> list[Json]:
    """Name and rows of every recovery whose numbers `vlmprune plan` left in the workdir.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / PLANNED
    if not path.is_file():
        return []
    planned = read_json(path, dict[str, Json], todo=_TODO, unicode=False)
    for name, told in planned.items():
        checked(told, _Fitting if "hbm" in told else _Searched, f"{path}: {name}", _TODO)
        if told.get("hours") is not None and None in (told["steps"], told["chip_hours"]):
            raise UserError(f"{path}: {name}: has hours but not the steps, or chip-hours, that take them: {_TODO}")
    return [{"name": printable(name), "rows": as_rows(told)} for name, told in planned.items()]
