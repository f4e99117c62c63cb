"""What recovery will need on a TPU slice: the real step, compiled ahead of time without weights and without TPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.config import ModelConfig
from vlmprune_jax.data.images import load_image_processor
from vlmprune_jax.distributed.ahead_of_time import Compiled, DoesNotFit, Slice, compile_for_tpu, make_slice
from vlmprune_jax.distributed.mesh import make_mesh
from vlmprune_jax.distributed.rules import sharding
from vlmprune_jax.errors import UserError
from vlmprune_jax.experiment.arguments import plan_budget, plan_options, recover_config
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.experiment.variants import prune_runs, recover_runs
from vlmprune_jax.families import family_of
from vlmprune_jax.hf.read import read_config
from vlmprune_jax.models.params import count_params, param_axes, param_shapes, unflatten
from vlmprune_jax.prune import PrunePlan, Scores, make_plan
from vlmprune_jax.prune.criteria.random import random_scores
from vlmprune_jax.prune.fingerprint import shape_digest
from vlmprune_jax.recovery.config import REMAT, RecoverConfig
from vlmprune_jax.recovery.flops import StepFlops, step_flops
from vlmprune_jax.recovery.objective import needs_teacher
from vlmprune_jax.recovery.program import Program, make_program
from vlmprune_jax.recovery.step import abstract_state, batch_sharding, step_context
from vlmprune_jax.report.fit import as_rows
from vlmprune_jax.stages.buckets import image_buckets, length_buckets, tile_buckets, within_row
from vlmprune_jax.stages.console import Reporter
from vlmprune_jax.stages.context import teacher_folder
from vlmprune_jax.stages.feature_cache import check_frozen
from vlmprune_jax.stages.inputs import count_records
from vlmprune_jax.stages.ledger import Json

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One recovery on one slice: student, teacher and training settings, and the shape of a row.

    `lengths`: tokens per row of every bucket, ascending; `slots`: the same for images (or tiles), and `image_tokens`
    for the tokens of one where images are of any size (else empty). The step is that of the largest of all.
    """

    cfg: ModelConfig
    teacher_cfg: ModelConfig | None
    kept_layers: tuple[int, ...]
    config: RecoverConfig
    dtype: str
    mesh: tuple[int, int, int]
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    slice: Slice
    image_tokens: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.lengths[-1]

    @property
    def images(self) -> int:
        """Images (or tiles) per row."""
        return self.slots[-1]

    @property
    def tokens_per_image(self) -> int:
        """Tokens that an image has room for where images are of any size, or 0."""
        return self.image_tokens[-1] if self.image_tokens else 0

    def make_mesh(self) -> Mesh:
        """The mesh over the slice's devices."""
        return make_mesh(*self.mesh, devices=self.slice.devices)


@dataclass(frozen=True)
class Estimate:
    """What the step of a case needs, as compiled, and its model FLOPs. Times are lower bounds."""

    case: Case
    compiled: Compiled
    model: StepFlops

    @property
    def free(self) -> float:
        """Bytes of HBM per chip that the step leaves."""
        return self.case.slice.chip.hbm - self.compiled.arguments - self.compiled.temporaries

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of a step if only this limited it: arithmetic, memory, links between chips.

        Memory: arguments are read and temporaries and what other chips send are written and read, once at least.
        """
        received = sum(self.compiled.received.values())
        traffic = self.compiled.arguments + 2 * (self.compiled.temporaries + received)
        return self.case.slice.chip.seconds(self.compiled.flops / len(self.case.slice.devices), traffic, received)

    @property
    def step_seconds(self) -> float:
        """The roofline: the slowest of the three, the others hidden behind it."""
        return max(self.seconds.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the chips could do in that time."""
        return self.model.total / (self.step_seconds * len(self.case.slice.devices) * self.case.slice.chip.flops)


