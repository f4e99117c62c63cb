"""Recoveries on a TPU slice: their training steps, compiled ahead of time without weights or TPUs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.limits import keeps_heads
from vlmprune_jax.core.mesh.mesh import make_mesh, row_ways
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.params import abstract_params, count_params, unflatten
from vlmprune_jax.core.prune import KeptVocabulary, PrunePlan, Scores, VocabularyConfig, keep_everything
from vlmprune_jax.core.prune.config import METHODS
from vlmprune_jax.core.prune.criteria.weights import random_scores
from vlmprune_jax.core.prune.fingerprints import shape_digest
from vlmprune_jax.core.prune.select import plan_pruning, unscored
from vlmprune_jax.core.recovery.flops import step_flops
from vlmprune_jax.core.recovery.program import Program, batch_sharding, make_program, step_context
from vlmprune_jax.core.recovery.terms import terms_of
from vlmprune_jax.core.recovery.trainable import partition
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.inputs import count_records, length_buckets
from vlmprune_jax.io.data.preparation import image_buckets, tile_buckets, within_row
from vlmprune_jax.io.data.record_cache import check_frozen
from vlmprune_jax.run.experiment.arguments import plan_config, recover_config
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.experiment.variants import variants_of
from vlmprune_jax.run.planning.ahead_of_time import DoesNotFit, Slice, compile_for_tpu, make_slice
from vlmprune_jax.run.planning.evaluation import WEIGHT_FORMATS, plan_evaluation, preparation_of, size_of
from vlmprune_jax.run.stages.work import source_config
from vlmprune_jax.run.workdir.tpu_plan import Hbm, PlannedEvaluation, PlannedStep, TpuPlan

_VIDEO = 1920, 1080  # width and height of planned videos


@dataclass(frozen=True)
class Case:
    """Inputs for planning one recovery on a TPU slice: student (`cfg`), training program and batch shapes.

    `lengths`, `slots`, `image_tokens`: buckets (ascending) of tokens, of images or tiles, and of image tokens per row
    (empty unless image sizes vary). The planned step uses the largest bucket of each. `patches`: number of images, or
    temporal patches of videos, that share the image tokens of a row. `steps`: number of training steps; None if
    unknown.
    """

    cfg: ModelConfig
    program: Program
    dtype: str
    slice: Slice
    mesh: Mesh
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    image_tokens: tuple[int, ...] = ()
    steps: int | None = None
    patches: int = 1


def make_case(
    experiment: Experiment, cfg: ModelConfig, plan: PrunePlan, target: Slice, records: int | None = None
) -> Case:
    """Return the planning inputs for a recovery after pruning the experiment's model, with config `cfg`, by a plan.

    Raises UserError if the settings do not determine the shapes of rows, or contradict the model or the slice.
    """
    config = recover_config(experiment.recover)
    lengths = length_buckets(experiment.data, cfg)
    if not lengths:
        raise UserError(
            "data.max_length is not set, but planning needs the sequence length: add --config.data.max_length=2048"
        )
    slots, image_tokens, patches = _image_slots(experiment.data, cfg, Path(experiment.model.hf_dir))
    if experiment.data.feature_cache is not None:
        check_frozen(cfg, config)
        cfg = dataclasses.replace(cfg, tower=False)
    teacher = cfg if plan.vocabulary is None else plan.vocabulary.apply_to(cfg)
    mesh, cfg = make_mesh(**vars(experiment.mesh), devices=target.devices), plan.apply_to(cfg)
    steps = config.steps or 1000  # length of the schedule: any number gives the same operations
    program = make_program(cfg, config, teacher_cfg=teacher, kept_layers=plan.kept_layers, mesh=mesh, num_steps=steps)
    return Case(
        cfg=cfg,
        program=program,
        dtype=experiment.model.dtype,
        slice=target,
        mesh=mesh,
        lengths=lengths,
        slots=slots,
        image_tokens=within_row(image_tokens, lengths[-1]),
        steps=config.steps if records is None else config.num_steps(records),
        patches=patches,
    )


def predict_plan(experiment: Experiment, cfg: ModelConfig) -> PrunePlan:
    """Return a prune plan made from random scores, as a prediction of the config's real plan.

    The number of layers and equal widths do not depend on scores, so they are as in the real plan. The choice of
    layers, widths with `selection="global"`, and the share of heads with `heads="auto"` do depend on scores; for
    `heads="auto"`, proportional heads are assumed.
    """
    config = plan_config(experiment.prune, experiment.model, experiment.data, experiment.export)
    if config.method == "none":
        return keep_everything(cfg, f"{shape_digest(cfg)}-", count_params(cfg))
    config.check()
    vocabulary = typical_vocabulary(config.vocabulary, cfg)
    if config.layers:
        return plan_pruning(unscored(f"{shape_digest(cfg)}-"), cfg, config, vocabulary)
    gqa = experiment.score.gqa
    scores = Scores("none", f"{shape_digest(cfg)}-", {"gqa": gqa}, random_scores(cfg, seed=0, gqa=gqa))
    if config.heads == "auto" and not keeps_heads(cfg, "text", config.loads_in):
        config = dataclasses.replace(config, heads="proportional")
    return plan_pruning([scores] * len(METHODS[config.method].axes), cfg, config, vocabulary)


def typical_vocabulary(config: VocabularyConfig, cfg: ModelConfig) -> KeptVocabulary | None:
    """Return a kept vocabulary of the planned size (the lowest token ids); None if the vocabulary is not trimmed."""
    rows = cfg.text.vocab_size
    if config.size is None:
        return None
    special = {cfg.bos_token_id, *cfg.eos_token_ids, cfg.pad_token_id, cfg.image_token_id, cfg.video_token_id}
    needed = sorted(i for i in special if i is not None and 0 <= i < rows)
    size = min(-(-config.size // config.multiple) * config.multiple, rows)
    others = (i for i in range(rows) if i not in needed)
    kept = sorted([*needed, *itertools.islice(others, size - len(needed))])
    return KeptVocabulary(rows, tuple(kept), "")


def _image_slots(data: DataSpec, cfg: ModelConfig, folder: Path) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return the possible image or tile counts per sequence, its image tokens if images have any size, and `patches`.

    With `data.video_frames` the largest of them hold `data.max_images` videos of `_VIDEO` pixels.
    """
    if cfg.vision is None:
        return (0,), (), 1
    preparation = preparation_of(data, cfg, folder)
    slots, tokens = tile_buckets(data, preparation) or (data.max_images,), image_buckets(data, preparation) or ()
    frames = None if preparation is None or cfg.video is None else preparation.for_video(cfg.video)
    if cfg.video is None or frames is None or data.video_frames is None:
        return slots, tokens, 1
    patches = -(-data.video_frames // cfg.video.temporal_patch)
    size = frames.plan(*_VIDEO, frames=data.video_frames).tokens
    if not size:
        return (*slots, data.max_images * patches) if slots[-1] < data.max_images * patches else slots, (), 1
    most = data.max_images * min(size * patches, data.video_tokens or size * patches)
    return slots, (*tokens, most) if tokens[-1] < most else tokens, data.max_images * patches


def estimate(case: Case) -> PlannedStep:
    """Compile the training step of a planned recovery and return its cost.

    The step time is a roofline estimate from arithmetic, memory traffic and links between chips. For memory traffic,
    arguments are read once, and temporaries and received data are written and read once. MFU is model FLOPs / (peak
    FLOP/s of all chips x step time).

    Raises DoesNotFit if the step needs more HBM than a chip has.
    """
    program, mesh, chip = case.program, case.mesh, case.slice.chip
    config, teacher = program.config, None if program.teacher is None else program.teacher.cfg
    with step_context(mesh, config.compute_dtype):
        compiled = compile_for_tpu(program.step, *_arguments(case))
    model = step_flops(
        program.cfg,
        teacher,
        config.losses,
        program.groups,
        rows=config.batch_size,
        length=case.lengths[-1],
        images=config.batch_size * (case.patches if case.image_tokens else case.slots[-1]),
        image_tokens=max(case.image_tokens, default=0) // case.patches,
    )
    received = received_bytes(case)
    in_all = sum(received.values())
    traffic = compiled.arguments + 2 * (compiled.temporaries + in_all)
    seconds = chip.seconds(compiled.flops / mesh.size, traffic, in_all)
    return PlannedStep(
        topology=case.slice.name,
        chips=mesh.size // chip.halves,
        mesh=dict(mesh.shape),
        student=size_of(case.cfg),
        teacher=None if teacher is None else size_of(teacher),
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        remat=config.remat,
        tokens_buckets=list(case.lengths),
        images_buckets=list(case.slots),
        image_tokens_buckets=list(case.image_tokens),
        feature_cache=not case.cfg.tower,
        teacher_top_k=config.losses.teacher_top_k,
        hbm=Hbm(
            arguments=compiled.arguments,
            temporaries=compiled.temporaries,
            free=int(chip.hbm - compiled.arguments - compiled.temporaries),
        ),
        executed_flops=compiled.flops,
        flops=dataclasses.asdict(model),
        received=received,
        seconds=seconds,
        mfu=model.total / (max(seconds.values()) * mesh.size * chip.flops),
        steps=case.steps,
        compile_seconds=compiled.seconds,
    )


def received_bytes(case: Case) -> dict[str, float]:
    """Return the bytes that each chip receives from others in a training step, by what is received.

    Computed from shards, for rings: every micro-batch gathers the weights that are split over `fsdp` (those of the
    student's decoder and of trained parameters once more for the backward pass) and sums the gradients of trained
    parameters; `tensor` sums activations behind attention and MLP. `benchmarks/compiled_text.py` counts what the
    compiled program receives, which may be less where the compiler keeps or moves activations instead.
    """
    program, config = case.program, case.program.config
    data, fsdp, tensor = (case.mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    weights = gradients = 0.0
    models = [(program.cfg, program.groups)]
    models += [] if program.teacher is None else [(program.teacher.cfg, {})]
    for number, (cfg, trained) in enumerate(models):
        for path, leaf in abstract_params(cfg, case.dtype, case.mesh).items():
            size, split = math.prod(leaf.sharding.shard_shape(leaf.shape)), "fsdp" in leaf.sharding.spec
            passes = 2 if path in trained or (number == 0 and path.startswith("text/")) else 1
            weights += passes * size * (fsdp - 1) * split
            if path in trained:
                gradients += size * ((fsdp - 1) if split else 2 * (fsdp - 1) / fsdp) + size * 2 * (data - 1) / data
    layers = len(case.cfg.text.layers) * (4 if config.remat == "none" else 6)  # sums: forward, backward, again
    layers += 0 if program.teacher is None else 2 * len(program.teacher.cfg.text.layers)
    rows = config.batch_size / config.accumulation / (data * fsdp)
    activations = layers * rows * case.lengths[-1] * case.cfg.text.hidden_size * 2 * (tensor - 1) / tensor
    itemsize = config.accumulation * np.dtype(config.compute_dtype).itemsize
    received = {"weights": weights, "gradients": gradients, "activations": activations}
    return {name: itemsize * size for name, size in received.items() if size}


def _arguments(case: Case) -> tuple[Any, ...]:
    """Return the training step's arguments as abstract arrays with shardings."""
    program, config, mesh = case.program, case.program.config, case.mesh

    def rows(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, len(shape)))

    student = abstract_params(program.cfg, case.dtype, mesh)
    trained, frozen = partition(student, program.groups)
    state = program.init.eval_shape(trained)
    teacher = None
    if program.teacher is not None:
        teacher = unflatten(abstract_params(program.teacher.cfg, config.compute_dtype, mesh))
    n_rows, length = config.batch_size, case.lengths[-1]
    names = ("input_ids", "attention_mask", "labels")
    batch: dict[str, Any] = {name: rows((n_rows, length), np.int32) for name in names}
    batch["media"] = {}
    vision, projector = case.cfg.vision, case.cfg.projector
    packs = config.accumulation * row_ways(mesh)
    each = n_rows // packs  # rows of a packed row of images
    images = each * case.slots[-1]
    if case.cfg.dynamic_resolution and case.cfg.text.rope.sections:
        batch["position_ids"] = rows((n_rows, 3, length), np.int32)
    if vision is not None and projector is not None and images:
        tokens, by_patch = each * max(case.image_tokens, default=0), vision.dynamic_resolution
        features = case.cfg.feature_shape
        shape: tuple[int, ...] = (images, vision.channels, vision.image_size, vision.image_size)
        if not case.cfg.tower:
            shape = (tokens, features[1]) if by_patch else (images, *features)
        elif by_patch:
            shape = (tokens * projector.downsample**2, vision.patch_values)
        values = rows((packs, *shape), np.float32 if case.cfg.tower else np.dtype(config.compute_dtype))
        grid = rows((packs, images, 3), np.int32) if by_patch else None
        batch["media"] = {"vision": Packed(values, grid)}
    if top_k := config.losses.teacher_top_k:
        batch["teacher_ids"] = rows((n_rows, length, top_k), np.int32)
        batch["teacher_logprobs"] = rows((n_rows, length, top_k + 1), np.dtype(config.compute_dtype))
    return state, frozen, teacher, batch


def too_large(case: Case, error: DoesNotFit) -> UserError:
    """Return an error that the training step needs too much memory, with advice on settings to change."""
    config, chip = case.program.config, case.slice.chip
    ways = [] if config.remat == "full" else ["recover.remat=full"]
    if config.batch_size // config.accumulation > len(case.slice.devices):
        ways.append(f"recover.accumulation={2 * config.accumulation}")
    place = chip.slices.index(grid) if (grid := case.slice.name.partition(":")[2]) in chip.slices else -1
    if place + 1 < len(chip.slices):
        ways.append(f"--topology={case.slice.name.partition(':')[0]}:{chip.slices[place + 1]}")
    return UserError(f"the recovery step on {case.slice.name} {error}: try {' or '.join(ways) or 'shorter sequences'}")


def fit_all(
    experiment: Experiment,
    workdir: Path | None,
    reporter: Reporter,
    topology: str,
    n_records: int | None,
    evaluation: tuple[str, ...] = (),
) -> TpuPlan:
    """Plan every recovery of an experiment on a TPU slice, and print each.

    Plans to prune are read from the workdir, or predicted.

    `evaluation`: plan the evaluation of each pruned model as well, with these `WEIGHT_FORMATS`.

    Raises UserError if the slice is unknown, a step needs more memory than it has (with advice), or there is nothing to
    plan.
    """
    for form in evaluation:
        one_of("--weights", form, tuple(WEIGHT_FORMATS))
    target = make_slice(topology)
    recoveries, evaluations = dict[str, PlannedStep](), dict[str, PlannedEvaluation]()
    for pruned in variants_of(experiment):
        spec, file = pruned.experiment, None if workdir is None else workdir / pruned.folder / "plan.json"
        cfg = source_config(spec.model)
        plan = predict_plan(spec, cfg) if file is None or not file.is_file() else PrunePlan.from_json(file)
        for run in pruned.recoveries:
            records = count_records(run.experiment.data) if n_records is None else n_records
            case = make_case(run.experiment, cfg, plan, target, records)
            reporter.say(f"{run.name}: compiling for {topology} ...")
            try:
                recoveries[run.name] = estimate(case)
            except DoesNotFit as error:
                raise too_large(case, error) from error
            _say(recoveries[run.name], reporter)
            if run.experiment.recover.control and terms_of(case.program.config.losses, teacher=False):
                reporter.say(
                    "  control       training the unpruned model in the same way, once for all prune variants, needs "
                    "more memory and time than this step (recover.control=False leaves it out)"
                )
        if evaluation:
            planned = plan_evaluation(
                plan.apply_to(cfg),
                spec.model.dtype,
                target,
                preparation_of(spec.data, cfg, Path(spec.model.hf_dir)),
                spec.evaluate,
                evaluation,
            )
            reporter.say(f"{pruned.name}, evaluation:")
            _say(planned, reporter)
            evaluations[pruned.name] = planned
    if not recoveries and not evaluations:
        raise UserError('recover.method is "none", so there is no training to plan: set it to "train"')
    return TpuPlan(recoveries=recoveries, evaluations=evaluations)


def _say(planned: PlannedStep | PlannedEvaluation, reporter: Reporter) -> None:
    for name, value in planned.table():
        reporter.say(f"  {name:<13} {value}")
