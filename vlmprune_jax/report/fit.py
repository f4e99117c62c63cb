"""What `vlmprune plan` found, in words: on the terminal, and in the report where the workdir holds the numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmprune_jax.errors import UserError

Json = dict[str, Any]
PLANNED = "tpu_plan.json"
NOTES = (
    "From the training step as compiled ahead of time; nothing ran. Times are lower bounds: the slowest of arithmetic, "
    "memory and links between chips. Executed FLOPs include what the backward pass computes again."
)
GIB = 2**30


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
    try:
        planned = json.loads(path.read_text(encoding="utf-8"))
        return [{"name": name, "rows": as_rows(told)} for name, told in planned.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a result of `vlmprune plan` ({error!r}): plan again, or remove it") from None
