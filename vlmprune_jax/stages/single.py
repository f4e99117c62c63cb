"""The stages themselves: folder in, folder out, skipped when nothing changed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vlmprune_jax.config import ModelConfig
from vlmprune_jax.distributed.mesh import from_main, is_main_process
from vlmprune_jax.errors import UserError
from vlmprune_jax.evaluate.runner import evaluate, perplexity
from vlmprune_jax.hf.card import model_name
from vlmprune_jax.hf.check import check_export
from vlmprune_jax.hf.read import read_config
from vlmprune_jax.hf.write import save
from vlmprune_jax.models.params import count_params, flatten
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune import CRITERIA, PrunePlan, Scores, make_plan, prune_folder, prune_iteratively, score
from vlmprune_jax.prune.surgery import check_plan_is_for
from vlmprune_jax.recover import recover
from vlmprune_jax.recover.peft import write_adapter
from vlmprune_jax.recover.trainable import assign_groups, merge_lora
from vlmprune_jax.stages import inputs
from vlmprune_jax.stages.context import Context, journal_of, load_model, mesh_of, open_folder, teacher_folder
from vlmprune_jax.stages.features import cached_features, load_for_training, with_tower
from vlmprune_jax.stages.ledger import Json, remove, write_json, write_text
from vlmprune_jax.stages.settings import plan_options, recover_config
from vlmprune_jax.stages.spec import DataSpec, Experiment
from vlmprune_jax.stages.teacher_cache import cached_teacher

_NOT_IN_RESULTS: tuple[str, ...] = (
    "source",
    "train",
    "eval",
    "images",
    "eval_images",
    "cache_megabytes",
    "feature_cache",
    "threads",
    "max_image_pixels",
)
_ONLY_TRAINING = ("max_length", "truncate", "length_buckets", "on_error")
_ONLY_RECOVERY = ("fraction", "seed", "group_by")


def _model_inputs(experiment: Experiment, **folders: Path | str) -> dict[str, Path | str]:
    found: dict[str, Path | str] = {"model.hf_dir": teacher_folder(experiment), **folders}
    if experiment.model.vision_dir is not None:
        found["model.vision_dir"] = Path(experiment.model.vision_dir)
    return found


def _data_settings(data: DataSpec, purpose: str) -> dict[str, Any]:
    """What of the data settings a "recovery", a "calibration" or an "evaluation" depends on."""
    dropped = _NOT_IN_RESULTS
    if purpose != "recovery":
        dropped += _ONLY_RECOVERY
    if purpose == "evaluation":
        dropped += _ONLY_TRAINING
    return {f"data.{k}": v for k, v in vars(data).items() if k not in dropped}


def criteria_of(experiment: Experiment) -> dict[str, str]:
    """Scores file -> criterion, as the method needs them."""
    spec, method = experiment.score, experiment.prune.method
    if method == "hybrid":
        return {"scores.npz": spec.depth, "scores_width.npz": spec.width}
    return {"scores.npz": spec.width if method == "width" else spec.depth}


def _score_options(experiment: Experiment, criterion: str) -> dict[str, Any]:
    known = CRITERIA.get(criterion, {})
    return {k: v for k, v in vars(experiment.score).items() if v is not None and k in known}


def _journal(output: Path) -> Path:
    """Where the pass that makes a file keeps what its batches gave."""
    return output.with_name(f"{output.name}.journal")


def score_stage(experiment: Experiment, folder: Path, context: Context) -> Json:
    """Importances of the unpruned model -> `scores.npz` (hybrid: also `scores_width.npz`)."""
    criteria = criteria_of(experiment)
    settings = {f"score.{k}": v for k, v in vars(experiment.score).items() if k not in ("depth", "width")}
    needs_data = any(c in ("block_influence", "angular", "taylor") for c in criteria.values())
    stage = context.stage(
        "score",
        folder,
        "score",
        settings={
            "criteria": criteria,
            **settings,
            **_data_settings(experiment.data, "calibration"),
            **_precision(experiment),
        },
        inputs=_model_inputs(experiment, **(inputs.record_files(experiment.data, "train") if needs_data else {})),
        outputs=[folder / name for name in criteria],
        journals=[_journal(folder / name) for name in criteria],
    )

    def body() -> Json:
        model = load_model(experiment, teacher_folder(experiment))
        batches = None
        if needs_data:
            batches = inputs.calibration_batches(experiment, model.cfg, seed=experiment.score.seed)
        for name, criterion in criteria.items():
            total = len(model.cfg.text.layers) if criterion == "taylor" else len(batches or [])
            journal = journal_of(experiment, _journal(folder / name), total)
            with context.phase(f"score ({criterion})", total) as progress:
                options = _score_options(experiment, criterion)
                scores = score(model, batches, criterion=criterion, progress=progress, journal=journal, **options)
            if is_main_process():
                scores.save(folder / name)
        skipped = [name for batch in batches or [] for name, _ in batch.skipped]
        if skipped:
            context.reporter.say(f"  {len(skipped)} unreadable records were passed over: {', '.join(skipped[:5])}")
        facts = {"criteria": criteria, "samples": experiment.score.samples if needs_data else 0}
        return {**facts, "skipped": skipped} if skipped else facts

    return context.run(stage, body)


def _precision(experiment: Experiment) -> dict[str, Any]:
    return {"model.dtype": experiment.model.dtype}


def prune_stage(experiment: Experiment, folder: Path, context: Context) -> Json:
    """Scores -> `plan.json` and the pruned model's folder `pruned/`."""
    criteria = criteria_of(experiment)
    scores = {name: folder / name for name in criteria}
    for path in scores.values():
        if not path.is_file():
            raise UserError(f"{path}: no such scores file: run `vlmprune score` (or `vlmprune run`) first")
    iterative = experiment.prune.steps > 1
    settings = {f"prune.{k}": v for k, v in vars(experiment.prune).items()}
    if iterative:
        settings |= _data_settings(experiment.data, "calibration")
        settings |= {f"score.{k}": v for k, v in vars(experiment.score).items()}
    records = inputs.record_files(experiment.data, "train") if iterative else {}
    stage = context.stage(
        "prune",
        folder,
        "prune",
        settings={**settings, **_precision(experiment)},
        inputs=_model_inputs(experiment, **scores, **records),
        outputs=[folder / "plan.json", folder / "pruned"],
    )

    def body() -> Json:
        if iterative:
            plan, cfg = _prune_in_steps(experiment, folder / "pruned")
        else:
            plan, cfg = _prune_files(experiment, list(scores.values()), folder / "pruned")
        write_text(folder / "plan.json", plan.to_json())
        facts = plan_facts(plan, cfg)
        context.reporter.say(
            f"  {plan.method}: {_percent(plan.asked)} asked, {_percent(plan.reached)} of all parameters reached "
            f"({_percent(facts['decoder_ratio'])} of the decoder)"
        )
        context.reporter.say(
            f"  {facts['parameters']:,} of {facts['parameters_before']:,} parameters left{_layers_gone(plan)}"
        )
        return facts

    return context.run(stage, body)


