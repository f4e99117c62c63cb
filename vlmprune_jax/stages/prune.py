"""Scores -> `plan.json` and the pruned model's folder `pruned/`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NotRequired, TypedDict

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError, error_context
from vlmprune_jax.core.files import Count, Finite
from vlmprune_jax.data import inputs
from vlmprune_jax.data.batching import Batch
from vlmprune_jax.distributed.mesh import on_process_zero
from vlmprune_jax.experiment.arguments import export_dtype, plan_config
from vlmprune_jax.experiment.spec import Experiment, PruneSpec, affecting
from vlmprune_jax.export.folder import MAX_SHARD_BYTES, make_tensors
from vlmprune_jax.export.target import make_target
from vlmprune_jax.export.uneven import padded_stacks
from vlmprune_jax.hf.disk.checkpoint import Checkpoint
from vlmprune_jax.hf.disk.dtypes import DTYPES
from vlmprune_jax.hf.disk.tensors import bytes_on_disk
from vlmprune_jax.hf.read import read_config
from vlmprune_jax.models.params import count_params
from vlmprune_jax.prune import CRITERIA, KeptStack, PrunePlan, Scores, prune_folder, prune_iteratively
from vlmprune_jax.prune.cost import amount
from vlmprune_jax.prune.select import moved_features, plan_stacks
from vlmprune_jax.stages.context import (
    Context,
    load_model,
    model_inputs,
    open_folder,
    save_model,
    teacher_folder,
)
from vlmprune_jax.stages.score import criteria_of, criterion_files, stacks_of
from vlmprune_jax.workdir.ledger import Json, write_text


class _Facts(TypedDict):
    """What `plan_facts` tells."""

    method: str
    criterion: str
    ratio_asked: Finite | None
    ratio_reached: Finite
    decoder_ratio: Finite
    parameters: Count
    parameters_before: Count
    removed_layers: list[Count]
    tower_ratio: NotRequired[Finite]


def prune_stage(experiment: Experiment, folder: Path, context: Context) -> Json:
    """Scores -> `plan.json` and the pruned model's folder `pruned/`."""
    criteria = criteria_of(experiment)
    scores = {name: folder / name for name in criteria}
    for path in scores.values():
        if not path.is_file():
            raise UserError(f"{path}: no such scores file: run `vlmprune score` (or `vlmprune run`) first")
    iterative = experiment.prune.steps > 1
    if iterative and experiment.prune.stack == "both":
        raise UserError('prune.steps: rounds are of one stack: set prune.stack to "text" or "vision"')
    settings = affecting("prune", experiment)
    if experiment.prune.budget.limits:
        settings |= affecting("export", experiment)
    if iterative:  # it scores as well
        settings |= affecting("score", experiment)
    needs_data = iterative and CRITERIA[experiment.score.width].needs_batches
    records = inputs.record_files(experiment.data, "train") if needs_data else {}
    own = criterion_files(criteria.values()) if iterative else {}
    bench = experiment.prune.budget.bench
    measured = {} if bench is None else {"prune.budget.bench": Path(bench)}
    stage = context.stage(
        "prune",
        folder,
        "prune",
        settings=settings,
        inputs=model_inputs(experiment.model, **scores, **records, **own, **measured),
        outputs=[folder / "plan.json", folder / "pruned"],
        facts=_Facts,
    )

    def body() -> Json:
        if iterative:
            plan, cfg = _prune_in_steps(experiment, next(iter(scores.values())), folder / "pruned")
        else:
            plan, cfg = _prune_files(experiment, folder, folder / "pruned")
        write_text(folder / "plan.json", plan.to_json())
        facts = plan_facts(plan, cfg)
        context.reporter.say(
            f"  {plan.method}: {_percent(plan.asked)} asked, {_percent(plan.reached)} of all parameters reached "
            f"({_of_parts(facts)})"
        )
        for line in _budget_lines(plan):
            context.reporter.say(line)
        moved = moved_features(plan, cfg)
        if moved is not None:
            context.reporter.say(f"  {moved}")
        context.reporter.say(
            f"  {facts['parameters']:,} of {facts['parameters_before']:,} parameters left"
            + "".join(_layers_gone(name, stack) for name, stack in plan.stacks.items())
        )
        return facts

    return context.run(stage, body)


