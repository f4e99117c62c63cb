"""Importance scores of the unpruned model -> `scores*.npz`; these -> `plan.json` and the pruned model's `pruned/`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.files import Count
from vlmprune_jax.base.processes import is_main_process, on_process_zero
from vlmprune_jax.core.config import STACKS, ModelConfig
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.part import LAYERS, Key
from vlmprune_jax.core.prune import CRITERIA, Scores, fingerprint, score
from vlmprune_jax.core.prune.config import PlanConfig, ScoreConfig
from vlmprune_jax.core.prune.cost import amount
from vlmprune_jax.core.prune.criteria.weights import random_scores
from vlmprune_jax.core.prune.fingerprints import shape_digest
from vlmprune_jax.core.prune.routing import ROUTING, Routing
from vlmprune_jax.core.prune.select import moved_features
from vlmprune_jax.core.prune.tables import Table, affected_tokens, explain
from vlmprune_jax.core.prune.vocabulary import check_size
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import SCHEMES
from vlmprune_jax.io.data import inputs
from vlmprune_jax.io.data.batching import Batch
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.exports.formats import ExportSpec
from vlmprune_jax.io.exports.gptq import check_on_tpus, make_storage
from vlmprune_jax.io.exports.pruning import make_plan, prune_folder, prune_iteratively
from vlmprune_jax.io.families import family_of
from vlmprune_jax.io.families.limits import unusual_counts
from vlmprune_jax.run.experiment.arguments import plan_config
from vlmprune_jax.run.experiment.spec import affecting
from vlmprune_jax.run.stages.vocabulary import report_vocabulary, sources_of, vocabulary_files, vocabulary_lines
from vlmprune_jax.run.stages.work import Work, journal_path
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.content import content_key, made_from
from vlmprune_jax.run.workdir.ledger import Task, write_text
from vlmprune_jax.run.workdir.steps import PruneFacts
from vlmprune_jax.run.workdir.vocabulary import VOCABULARY

_FILES = {"text": "scores", "vision": "scores_vision"}


class ScoreFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Result of the score stage: criterion per scores file, number of records, unreadable record ids."""

    criteria: dict[str, str]
    samples: Count
    skipped: list[str] = []


def stacks_of(prune: PlanConfig) -> tuple[str, ...]:
    """Return the names of the stacks to prune."""
    return STACKS if prune.stack == "both" else (prune.stack,)


def criteria_of(spec: ScoreConfig, prune: PlanConfig, stack: str | None = None) -> dict[str, str]:
    """Return {scores file: criterion} that the pruning method needs; {} if it needs no scores."""
    if not prune.needs_scores:
        return {}
    files = [*zip(("", "_width"), spec.criteria(prune.method), strict=False)]
    stacks = stacks_of(prune) if stack is None else (stack,)
    return {f"{_FILES[name]}{suffix}.npz": criterion for name in stacks for suffix, criterion in files}


def criterion_files(criteria: Iterable[str]) -> dict[str, Path]:
    """Return the source files of users' criteria, on which scores depend."""
    files = {f"criterion {name}": CRITERIA[name].file for name in criteria}
    return {name: path for name, path in files.items() if path is not None}


def _parts(output: Path) -> Path:
    """Return the folder in which an interrupted layer-by-layer scoring pass saves its finished layers."""
    return output.with_name(f".{output.name}.parts")


def score_task(task: Task, work: Work, data: DataSpec, spec: ScoreConfig, prune: PlanConfig) -> Task:
    """Add the score stage's files: a scores file per criterion, and the calibration records."""
    criteria = criteria_of(spec, prune)
    needs_records = any(CRITERIA[criterion].needs_batches for criterion in criteria.values())
    records = inputs.record_files(data, "train") if needs_records else {}
    outputs = [work.folder / name for name in criteria]
    return task.add(
        inputs={**records, **criterion_files(criteria.values())},
        outputs=outputs,
        journals=[path for output in outputs for path in (journal_path(output), _parts(output))],
        settings={"criteria": criteria},
        without=("score.depth", "score.width"),  # those that the method needs are its criteria
    )