def _prune_files(experiment: Experiment, scores: list[Path], out_dir: Path) -> tuple[PrunePlan, ModelConfig]:
    """Plan from the scores, applied from file to file: the model is not loaded."""
    spec, source, vision_dir = experiment.prune, teacher_folder(experiment), experiment.model.vision_dir
    first, *second = [Scores.load(path) for path in scores]
    _, cfg = read_config(source, None if vision_dir is None else Path(vision_dir))
    plan = make_plan(
        (first, second[0]) if second else first,
        cfg,
        method=spec.method,
        ratio=spec.ratio,
        layers_removed=spec.layers_removed,
        **plan_options(spec),
    )
    from_main(lambda: prune_folder(source, plan, out_dir, vision_dir=vision_dir, dtype=experiment.model.dtype))
    return plan, cfg


def _prune_in_steps(experiment: Experiment, out_dir: Path) -> tuple[PrunePlan, ModelConfig]:
    """Rounds of scoring and pruning; the model that the last one leaves is written."""
    spec, criterion = experiment.prune, experiment.score.width
    if spec.method != "width":
        raise UserError(f"prune.steps={spec.steps} is for method 'width': depth and hybrid prune in one step")
    source = teacher_folder(experiment)
    model = load_model(experiment, source)
    pruned, plan = prune_iteratively(
        model,
        lambda step: inputs.calibration_batches(experiment, model.cfg, seed=experiment.score.seed + step),
        steps=spec.steps,
        criterion=criterion,
        score_options=_score_options(experiment, criterion),
        ratio=spec.ratio,
        **plan_options(spec),
    )
    save_model(pruned, out_dir, experiment, source, plan)
    return plan, model.cfg