def make_case(experiment: Experiment, folder: Path | None, topology: str) -> Case:
    """The case that a config describes; of the model's folder only JSON files are read.

    `folder`: where the prune stage leaves plan.json; without one the pruned shapes are predicted from the config.

    Raises:
      UserError: an unknown topology, or settings that leave shapes open.
    """
    target = make_slice(topology)
    model = experiment.model
    hf_dir, tower = teacher_folder(model), None if model.vision_dir is None else Path(model.vision_dir)
    _, cfg = read_config(hf_dir, tower)
    made = None if folder is None else folder / "plan.json"
    plan = predict_plan(experiment, cfg) if made is None or not made.is_file() else PrunePlan.from_json(made)
    config = recover_config(experiment.recover)
    lengths = length_buckets(experiment.data, cfg)
    if not lengths:
        raise UserError("data.max_length is not set: planning needs the tokens per row (--config.data.max_length=2048)")
    slots, image_tokens = _image_slots(experiment, cfg, hf_dir)
    if experiment.data.feature_cache is not None:
        check_frozen(cfg, config)
        cfg = dataclasses.replace(cfg, tower=False)
    return Case(
        cfg=plan.apply_to(cfg),
        teacher_cfg=cfg if needs_teacher(config.losses) else None,
        kept_layers=plan.kept_layers,
        config=config,
        dtype=model.dtype,
        mesh=dataclasses.astuple(experiment.mesh),
        lengths=lengths,
        slots=slots,
        slice=target,
        image_tokens=within_row(image_tokens, lengths[-1]),
    )


def predict_plan(experiment: Experiment, cfg: ModelConfig) -> PrunePlan:
    """A plan with the shapes that the config's prune section leads to, from scores that know nothing.

    Equal widths and the number of layers do not depend on scores; which layers go, widths chosen over all layers at
    once (`selection="global"`), and how many heads go under `heads="auto"` (here: their share) do.
    """
    spec = experiment.prune
    gqa = experiment.score.gqa
    scores = Scores("none", f"{shape_digest(cfg)}-", {"gqa": gqa}, **random_scores(cfg, seed=0, gqa=gqa))
    pair = (scores, scores) if spec.method == "hybrid" else scores
    removed, budget, options = spec.layers_removed, plan_budget(experiment), plan_options(spec)
    if options.get("heads") == "auto":
        options["heads"] = "proportional"
    return make_plan(pair, cfg, method=spec.method, ratio=spec.ratio, layers_removed=removed, budget=budget, **options)


def _image_slots(experiment: Experiment, cfg: ModelConfig, folder: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Images or tiles per row that a batch can have, and tokens of an image where these are of any size."""
    data, preparation = experiment.data, None
    if cfg.vision is None:
        return (0,), ()
    if family_of(cfg).images != "whole":
        tiling = {name: getattr(data, name) for name in ("min_tiles", "max_tiles", "thumbnail")}
        preparation = load_image_processor(
            folder,
            aspect_ratio=data.aspect_ratio,
            max_pixels=data.max_image_pixels,
            cache_bytes=0,
            tiling=tiling,
            max_image_tokens=data.max_image_tokens,
        ).preparation
    return tile_buckets(data, preparation) or (data.max_images,), image_buckets(data, preparation) or ()


def estimate(case: Case) -> Estimate:
    """Compile the step of a case.

    Raises:
      DoesNotFit: it needs more HBM than a chip has.
      UserError: settings that do not fit the model or the slice.
    """
    mesh = case.make_mesh()
    config = case.config
    steps = config.steps or 1000  # of the schedule, which has the same operations for any number
    program = make_program(
        case.cfg, config, teacher_cfg=case.teacher_cfg, kept_layers=case.kept_layers, mesh=mesh, num_steps=steps
    )
    arguments = _arguments(case, program, mesh)
    with step_context(mesh, config.compute_dtype):
        compiled = compile_for_tpu(program.step, *arguments)
    model = step_flops(
        program.cfg,
        case.teacher_cfg,
        config.losses,
        program.groups,
        rows=config.batch_size,
        length=case.length,
        images=config.batch_size * case.images,
        image_tokens=case.tokens_per_image,
    )
    return Estimate(case, compiled, model)


def _arguments(case: Case, program: Program, mesh: Mesh) -> tuple[Any, ...]:
    """The step's arguments, as shapes with shardings."""

    def leaves(cfg: ModelConfig, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
        axes = param_axes(cfg)
        return {
            path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding(mesh, axes[path]))
            for path, shape in param_shapes(cfg).items()
        }

    def rows(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, len(shape)))

    student = leaves(program.cfg, case.dtype)
    frozen = {path: leaf for path, leaf in student.items() if path not in program.groups}
    trained = {path: leaf for path, leaf in student.items() if path in program.groups}
    assert program.shardings is not None  # there is a mesh
    state = abstract_state(trained, program.optimizer, program.shardings)
    teacher = None
    if program.teacher is not None:
        teacher = unflatten(leaves(program.teacher.cfg, case.config.compute_dtype))
    n_rows = case.config.batch_size
    batch = {name: rows((n_rows, case.length), np.int32) for name in ("input_ids", "attention_mask", "labels")}
    vision, projector = case.cfg.vision, case.cfg.projector
    each = (n_rows, case.images)
    if vision is not None and vision.any_size:
        batch["position_ids"] = rows((n_rows, 3, case.length), np.int32)
        if case.images:
            batch["image_grid_thw"] = rows((*each, 3), np.int32)
    if vision is not None and projector is not None and case.images and not case.cfg.tower:
        tokens, features = case.cfg.feature_shape
        shape, dtype = (*each, case.tokens_per_image or tokens, features), case.config.compute_dtype
        batch["vision_features"] = rows(shape, jnp.dtype(dtype))
    elif vision is not None and projector is not None and case.images:
        image: tuple[int, ...] = (vision.channels, vision.image_size, vision.image_size)
        if vision.any_size:
            image = (case.tokens_per_image * projector.downsample**2, vision.patch_values)
        batch["pixel_values"] = rows((*each, *image), np.float32)
    if top_k := case.config.losses.teacher_top_k:
        batch["teacher_ids"] = rows((n_rows, case.length, top_k), np.int32)
        batch["teacher_logprobs"] = rows((n_rows, case.length, top_k + 1), jnp.dtype(case.config.compute_dtype))
    return state, frozen, teacher, batch