def _prune_files(experiment: Experiment, folder: Path, out_dir: Path) -> tuple[PrunePlan, ModelConfig]:
    """Plan from the scores, applied from file to file: the model is not loaded."""
    source, vision_dir = teacher_folder(experiment.model), experiment.model.vision_dir
    scores: list[Scores | tuple[Scores, Scores]] = []
    for stack in stacks_of(experiment):
        first, *second = [_load(folder / name, stack) for name in criteria_of(experiment, stack)]
        scores.append((first, second[0]) if second else first)
    _, cfg = read_config(source, None if vision_dir is None else Path(vision_dir))
    with error_context(" and ".join(str(folder / name) for name in criteria_of(experiment))):
        plan = plan_stacks(scores, cfg, _plan_config(experiment, cfg))
    on_process_zero(lambda: prune_folder(source, plan, out_dir, vision_dir=vision_dir, dtype=experiment.model.dtype))
    return plan, cfg


def _load(path: Path, stack: str) -> Scores:
    scores = Scores.load(path)
    if scores.stack != stack:
        raise UserError(f"{path}: scores of the {scores.stack} stack, not of the {stack} stack: score again")
    return scores


def _prune_in_steps(experiment: Experiment, scores: Path, out_dir: Path) -> tuple[PrunePlan, ModelConfig]:
    """Rounds of scoring and pruning, the first from `scores`; the model that the last one leaves is written."""
    spec, criterion = experiment.prune, experiment.score.width
    source = teacher_folder(experiment.model)
    model = load_model(experiment.model, experiment.mesh, source)

    def batches(step: int) -> list[Batch]:
        if not CRITERIA[criterion].needs_batches:
            return []
        score = experiment.score
        return inputs.calibration_batches(experiment.model, experiment.data, score, model.cfg, seed=score.seed + step)

    pruned, plan, _ = prune_iteratively(
        model,
        batches,
        _plan_config(experiment, model.cfg),
        steps=spec.steps,
        criterion=criterion,
        scores=_load(scores, spec.stack),
        stack=spec.stack,
        score_config=experiment.score,
    )
    save_model(pruned, out_dir, experiment.model, source, plan)
    return plan, model.cfg


def _plan_config(experiment: Experiment, cfg: ModelConfig) -> PruneSpec:
    """Return `plan_config`; a limit on exported bytes also gets the size of weights that are exported unchanged."""
    config = plan_config(experiment)
    if config.budget.disk_bytes is not None:
        spec, source, dtype = experiment.export, teacher_folder(experiment.model), export_dtype(experiment)
        if spec.format != "huggingface" or spec.quantize != "none":
            raise UserError(
                "prune.budget.disk_bytes counts the bytes of a folder of plain weights, and export.format and "
                "export.quantize ask for others: leave it out"
            )
        target = make_target(cfg, source, spec.layout, spec.uneven, dtype)
        tensors = make_tensors(open_folder(experiment.model, source), target, Checkpoint(source), dtype)
        computed = padded_stacks(cfg) if spec.uneven == "pad" else cfg
        other = bytes_on_disk(tensors, MAX_SHARD_BYTES) - count_params(computed) * DTYPES[dtype].itemsize
        config = dataclasses.replace(config, budget=dataclasses.replace(config.budget, other_bytes=other))
    return config


def _budget_lines(plan: PrunePlan) -> list[str]:
    """What the limits of a budget came to."""
    limits, reached = (plan.options.get(name, {}) for name in ("budget", "budget_reached"))
    return [f"  {name}: {amount(cost)} of {amount(limits[name])} allowed" for name, cost in reached.items()]


def plan_facts(plan: PrunePlan, cfg: ModelConfig) -> Json:
    """What tables and reports tell about a plan."""
    lost = {}
    for name in plan.stacks:
        before, after = (count_params(one, name) for one in (cfg, plan.apply_to(cfg)))
        lost[name] = (before - after) / before
    tower = {"tower_ratio": lost["vision"]} if "vision" in lost else {}
    return {
        "method": plan.method,
        "criterion": plan.criterion,
        "ratio_asked": plan.asked,
        "ratio_reached": plan.reached,
        "decoder_ratio": lost["text"],
        **tower,
        "parameters": plan.parameters_after,
        "parameters_before": plan.parameters_before,
        "removed_layers": list(plan.removed_layers),
    }


def _percent(value: float | None) -> str:
    return "no ratio" if value is None else f"{100 * value:.2f} %"


def _of_parts(facts: Json) -> str:
    """What the decoder lost and, in a plan that is about it, the tower."""
    decoder = f"{_percent(facts['decoder_ratio'])} of the decoder"
    return f"{decoder}, {_percent(facts['tower_ratio'])} of the tower" if "tower_ratio" in facts else decoder


def _layers_gone(name: str, stack: KeptStack) -> str:
    of = "" if name == "text" else " of the tower"
    return f"; without layers {', '.join(map(str, stack.removed_layers))}{of}" if stack.removed_layers else ""