def plan_facts(plan: PrunePlan, cfg: ModelConfig) -> Json:
    """What tables and reports tell about a plan."""
    gone = plan.parameters_before - plan.parameters_after
    return {
        "method": plan.method,
        "criterion": plan.criterion,
        "ratio_asked": plan.asked,
        "ratio_reached": plan.reached,
        "decoder_ratio": gone / count_params(cfg, "text"),
        "parameters": plan.parameters_after,
        "parameters_before": plan.parameters_before,
        "removed_layers": list(plan.removed_layers),
    }


def _percent(value: float | None) -> str:
    return "no ratio" if value is None else f"{100 * value:.2f} %"


def _layers_gone(plan: PrunePlan) -> str:
    return f"; without layers {', '.join(map(str, plan.removed_layers))}" if plan.removed_layers else ""


def save_model(model: Model, out_dir: Path, experiment: Experiment, source_dir: Path, plan: PrunePlan) -> None:
    """An intermediate folder: source layout, true widths, the experiment's dtype."""
    save(
        model,
        out_dir,
        source_dir=source_dir,
        layout="source",
        uneven="per_layer",
        dtype=experiment.model.dtype,
        plan=plan,
        name=model_name(teacher_folder(experiment)),
        recovered=out_dir.name == "recovered",
    )


def recover_stage(experiment: Experiment, prune_folder: Path, folder: Path, context: Context) -> Json:
    """Pruned model + training records -> `recovered/`; curves stay in `training/metrics.jsonl`."""
    pruned, training = prune_folder / "pruned", folder / "training"
    if not pruned.is_dir():
        raise UserError(f"{pruned}: no such folder: run `vlmprune prune` (or `vlmprune run`) first")
    spec, config = experiment.recover, recover_config(experiment.recover)
    settings = {f"recover.{k}": v for k, v in dataclasses.asdict(experiment.recover).items() if k not in _FREE_RECOVER}
    settings["recover.teacher_top_k"] = config.losses.teacher_top_k
    stage = context.stage(
        "recover",
        folder,
        "recover",
        settings={**settings, **_data_settings(experiment.data, "recovery"), **_precision(experiment)},
        inputs=_model_inputs(experiment, pruned=pruned, **inputs.record_files(experiment.data, "train")),
        outputs=[folder / "recovered", *([folder / "adapter"] if spec.save_adapter else [])],
        scratch=[training / "checkpoints"],
    )

    def body() -> Json:
        from_main(lambda: None if (training / "checkpoints").exists() else remove(training))
        plan = PrunePlan.from_json(prune_folder / "plan.json")
        if config.losses.needs_teacher or config.losses.teacher_top_k:  # another model would teach without complaint
            check_plan_is_for(open_folder(experiment, teacher_folder(experiment)), plan)
        features = cached_features(experiment, config, plan, pruned, context)
        taught = cached_teacher(experiment, config, context, features) if config.losses.teacher_top_k else None
        student, teacher = load_for_training(experiment, config, pruned, features)
        batches, n_records = inputs.recovery_batches(
            experiment, student.cfg, context.reporter.bar, features=features, teacher=taught
        )
        model, summary = recover(
            student,
            batches,
            config,
            teacher=teacher,
            plan=plan,
            workdir=training,
            mesh=mesh_of(experiment),
            progress=context.reporter.enabled,
            num_steps=config.num_steps(n_records),
        )
        if summary["skipped_rows"]:
            context.reporter.say(f"  {summary['skipped_rows']:,} rows skipped, listed in {training}/skipped-*.jsonl")
        model = with_tower(model, experiment, pruned)
        if spec.save_adapter:
            trained = assign_groups(list(flatten(model.params)), config.trainable)
            write_adapter(model, folder / "adapter", base_dir=pruned, trained=trained)
            model = merge_lora(model)
        save_model(model, folder / "recovered", experiment, pruned, plan)
        return {**summary, "records": n_records, "recovery": experiment.recover.name}

    return context.run(stage, body)