def score_stage(work: Work, data: DataSpec, spec: ScoreConfig, prune: PlanConfig) -> ScoreFacts:
    """Score the layers, or heads and neurons, of every stack to prune."""
    model, criteria = work.load(work.teacher), criteria_of(spec, prune)
    for stack in stacks_of(prune):
        model.cfg.stack(stack)  # refuses a stack that the model does not have before the first pass
    needed = [CRITERIA[criterion] for criterion in criteria.values()]
    batches, key, routing = None, "", None
    if any(criterion.needs == "routing" for criterion in needed):
        # Of the same records and model, the routing of tokens is known from an earlier run.
        named = affecting("score", {"model": work.model, "data": data})
        named |= {name: getattr(spec, name) for name in ("samples", "longest_text", "seed")}
        key = content_key(made_from(named, {**work.model_files, **inputs.record_files(data, "train")}, 1))
        with contextlib.suppress(UserError):
            stored = Routing.load(work.folder / ROUTING)
            routing = stored if (stored.made_from, stored.fingerprint) == (key, fingerprint(model)) else None
    if any(criterion.needs_batches and (criterion.needs != "routing" or routing is None) for criterion in needed):
        batches = inputs.calibration_batches(work.model, data, spec, model.cfg, seed=spec.seed)
    settings = affecting("score", {"model": work.model, "data": data, "score": spec})
    for stack in stacks_of(prune):
        for name, criterion in criteria_of(spec, prune, stack).items():
            chosen, output = CRITERIA[criterion], work.folder / name
            total = chosen.total(model.cfg, batches or [], stack)
            options: dict[str, Any] = {"stack": stack}
            if chosen.needs == "routing":
                options["routing"] = routing
            if chosen.needs == "labels":
                origin = {"criterion": criterion, "settings": settings, "mesh": vars(work.experiment.mesh)}
                options["cache"] = ArrayCache(_parts(output), origin)
            else:
                options["journal"] = work.journal(output, {"batches": total})
            title = criterion if stack == "text" else f"{criterion} of the tower"
            with work.phase(f"score ({title})", total) as progress:
                scores = score(model, batches, spec, criterion=criterion, progress=progress, **options)
            if is_main_process():
                scores.save(output)
                if scores.routing is not None and routing is None:
                    dataclasses.replace(scores.routing, made_from=key).save(work.folder / ROUTING)
    skipped = [name for batch in batches or [] for name, _ in batch.skipped]
    if skipped:
        work.say(f"  {len(skipped)} unreadable records were skipped: {', '.join(skipped[:5])}")
    return ScoreFacts(criteria=criteria, samples=0 if batches is None else spec.samples, skipped=skipped)


def prune_task(
    task: Task, work: Work, data: DataSpec, score: ScoreConfig, spec: PlanConfig, export: ExportSpec
) -> Task:
    """Add the prune stage's inputs: scores, and measured speeds if the budget needs them.

    Raises UserError for pruning in several steps if more than one stack is pruned.
    """
    criteria, iterative = criteria_of(score, spec), spec.steps > 1 and spec.needs_scores
    if iterative and spec.stack == "both":
        raise UserError('prune.steps > 1 cannot prune both stacks at once: set prune.stack to "text" or "vision"')
    sections = {"model": work.model, "data": data, "score": score, "export": export}
    needs_records = iterative and CRITERIA[score.width].needs_batches
    return task.add(
        inputs={
            **{name: work.folder / name for name in criteria},
            **(inputs.record_files(data, "train") if needs_records else {}),
            **(criterion_files(criteria.values()) if iterative else {}),
            **({} if spec.budget.bench is None else {"prune.budget.bench": Path(spec.budget.bench)}),
            **vocabulary_files(spec.vocabulary, data),
        },
        settings={
            **(affecting("export", sections) if spec.budget.limits else {}),
            **(affecting("score", sections) if iterative else {}),
        },
        outputs=[] if spec.vocabulary.size is None else [work.folder / VOCABULARY],
    )


def prune_stage(work: Work, data: DataSpec, score: ScoreConfig, spec: PlanConfig, export: ExportSpec) -> PruneFacts:
    """Make a plan from scores; write the plan and the pruned model."""
    scores = [_load(work.folder / name, stack) for stack in stacks_of(spec) for name in criteria_of(score, spec, stack)]
    cfg, config = work.config(work.teacher), _plan_config(work, data, spec, export)
    if not spec.needs_scores:
        plan = make_plan(None, work.open_model(work.teacher), config)
    elif spec.steps > 1:
        model = work.load(work.teacher)

        def batches(step: int) -> list[Batch]:
            if not CRITERIA[score.width].needs_batches:
                return []
            return inputs.calibration_batches(work.model, data, score, model.cfg, seed=score.seed + step)

        kept: dict[str, Any] = {"criterion": score.width, "scores": scores[0], "score_config": score}
        _, plan, _ = prune_iteratively(model, batches, config, **kept)
    else:
        with error_context(" and ".join(str(work.folder / name) for name in criteria_of(score, spec))):
            plan = make_plan(scores, cfg, config)
    _check_integers(plan.apply_to(cfg), spec, export)
    routing = Routing.of_plan(work.folder / ROUTING, plan)
    on_process_zero(
        lambda: prune_folder(work.teacher, plan, work.out, vision_dir=work.model.vision_dir, dtype=work.model.dtype)
    )
    write_text(work.folder / "plan.json", plan.to_json())
    if plan.vocabulary is not None:
        report = report_vocabulary(work, sources_of(spec.vocabulary, data), plan.vocabulary)
        write_artefact(work.folder / VOCABULARY, report)
        for line in vocabulary_lines(report):
            work.say(f"  {line}")
    before, after = ({name: count_params(of, name) for name in plan.stacks} for of in (cfg, plan.apply_to(cfg)))
    lost = {name: (before[name] - after[name]) / before[name] for name in before}
    facts = PruneFacts(decoder_ratio=lost["text"], tower_ratio=lost.get("vision"))
    tower = "" if facts.tower_ratio is None else f", {_percent(facts.tower_ratio)} of the tower"
    work.say(
        f"  {plan.method}: {_percent(plan.actual_ratio)} of all parameters removed "
        f"({_percent(facts.decoder_ratio)} of the decoder{tower}), "
        f"{_percent(plan.target_ratio)} requested"
    )
    notices = [notice for notice in (moved_features(plan, cfg), unusual_counts(plan, cfg)) if notice is not None]
    limits, reached = (plan.options.get(name, {}) for name in ("budget", "budget_reached"))
    lines = [f"{name}: {amount(cost)} of {amount(limits[name])} allowed" for name, cost in reached.items()]
    if routing is not None:
        _, (_, *names), (*_, (_, *means)) = affected_tokens(plan, routing)
        shares = ", ".join(f"{mean} of {name}" for name, mean in zip(names, means, strict=True))
        lines.append(f"in the mean over layers, {shares} lose an expert")
    for line in (*lines, *notices):
        work.say(f"  {line}")
    gone = [(stack.removed_layers, "" if name == "text" else " of the tower") for name, stack in plan.stacks.items()]
    without = "".join(f"; without layers {', '.join(map(str, layers))}{part}" for layers, part in gone if layers)
    work.say(f"  {plan.parameters_after:,} of {plan.parameters_before:,} parameters left{without}")
    return facts