Attempts = dict[Case, Estimate | UserError]


def search(case: Case, say: Callable[[str], None], tried: Attempts) -> dict[str, Estimate]:
    """What else fits, each found by compiling: the cheapest "remat", then with it the largest micro-"batch"; and the
    smallest "slice" with the settings as they are. Where nothing fits, the entry is missing.

    `tried`: cases that need not be compiled again; it grows.
    """
    found: dict[str, Estimate] = {}
    cheapest = _first_fit([(f"remat {name}", _with(case, remat=name)) for name in REMAT], say, tried)
    if cheapest is not None:
        found["remat"] = found["batch"] = cheapest
        while (larger := _doubled(found["batch"].case)) is not None:
            best = _first_fit([(f"micro-batch of {larger.config.batch_size} rows", larger)], say, tried)
            if best is None:
                break
            found["batch"] = best
    generation, most = case.slice.name.partition(":")[0], len(case.slice.devices)
    names = [f"{generation}:{grid}" for grid in case.slice.chip.slices]
    slices = [case.slice if name == case.slice.name else make_slice(name) for name in names]
    smaller = [(one.name, dataclasses.replace(case, slice=one)) for one in slices if len(one.devices) <= most]
    smallest = _first_fit(smaller, say, tried)
    if smallest is not None:
        found["slice"] = smallest
    return found


def _first_fit(cases: Sequence[tuple[str, Case]], say: Callable[[str], None], tried: Attempts) -> Estimate | None:
    for what, case in cases:
        found = tried[case] = tried.get(case) or _attempt(case)
        if isinstance(found, Estimate):
            say(f"  {what}: fits, {found.free / GIB:.2f} GiB free")
            return found
        say(f"  {what}: {found}")
    return None


def _attempt(case: Case) -> Estimate | UserError:
    """The estimate, or why there is none: too large, or rows or sizes that do not divide over so many chips."""
    try:
        return estimate(case)
    except UserError as error:
        return error


def _with(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, config=dataclasses.replace(case.config, **changes))


def _doubled(case: Case) -> Case | None:
    """The case with twice the rows per micro-batch, in one micro-batch; None beyond 1,024 rows a chip."""
    rows = 2 * case.config.batch_size // case.config.accumulation
    return _with(case, batch_size=rows, accumulation=1) if rows <= 1024 * len(case.slice.devices) else None