_FREE_RECOVER = ("name", "log_every", "save_every", "keep_checkpoints", "teacher_cache")


def evaluate_stage(experiment: Experiment, model_folder: Path, out: Path, name: str, context: Context) -> Json:
    """Accuracy (and perplexity, if a text is named) of one folder -> `eval/<name>.json`, and its answers beside."""
    spec = experiment.evaluate
    path, answers_path = out / "eval" / f"{name}.json", out / "eval" / f"{name}.answers.jsonl"
    text = {} if spec.text is None else {"evaluate.text": Path(spec.text)}
    settings = {f"evaluate.{k}": v for k, v in vars(spec).items() if k not in ("text", "unrecovered")}
    stage = context.stage(
        "evaluate",
        out,
        f"evaluate {name}",
        settings={**settings, **_data_settings(experiment.data, "evaluation"), **_precision(experiment)},
        inputs=_model_inputs(experiment, model=model_folder, **inputs.record_files(experiment.data, "eval"), **text),
        outputs=[path, answers_path],
        journals=[_journal(path)],
    )

    def body() -> Json:
        model = load_model(experiment, model_folder)
        mesh = mesh_of(experiment)
        ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        plan = inputs.question_plan(experiment, model.cfg, multiple=ways)
        tokenizer = plan.encoder.tokenizer
        batches = plan.batches(threads=experiment.data.threads, prefetch=inputs.PREFETCH)
        journal = journal_of(experiment, _journal(path), len(plan))
        with context.phase(f"evaluate {name}", len(plan)) as progress:
            result = evaluate(
                model,
                batches,
                tokenizer=tokenizer,
                max_new_tokens=spec.max_new_tokens,
                progress=progress,
                journal=journal,
            )
        facts = result.summary()
        if spec.text is not None:
            facts["perplexity"] = _text_perplexity(experiment, model, tokenizer, context)
        lines = [json.dumps(vars(answer), ensure_ascii=False) + "\n" for answer in result.answers]
        write_text(answers_path, "".join(lines))
        write_json(path, {**facts, "answers": answers_path.name})
        context.reporter.say(
            f"  {name}: {100 * result.accuracy:.2f} % of {result.questions:,} questions right "
            f"({result.parameters:,} parameters, {result.seconds:.1f} s)"
        )
        return {k: v for k, v in facts.items() if k != "seconds"}

    return context.run(stage, body)


def _text_perplexity(experiment: Experiment, model: Model, tokenizer: Any, context: Context) -> float:
    spec = experiment.evaluate
    assert spec.text is not None
    try:
        ids = tokenizer(Path(spec.text).read_text(encoding="utf-8"))["input_ids"]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluate.text={spec.text}: cannot be read as UTF-8 text ({error})") from None
    total = -(-len(ids) // (spec.text_window * spec.batch_size))
    with context.phase("perplexity", total) as progress:
        return perplexity(model, ids, window=spec.text_window, batch_size=spec.batch_size, progress=progress).perplexity


def export_stage(experiment: Experiment, model_folder: Path, context: Context) -> Json:
    """One folder of the workdir -> `export/`, reloaded and compared before it counts as done."""
    out, spec = context.workdir / "export", experiment.export
    stage = context.stage(
        "export",
        context.workdir,
        "export",
        settings={f"export.{k}": v for k, v in vars(spec).items()} | _precision(experiment),
        inputs=_model_inputs(experiment, model=model_folder),
        outputs=[out],
    )

    def body() -> Json:
        model = load_model(experiment, model_folder)
        plan = PrunePlan.from_json(model_folder / "plan.json")
        save(
            model,
            out,
            source_dir=model_folder,
            **vars(spec),
            plan=plan,
            name=model_name(teacher_folder(experiment)),
            recovered=model_folder.name == "recovered",
        )
        try:
            return check_export(model, out, vision_dir=experiment.model.vision_dir)
        except BaseException:
            if is_main_process():
                remove(out)  # a folder that failed its comparison, or was not compared, is not an export
            raise

    return context.run(stage, body)
