"""Cost limits of a pruned model, given in place of a ratio, and the workload that they refer to; no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.core.checks import check_settings, setting, with_defaults
from vlmprune_jax.core.errors import UserError

LIMITS = ("parameters", "disk_bytes", "memory_bytes", "flops", "step_ms", "decode_ms")
_PRUNE = ("prune",)


@dataclass(frozen=True)
class Budget:
    """Cost limits of a pruned model, used in place of a ratio; a plan satisfies every limit that is set.

    In an experiment, `dtype` and `uneven` come from its export. `other_bytes` are bytes of the exported weights outside
    the computed model (negative if the export leaves some of its weights out).
    """

    parameters: float | None = setting(None, "Most parameters of the whole model.", affects=_PRUNE, above=0)
    disk_bytes: float | None = setting(
        None, "Most bytes of the exported weights, in the export's dtype and layout.", affects=_PRUNE, above=0
    )
    memory_bytes: float | None = setting(
        None,
        "Most bytes of the weights and of the key/value cache of `batch` rows of `context` tokens, in the export's "
        "dtype.",
        affects=_PRUNE,
        above=0,
    )
    flops: float | None = setting(
        None, "Most FLOPs of the forward pass of a prompt of `context` tokens.", affects=_PRUNE, above=0
    )
    step_ms: float | None = setting(
        None,
        "Most milliseconds of a generation step on `slice`, a token for each of `batch` rows of `context` tokens, by "
        "the roofline of `vlmprune plan`: what arithmetic or reading weights and cache takes at least.",
        affects=_PRUNE,
        above=0,
    )
    decode_ms: float | None = setting(
        None,
        "Most milliseconds of a generated token on the machine and by the engine of `bench`.",
        affects=_PRUNE,
        above=0,
    )
    bench: str | None = setting(
        None,
        "What `decode_ms` goes by: models of several sizes, the unpruned one first, as "
        "`vlmprune bench --model=DIR --against=PRUNED --json=FILE.json` measured them; between them it is a line.",
        affects=_PRUNE,
        by_content=True,
    )
    context: int = setting(
        4096, "Tokens of a row, those of its images included.", affects=_PRUNE, unit="tokens", least=1, most=2**31
    )
    batch: int = setting(1, "Rows that are answered together.", affects=_PRUNE, unit="rows", least=1, most=2**31)
    images: int = setting(1, "Images (or tiles) of a prompt.", affects=_PRUNE, unit="images", least=0, most=10_000)
    slice: str = setting("v5e:1x1", "The TPU slice of `step_ms`, as v5e:2x4.", affects=_PRUNE)
    dtype: str = setting("bfloat16", "Of weights and cache.", choices="hf.disk.dtypes:DTYPES", offered=False)
    uneven: str = setting("per_layer", "Unequal widths on disk.", choices="export.target:UNEVEN", offered=False)
    other_bytes: int = setting(0, "Bytes on disk beside the computed model's.", offered=False)
    curve: Sequence[Sequence[float]] = setting(
        (), "(parameters, milliseconds of a token) that were measured, in place of `bench`.", offered=False
    )

    def __post_init__(self) -> None:
        check_settings("prune.budget", self)
        if not all(_is_point(point) for point in self.curve):
            raise UserError(f"prune.budget.curve={self.curve!r} must be pairs (parameters, milliseconds) above 0")
        if self.decode_ms is not None and self.bench is None and not self.curve:
            raise UserError(
                "prune.budget.decode_ms: needs measured speeds: run `vlmprune bench --model=DIR --against=PRUNED "
                "--json=FILE.json`, where PRUNED is a smaller copy, and set prune.budget.bench to that file"
            )

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {name: limit for name in LIMITS if (limit := getattr(self, name)) is not None}

    @property
    def given(self) -> dict[str, Any]:
        """Settings that differ from their defaults, in the form that `make_plan(budget=...)` takes."""
        return {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default}


def _is_point(point: Any) -> bool:
    numbers = isinstance(point, list | tuple) and all(isinstance(number, int | float) for number in point)
    return numbers and len(point) == 2 and all(0 < number < float("inf") for number in point)


def budget_of(given: Mapping[str, Any]) -> Budget:
    """Return the `Budget` for the dictionary passed to `make_plan(budget=...)`.

    Raises:
      UserError: a name that does not exist, with the nearest that does, a value that cannot be, or no limit.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"budget={given!r} must be a dictionary of limits, for example {{'parameters': 1e8}}")
    defaults = {f.name: f.default for f in dataclasses.fields(Budget)}
    values = with_defaults("budget", given, defaults)
    for name, value in values.items():
        texts, whole = isinstance(defaults[name], str) or name == "bench", isinstance(defaults[name], int)
        kind: Any = str if texts else int if whole else list | tuple if name == "curve" else int | float
        if value is not defaults[name] and (isinstance(value, bool) or not isinstance(value, kind)):
            what = "a text" if texts else "a whole number" if whole else "pairs" if name == "curve" else "a number"
            raise UserError(f"prune.budget.{name}={value!r} must be {what}")
    budget = Budget(**values)
    if not budget.limits:
        raise UserError(f"budget={dict(given)!r} has no limit: give {', '.join(LIMITS[:-1])} or {LIMITS[-1]}")
    return budget
