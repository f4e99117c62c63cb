"""Export a model of the workdir to `export/` or `export-FORMAT/`, then reload it and compare it with the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from vlmprune_jax.core.cache import ArrayCache
from vlmprune_jax.core.files import Finite
from vlmprune_jax.core.processes import is_main_process
from vlmprune_jax.data import inputs
from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.experiment.arguments import export_options, image_tokens
from vlmprune_jax.experiment.spec import affecting
from vlmprune_jax.export.card import loading_lines, model_name
from vlmprune_jax.export.config import ExportSpec
from vlmprune_jax.export.format import Calibration
from vlmprune_jax.export.formats import choose_format
from vlmprune_jax.export.gptq import gptq, imatrix
from vlmprune_jax.export.hub import push
from vlmprune_jax.export.write import check_saved, save
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune import PrunePlan
from vlmprune_jax.prune.reconstruct_config import ReconstructConfig
from vlmprune_jax.stages.work import Work
from vlmprune_jax.workdir.ledger import Task, remove

# Function of a model and calibration batches, by the name that a format's `Calibration` gives.
CALIBRATIONS: dict[str, Callable[..., Any]] = {"gptq": gptq, "imatrix": imatrix}


class ExportFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Result of the export: the logit comparison of reloaded folder and model."""

    backend: str
    max_abs_logit_difference: Finite
    tolerance: Finite


def export_folder(workdir: Path, part: str) -> Path:
    """Return the folder of an export: `export/`, or `export-FORMAT/` for an additional export in the format `part`."""
    return workdir / f"export-{part}".removesuffix("-")


def describe_export(folder: Path, model: str, check: Any) -> list[str]:
    """Return lines on an export: which model, its folder and size, the result of its check, and how to load it.

    `check` has the fields of `ExportFacts`.
    """
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [
        f"exported: {model}, to {folder} ({sum(sizes) / 1e6:,.2f} MB in {len(sizes)} files)",
        f"  reloaded in {check.backend}: logits differ from those of the model in memory by at most "
        f"{check.max_abs_logit_difference:.2g} (tolerance {check.tolerance:.2g})",
        *(f"  {line}" for line in loading_lines(folder)),
    ]


def export_task(task: Task, work: Work, data: DataSpec, repair: ReconstructConfig, spec: ExportSpec) -> Task:
    """Add the export stage's extra inputs: calibration records, a user's format file, benchmark results."""
    chosen, values = choose_format(spec.format, export_options(spec))
    calibrates = chosen.calibration(values) is not None
    sections = {"model": work.model, "data": data, "reconstruct": repair, "export": spec}
    return task.add(
        inputs={
            **(inputs.record_files(data, "train") if calibrates else {}),
            **({} if chosen.file is None else {f"format {spec.format}": chosen.file}),
        },
        outputs=[export_folder(work.folder, work.part)],
        journals=[_calibrated(work)],
        settings={
            **(affecting("reconstruct", sections) if calibrates else {}),
            **({"benchmarks": work.benchmarks} if work.benchmarks else {}),
        },
    )


def export_stage(work: Work, data: DataSpec, repair: ReconstructConfig, spec: ExportSpec) -> ExportFacts:
    """Export a model, reload it and compare logits; delete the export if they differ."""
    chosen, values = choose_format(spec.format, export_options(spec))
    model, out, calibration = work.load(work.start), export_folder(work.folder, work.part), chosen.calibration(values)
    plan_file = work.start / "plan.json"  # missing if nothing was pruned
    options = {"format": spec.format, "max_image_tokens": image_tokens(data, spec), **vars(values)}
    if calibration is not None:
        options[calibration.option] = _calibrate(calibration, work, data, repair, model)
    save(
        model,
        out,
        source_dir=work.start,
        mtp_dir=work.teacher,
        plan=PrunePlan.from_json(plan_file) if plan_file.is_file() else None,
        name=spec.base_model or model_name(work.teacher),
        license=spec.license,
        datasets=[inputs.name_of_records(data.train)] if data.train and (work.recovered or work.reconstructed) else [],
        reconstructed=work.reconstructed,
        recovered=work.recovered,
        benchmarks=work.benchmarks,
        **options,
    )
    try:
        comparison = check_saved(model, out, source_dir=work.start, vision_dir=work.model.vision_dir, **options)
    except BaseException:
        if is_main_process():
            remove(out)
        raise
    if spec.push_to_hub is not None and is_main_process():
        upload = push(out, spec.push_to_hub)
        work.say(f"  uploaded to {upload.url}: {len(upload.files)} files, {upload.n_bytes:,} bytes")
    return ExportFacts(**comparison)


def _calibrate(calibration: Calibration, work: Work, data: DataSpec, repair: ReconstructConfig, model: Model) -> Any:
    """Compute an export format's calibration statistic on calibration records; resumes layer by layer."""
    batches = inputs.calibration_batches(work.tokens, data, repair, model.cfg, seed=repair.seed)
    settings = affecting("reconstruct", {"model": work.model, "data": data, "reconstruct": repair})
    made_from = {"function": calibration.function, "arguments": calibration.settings, "settings": settings}
    cache = ArrayCache(_calibrated(work), made_from)
    with work.phase(calibration.function, len(model.cfg.text.layers)) as progress:
        function = CALIBRATIONS[calibration.function]
        return function(model, batches, repair, progress=progress, cache=cache, **calibration.settings)


def _calibrated(work: Work) -> Path:
    """Return the folder from which an interrupted calibration resumes."""
    return work.folder / f".calibrated{work.part and '-'}{work.part}.parts"