def too_large(case: Case, error: DoesNotFit) -> UserError:
    """`error` with what to change."""
    config, chip = case.config, case.slice.chip
    ways = [] if config.remat == "full" else ["recover.remat=full"]
    if config.batch_size // config.accumulation > len(case.slice.devices):
        ways.append(f"recover.accumulation={2 * config.accumulation}")
    place = chip.slices.index(grid) if (grid := case.slice.name.partition(":")[2]) in chip.slices else -1
    if place + 1 < len(chip.slices):
        ways.append(f"--topology={case.slice.name.partition(':')[0]}:{chip.slices[place + 1]}")
    return UserError(f"the recovery step on {case.slice.name} {error}: try {' or '.join(ways) or 'shorter rows'}")


def facts(found: Estimate, n_records: int | None) -> Json:
    """Everything about an estimate, as JSON values; sizes and bytes are per chip, FLOPs and throughput of all chips."""
    case, config = found.case, found.case.config
    n_steps = config.steps if config.steps is not None or n_records is None else config.num_steps(n_records)
    hours = None if n_steps is None else n_steps * found.step_seconds / 3600
    n_chips, tokens = len(case.slice.devices), config.batch_size * case.length
    return {
        "topology": case.slice.name,
        "chips": n_chips,
        "mesh": dict(case.make_mesh().shape),
        "student": {"layers": len(case.cfg.text.layers), "parameters": count_params(case.cfg)},
        "teacher": case.teacher_cfg
        and {
            "layers": len(case.teacher_cfg.text.layers),
            "parameters": count_params(case.teacher_cfg),
        },
        "batch_size": config.batch_size,
        "accumulation": config.accumulation,
        "remat": config.remat,
        "tokens_per_row": case.length,
        "images_per_row": case.images,
        "tokens_buckets": list(case.lengths),
        "images_buckets": list(case.slots),
        "image_tokens_buckets": list(case.image_tokens),
        "feature_cache": not case.cfg.tower,
        "teacher_top_k": config.losses.teacher_top_k,
        "hbm": {
            "arguments": found.compiled.arguments,
            "temporaries": found.compiled.temporaries,
            "free": int(found.free),
        },
        "flops": {"executed": found.compiled.flops, "model": found.model.total, **dataclasses.asdict(found.model)},
        "received": found.compiled.received,
        "seconds": {"step": found.step_seconds, **found.seconds},
        "mfu": found.mfu,
        "tokens_per_second": tokens / found.step_seconds,
        "steps": n_steps,
        "hours": hours,
        "chip_hours": None if hours is None else hours * n_chips,
        "compile_seconds": found.compiled.seconds,
    }


def plan_recovery(case: Case, n_records: int | None, searching: bool, say: Callable[[str], None]) -> Json:
    """`facts` of a case, or its "problem"; all said as lines, and under "search" what else fits.

    Raises:
      UserError: the case does not fit, with what to change, unless a search is to find that out.
    """
    first = _attempt(case)
    if isinstance(first, Estimate):
        told = facts(first, n_records)
    elif isinstance(first, DoesNotFit):
        problem = too_large(case, first)
        if not searching:
            raise problem from first
        told = {"problem": str(problem)}
    else:
        raise first
    for what, value in as_rows(told):
        say(f"  {what:<13} {value}")
    if searching:
        told["search"] = {what: facts(found, n_records) for what, found in search(case, say, {case: first}).items()}
        for what, value in as_rows({"search": told["search"]}):
            say(f"  {what:<13} {value}")
    return told


def fit_all(
    experiment: Experiment, workdir: Path | None, reporter: Reporter, topology: str, n_records: int | None, search: bool
) -> Json:
    """What every recovery needs on a TPU slice, by its name (see `facts`); `search`: and what else would fit.

    Raises:
      UserError: an unknown slice, a step that does not fit it, with what to change, or nothing is trained.
    """
    result: Json = {}
    for pruned in prune_runs(experiment, workdir or Path()):
        for run in recover_runs(pruned):
            case = make_case(run.experiment, None if workdir is None else pruned.folder, topology)
            records = count_records(run.experiment.data) if n_records is None else n_records
            reporter.say(f"{run.name}: compiling for {topology} ...")
            result[run.name] = plan_recovery(case, records, search, reporter.say)
    if not result:
        raise UserError('recover.method is "none", so there is no training to plan: set it to "train"')
    return result
