"""Export a model of the workdir to `export/` or `export-FORMAT/`, then reload it and compare it with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.files import Finite
from vlmprune_jax.base.processes import is_main_process, on_process_zero
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune import PrunePlan
from vlmprune_jax.core.prune.reconstruct_config import ReconstructConfig
from vlmprune_jax.io.data import inputs
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.exports.card import add_evaluation, loading_lines, model_name, push
from vlmprune_jax.io.exports.formats import ExportSpec, choose_format
from vlmprune_jax.io.exports.gptq import gptq, imatrix
from vlmprune_jax.io.exports.write import check_saved, save
from vlmprune_jax.run.experiment.arguments import export_options, image_tokens, with_rounding
from vlmprune_jax.run.experiment.spec import affecting
from vlmprune_jax.run.stages.evaluate import evaluate_model, evaluation_works
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.comparison import benchmark_rows, rounded_rows
from vlmprune_jax.run.workdir.content import content_key
from vlmprune_jax.run.workdir.evaluation import TEACHER
from vlmprune_jax.run.workdir.ledger import Task, differs_only_in, remove

NEAREST = (
    "4-bit weights are rounded to the nearest integer, which usually loses more than GPTQ: with calibration records "
    "(data.train), export.rounding=gptq rounds better"
)
Rows = Sequence[tuple[str, str, str, str, str]]  # of the card's table, see `save`
# Function of a model and calibration batches, by the name that a format's `Calibration` gives.
CALIBRATIONS: dict[str, Callable[..., Any]] = {"gptq": gptq, "imatrix": imatrix}


class ExportFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Result of the export: the logit comparison of reloaded folder and model.

    `moved_by_rounding`: largest logit difference between the quantised and the unquantised model.
    """

    backend: str
    max_abs_logit_difference: Finite
    tolerance: Finite
    moved_by_rounding: Finite | None = None


def export_folder(workdir: Path, part: str) -> Path:
    """Return the folder of an export: `export/`, or `export-FORMAT/` for an additional export in the format `part`."""
    return workdir / f"export-{part}".removesuffix("-")


def describe_export(folder: Path, model: str, check: Any) -> list[str]:
    """Return lines on an export: which model, its folder and size, the result of its check, and how to load it.

    `check` has the fields of `ExportFacts`.
    """
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    rounded, moved = "", check.moved_by_rounding
    if moved is not None:
        rounded = f"; quantisation moves the logits of random inputs by at most {moved:.2g}"
    return [
        f"exported: {model}, to {folder} ({sum(sizes) / 1e6:,.2f} MB in {len(sizes)} files)",
        f"  reloaded in {check.backend}: logits differ from those of the model in memory"
        f"{', rounded alike,' if rounded else ''} by at most "
        f"{check.max_abs_logit_difference:.2g} (tolerance {check.tolerance:.2g}){rounded}",
        *(f"  {line}" for line in loading_lines(folder)),
    ]


def export_task(task: Task, work: Work, data: DataSpec, repair: ReconstructConfig, spec: ExportSpec) -> Task:
    """Add the export stage's extra inputs: calibration records, a user's format file, evaluations for the card."""
    spec = _with_rounding(work, spec)
    chosen, values = choose_format(spec.format, export_options(spec))
    calibrates = chosen.calibration(values) is not None
    sections = {"model": work.model, "data": data, "reconstruct": repair, "export": spec}
    card: Any = _benchmarks(work)
    if card and getattr(values, "quantize", "none") != "none" and spec.evaluate:
        evaluations = []
        for asked in (part.task for part in evaluation_works(work.before[-1], work.start, work.start.name)):
            data_files = {name: path for name, path in asked.inputs.items() if name != "model"}
            evaluations.append(content_key(dataclasses.replace(asked, inputs=data_files).made_from))
        card = [card, evaluations]
    return task.add(
        inputs={
            **(inputs.record_files(data, "train") if calibrates else {}),
            **({} if chosen.file is None else {f"format {spec.format}": chosen.file}),
        },
        outputs=[export_folder(work.folder, work.part)],
        journals=[_calibrated(work)],
        settings={
            **(affecting("reconstruct", sections) if calibrates else {}),
            "export.rounding": spec.rounding or "nearest",
            **({"benchmarks": card} if card else {}),
        },
    )


