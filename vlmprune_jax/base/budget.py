"""Cost limits of a pruned model, set instead of a ratio, and the workload for which costs are computed; no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import check_settings, prune_setting, setting
from vlmprune_jax.base.weight_files import DTYPES

# Choices of the export, on which the size of its files depends.
UNEVEN = ("per_layer", "pad", "refuse")  # what to do with unequal layers: true widths, zeros, or an error
LAYOUTS = ("source", "transformers")

LIMITS = ("parameters", "disk_bytes", "memory_bytes", "flops", "step_ms", "decode_ms")


@dataclass(frozen=True)
class Budget:
    """Upper limits on the cost of the pruned model (instead of a ratio); the plan satisfies all of them."""

    parameters: float | None = prune_setting(
        None, "Maximum number of parameters of the whole model.", unit="parameters", above=0
    )
    disk_bytes: float | None = prune_setting(
        None, "Maximum size of the exported weights, in the dtype and layout of the export.", unit="bytes", above=0
    )
    memory_bytes: float | None = prune_setting(
        None,
        "Maximum size of weights plus key/value cache for `batch` rows of `context` tokens, in the export's dtype.",
        unit="bytes",
        above=0,
    )
    flops: float | None = prune_setting(
        None, "Maximum FLOPs of the forward pass over a prompt of `context` tokens.", unit="FLOPs", above=0
    )
    step_ms: float | None = prune_setting(
        None,
        "Maximum time of a decode step on the TPU `slice`, with `batch` rows of `context` tokens (roofline estimate of "
        "`vlmprune plan`).",
        unit="ms",
        above=0,
    )
    decode_ms: float | None = prune_setting(
        None,
        "Maximum decode time per token, on the machine and engine of the measurements in `bench`.",
        unit="ms",
        above=0,
    )
    bench: str | None = prune_setting(
        None,
        "File with measured decode times of the unpruned and of smaller models, for `decode_ms`; `vlmprune bench "
        "--model=DIR --against=PRUNED --json=FILE.json` writes it. Times for other sizes are interpolated.",
        by_content=True,
    )
    context: int = prune_setting(
        4096,
        "Sequence length, image tokens included, for computing memory, FLOPs and time; if `max_image_tokens` removes N "
        "image tokens, the sequence is N tokens shorter.",
        unit="tokens",
        least=1,
        most=2**31,
    )
    batch: int = prune_setting(
        1, "Number of sequences decoded together, for memory and time.", unit="sequences", least=1, most=2**31
    )
    images: int = prune_setting(
        1, "Number of images, tiles or temporal patches of videos in the prompt.", unit="images", least=0, most=10_000
    )
    image_tokens: int = setting(
        0, "Number of tokens per image (0 = typical for the model).", unit="tokens", least=0, offered=False
    )
    slice: str = prune_setting("v5e:1x1", "TPU slice for `step_ms`, such as v5e:2x4.")
    dtype: str = setting("bfloat16", "Data type of weights and key/value cache.", choices=tuple(DTYPES), offered=False)
    uneven: str = setting(
        "per_layer",
        "Export of layers of unequal width, as in `export.uneven`.",
        choices=UNEVEN,
        offered=False,
    )
    layout: str = setting(
        "source",
        "Tensor names and config of the export, as in `export.layout`.",
        choices=LAYOUTS,
        offered=False,
    )
    source_dir: str | None = setting(
        None,
        "Folder of the unpruned model; `disk_bytes` then also counts tensors that exports copy from this folder.",
        offered=False,
    )
    vision_dir: str | None = setting(
        None, "Folder of the unpruned model's vision tower, if `source_dir` does not include it.", offered=False
    )
    other_bytes: int = setting(
        0, "Size of the weights that an export copies unchanged (part of `disk_bytes`).", unit="bytes", offered=False
    )
    exported: Callable[..., Any] | None = setting(
        None,
        "Function from a pruned model's config to that of its export, whose layers may be wider (None = as wide).",
        offered=False,
    )
    curve: tuple[tuple[float, float], ...] = setting(
        (),
        "Measured decode times as pairs (number of parameters, milliseconds per token), instead of the file `bench`.",
        offered=False,
    )

    def __post_init__(self) -> None:
        check_settings("prune.budget", self)
        if not all(0 < value < float("inf") for point in self.curve for value in point):
            raise UserError(
                f"prune.budget.curve={self.curve!r} must be pairs of positive numbers (parameters, milliseconds per "
                "token)"
            )
        if self.decode_ms is not None and self.bench is None and not self.curve:
            raise UserError(
                "prune.budget.decode_ms needs measured decode times: run `vlmprune bench --model=DIR --against=PRUNED "
                "--json=FILE.json`, where PRUNED is any pruned copy, and set prune.budget.bench to FILE.json"
            )

    @property
    def limits(self) -> dict[str, float]:
        """Budget limits that the user set, as {setting name: limit}."""
        return {name: limit for name in LIMITS if (limit := getattr(self, name)) is not None}

    @property
    def given(self) -> dict[str, Any]:
        """Budget settings that differ from their defaults, as {setting name: JSON value}."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["curve"] = [list(point) for point in self.curve] or ()
        del values["exported"]
        return {name: value for name, value in values.items() if value != getattr(Budget, name)}
