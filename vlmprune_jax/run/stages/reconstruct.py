"""Pruned model + calibration records -> `reconstructed/`, without training."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.files import Count, Finite
from vlmprune_jax.core.prune.reconstruct_config import ReconstructConfig
from vlmprune_jax.core.prune.reconstruction import layers_to_solve, reconstruct
from vlmprune_jax.io.data import inputs
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.run.experiment.spec import affecting
from vlmprune_jax.run.stages.work import Work


class Repaired(msgspec.Struct, frozen=True, kw_only=True):
    """Repair of one weight: its error and ridge penalty (None = left unchanged, 0 = trained)."""

    stack: str
    layer: Count
    module: str
    ridge: Finite | None
    error_before: Finite
    error_after: Finite
    tokens: Count
    unknowns: Count


class ReconstructFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Result of the reconstruct stage: number of calibration records, and a report per weight."""

    samples: Count
    modules: list[Repaired]


def reconstruct_stage(work: Work, data: DataSpec, spec: ReconstructConfig) -> ReconstructFacts:
    """Repair the pruned weights layer by layer; an interrupted run resumes at the next layer."""
    plan = work.plan
    batches = inputs.calibration_batches(work.tokens, data, spec, work.config(work.start), seed=spec.seed)
    settings = affecting("reconstruct", {"model": work.model, "data": data, "reconstruct": spec})
    with work.phase("reconstruct", layers_to_solve(plan)) as progress:
        model, reports = reconstruct(
            work.load(work.start, by_layer=True),
            plan,
            work.load(work.teacher, by_layer=True),
            batches,
            spec,
            progress=progress,
            cache=ArrayCache(work.folder / ".reconstructed.parts", {"settings": settings}),
        )
    work.save(model)
    modules = msgspec.convert(reports, list[Repaired])
    work.say(f"  {_summary(modules)}")
    scarce = [module for module in modules if module.tokens < module.unknowns]
    if scarce:
        work.say(
            f"  {scarce[0].tokens:,} calibration tokens are few for {len(scarce)} weights with "
            f"{scarce[0].unknowns:,} inputs: raise reconstruct.samples for a better repair"
        )
    return ReconstructFacts(samples=spec.samples, modules=modules)


def _summary(modules: Sequence[Repaired]) -> str:
    changed = [module for module in modules if module.ridge is not None]
    if not changed:
        return f"none of {len(modules)} weights was changed: no change reduces the error on held-out records"
    before, after = (
        sum(getattr(module, f"error_{when}") for module in changed) / len(changed) for when in ("before", "after")
    )
    return (
        f"{len(changed)} of {len(modules)} weights repaired; mean error of the residual stream on held-out records: "
        f"{before:.3f} before the repair, {after:.3f} after it"
    )