def export_stage(work: Work, data: DataSpec, repair: ReconstructConfig, spec: ExportSpec) -> ExportFacts:
    """Export a model, reload it and compare logits; evaluate a quantised export for its card.

    Delete the export if its logits differ.
    """
    spec = _with_rounding(work, spec)
    chosen, values = choose_format(spec.format, export_options(spec))
    model, out, calibration = work.load(work.start), export_folder(work.folder, work.part), chosen.calibration(values)
    plan_file = work.start / "plan.json"  # missing if nothing was pruned
    options = {"format": spec.format, "max_image_tokens": image_tokens(data, spec), **vars(values)}
    if spec.mtp == "cut":
        options["mtp_dir"] = work.teacher
    if calibration is not None:
        batches = inputs.calibration_batches(work.tokens, data, repair, model.cfg, seed=repair.seed)
        settings = affecting("reconstruct", {"model": work.model, "data": data, "reconstruct": repair})
        made_from = {"function": calibration.function, "arguments": calibration.settings, "settings": settings}
        named: dict[str, Any] = {"cache": ArrayCache(_calibrated(work), made_from), **calibration.settings}
        with work.phase(calibration.function, len(model.cfg.text.layers)) as progress:
            function = CALIBRATIONS[calibration.function]
            options[calibration.option] = function(model, batches, repair, progress=progress, **named)
    elif spec.quantize == "w4a16":
        work.say(f"  {NEAREST}")
    save(
        model,
        out,
        source_dir=work.start,
        plan=PrunePlan.from_json(plan_file) if plan_file.is_file() else None,
        name=spec.base_model or model_name(work.teacher),
        license=spec.license,
        datasets=[inputs.name_of_records(data.train)] if data.train and (work.recovered or work.reconstructed) else [],
        reconstructed=work.reconstructed,
        recovered=work.recovered,
        **options,
    )
    try:
        comparison = check_saved(model, out, source_dir=work.start, vision_dir=work.model.vision_dir, **options)
    except BaseException:
        if is_main_process():
            remove(out)
        raise
    facts, rows, remark = ExportFacts(**comparison), _benchmarks(work), ""
    if getattr(values, "quantize", "none") != "none":
        loaded = None if chosen.read is None else {out: chosen.read(out, model, values)}
        del model
        rows, moved = _after_rounding(work, spec, out, loaded), facts.moved_by_rounding
        if moved is not None:
            remark = f"Quantisation moves the model's logits by at most {moved:.2g} (random text and images)."
    if is_main_process():
        add_evaluation(out, rows, remark)
    if spec.push_to_hub is not None and is_main_process():
        upload = push(out, spec.push_to_hub)
        work.say(f"  uploaded to {upload.url}: {len(upload.files)} files, {upload.n_bytes:,} bytes")
    return facts


def _with_rounding(work: Work, spec: ExportSpec) -> ExportSpec:
    if spec.quantize != "w4a16":
        return spec
    return with_rounding(spec, work.experiment.data, work.experiment.recover, work.config(work.teacher).text)


def _benchmarks(work: Work) -> Rows:
    """Return the card's rows of the exported model, before a quantisation; () if it was not evaluated."""
    if work.evaluation is None:
        return ()
    run, result = work.evaluation
    return benchmark_rows(run, result.teacher, result.sets)


def _after_rounding(work: Work, spec: ExportSpec, out: Path, loaded: dict[Path, Model] | None) -> Rows:
    """Evaluate a quantised export like its model, and return the card's rows: scores after and before rounding.

    `loaded`: the model in the export `out`, if `load` does not read this folder.
    """
    if work.evaluation is None:
        return ()
    (run, result), maker = work.evaluation, work.before[-1]
    parts = (*evaluation_works(work, work.teacher, TEACHER), *evaluation_works(maker, work.start, work.start.name))
    readable, evaluations = loaded is not None or (out / "config.json").is_file(), None
    if spec.evaluate and readable and on_process_zero(lambda: all(differs_only_in(part.task) for part in parts)):
        tokenizer = None if loaded is None else work.start
        maker = maker.replace(folder=work.folder, loaded=loaded, overwrite=True, tokenizer=tokenizer)
        evaluations = evaluate_model(maker, out, out.name)
    return rounded_rows(run, result.teacher, result.sets, evaluations)


def _calibrated(work: Work) -> Path:
    """Return the folder from which an interrupted calibration resumes."""
    return work.folder / f".calibrated{work.part and '-'}{work.part}.parts"