def check_plan(work: Work, data: DataSpec, score: ScoreConfig, spec: PlanConfig, export: ExportSpec) -> None:
    """Raise UserError for a target that no plan can reach, found by planning with random scores.

    If the vocabulary is trimmed, only its size is checked, because choosing tokens would read all source texts.
    """
    cfg = work.config(work.teacher)
    check_size(spec.vocabulary.size, cfg.text.vocab_size)
    if spec.vocabulary.size is not None:
        return
    if not spec.needs_scores:
        make_plan(None, work.open_model(work.teacher), _plan_config(work, data, spec, export))
        return

    def drawn(criterion: str, stack: str) -> Scores:
        options: dict[str, Any] = {"gqa": score.gqa}
        arrays = random_scores(cfg, seed=0, gqa=score.gqa, stack=stack)
        if "layers_removed" in CRITERIA[criterion].options and (span := score.layers_removed) is not None:
            options["layers_removed"] = span
            key = Key(stack, None, LAYERS)
            arrays = {**arrays, key: arrays[key][: max(0, len(arrays[key]) + 1 - span)]}
        return Scores(criterion, f"{shape_digest(cfg)}-", options, arrays)

    scores = [drawn(name, stack) for stack in stacks_of(spec) for name in criteria_of(score, spec, stack).values()]
    spec = dataclasses.replace(spec, steps=1)
    make_plan(scores, cfg, _plan_config(work, data, spec, export))


def _load(path: Path, stack: str) -> Scores:
    scores = Scores.load(path)
    if scores.components != (stack,):
        raise UserError(
            f"{path}: has scores for the {scores.components[0]} stack, expected the {stack} stack: score again"
        )
    return scores


def _check_integers(cfg: ModelConfig, spec: PlanConfig, export: ExportSpec) -> None:
    """Raise UserError for an `export.quantize` that an engine in `prune.loads_in` cannot load."""
    if "vllm_tpu" in spec.loads_in and export.quantize in SCHEMES:
        storage = make_storage(cfg, family_of(cfg), export.quantize, export.group_size, export.symmetric)
        check_on_tpus(cfg, storage, spec.tensor_parallel)


def _plan_config(work: Work, data: DataSpec, spec: PlanConfig, export: ExportSpec) -> PlanConfig:
    """Return the plan's settings; a limit on exported bytes counts all exported weights."""
    config = plan_config(spec, work.model, data, export)
    if config.budget.disk_bytes is not None:
        if export.format != "huggingface" or export.quantize != "none":
            raise UserError(
                "prune.budget.disk_bytes is only for unquantised Hugging Face exports, but export.format or "
                "export.quantize selects another format: unset disk_bytes"
            )
        source, tower = str(work.teacher), work.model.vision_dir
        budget = dataclasses.replace(config.budget, layout=export.layout, source_dir=source, vision_dir=tower)
        config = dataclasses.replace(config, budget=budget)
    vocabulary = dataclasses.replace(sources_of(spec.vocabulary, data), source_dir=str(work.teacher))
    return dataclasses.replace(config, vocabulary=vocabulary)


def explain_plan(work: Work, score: ScoreConfig, spec: PlanConfig) -> list[Table]:
    """Return tables of each layer's pruned widths with reasons; none if no scores are needed."""
    if not spec.needs_scores:
        return []
    scores = [Scores.load(work.folder / name) for name in criteria_of(score, spec)]
    routing = Routing.of_plan(work.folder / ROUTING, work.plan)
    return explain(work.plan, work.config(work.teacher), spec, scores, routing)


def _percent(value: float | None) -> str:
    return "no ratio" if value is None else f"{100 * value:.2f} %"
