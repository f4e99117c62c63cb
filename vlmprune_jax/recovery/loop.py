"""The one training loop: recovery of a pruned model, and pretraining from scratch; methods differ by config only."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from vlmprune_jax.checks import one_of
from vlmprune_jax.config import LoraConfig, ModelConfig
from vlmprune_jax.distributed.preemption import StopSignal
from vlmprune_jax.distributed.rules import check_divides, sharding
from vlmprune_jax.errors import Stopped, UserError
from vlmprune_jax.models.decoder import REMAT_POLICIES
from vlmprune_jax.models.params import Flat, flatten, param_axes, param_shapes, unflatten
from vlmprune_jax.models.vlm import Model, Params, check_inputs, mesh_of
from vlmprune_jax.recovery.checkpoint import Checkpointer, weights_digest
from vlmprune_jax.recovery.flops import batch_flops
from vlmprune_jax.recovery.losses import LossConfig, Teacher, check_teacher, layer_pairs
from vlmprune_jax.recovery.metrics import Recorder
from vlmprune_jax.recovery.step import (
    COMPUTE_DTYPES,
    OptimizerConfig,
    Step,
    StepConfig,
    TrainState,
    init_state,
    learning_rates,
    make_optimizer,
    make_step,
    place_rows,
    state_shardings,
    step_context,
)
from vlmprune_jax.recovery.trainable import (
    LORA_SUFFIXES,
    Rule,
    add_lora,
    assign_groups,
    merge_lora,
    resolve_rules,
    with_lora,
)

# Settings that do not change the numbers: a run may be resumed with other values of these.
FREE_FIELDS = ("save_every", "log_every", "keep_checkpoints", "merge_lora")


@dataclass(frozen=True)
class RecoverConfig:
    """How to train. Defaults are the reference's recipe (AdamW .9/.999/1e-8, clip 1, cosine, 3 % warm-up, no decay).

    `trainable`: "projector", "lora", "decoder", "all", or rules (see `trainable.assign_groups`). `batch_size` is global
    and counts rows per optimizer step; `accumulation` splits it into micro-batches. Give `steps` or `epochs`.
    `remat`: what the backward pass computes again, "none", all but matrix products ("dots"), or "full" blocks.
    `save_every` 0 saves only at the end. `merge_lora`: the returned model has its adapters merged.
    """

    trainable: str | tuple[Rule, ...]
    learning_rate: float
    batch_size: int
    losses: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig | None = None
    projector_learning_rate: float | None = None
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    steps: int | None = None
    epochs: float | None = None
    accumulation: int = 1
    compute_dtype: str = "bfloat16"
    remat: str = "dots"
    seed: int = 42
    merge_lora: bool = True
    save_every: int = 0
    keep_checkpoints: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        resolve_rules(self.trainable)
        self.optimizer()
        one_of("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        one_of("remat", self.remat, REMAT_POLICIES)
        size, parts = self.batch_size, self.accumulation
        if size < 1 or parts < 1 or size % parts:
            raise UserError(f"batch_size {size} must be a positive multiple of accumulation {parts}")
        if (self.steps is None) == (self.epochs is None) or not 0 < (self.steps or self.epochs or 0) < math.inf:
            raise UserError(
                f"give a positive number of steps or epochs, one of them, not {self.steps} and {self.epochs}"
            )
        if self.save_every < 0 or self.log_every < 1 or self.keep_checkpoints < 1:
            raise UserError("save_every must be >= 0, log_every and keep_checkpoints >= 1")
        if self.trainable == "lora" and self.lora is None:
            raise UserError('trainable "lora" needs a LoRA config (rank, alpha, dropout, targets)')

    def optimizer(self) -> OptimizerConfig:
        """The optimizer's part of the settings."""
        return OptimizerConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(OptimizerConfig)})

    def num_steps(self, n_records: int) -> int:
        """Optimizer steps of a run over `n_records` training rows."""
        if self.steps is not None:
            return self.steps
        return max(math.floor((self.epochs or 0) * n_records / self.batch_size), 1)


class _Run(NamedTuple):
    """A prepared run: the model's config (with adapters) and dtypes, its two halves on the devices, the step."""

    cfg: ModelConfig
    dtypes: dict[str, Any]
    mesh: Mesh | None
    frozen: Flat
    teacher_cfg: ModelConfig | None
    teacher_params: Params | None
    state: TrainState
    step: Step
    identity: dict[str, Any]


def recover(
    model: Model,
    batches: Iterable[Any],
    config: RecoverConfig,
    *,
    teacher: Model | None = None,
    plan: Any = None,
    workdir: str | Path | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
    num_steps: int | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Train `model` on `batches` and return the trained model and a summary.

    Args:
      model: the pruned model, or a fresh one (`init_params`) to pretrain; its arrays are left alone.
      batches: this process's rows as `Batch`es, for ever or at least `num_steps` of them. With `workdir` its iterator
        needs `get_state()` and `set_state()` (grain has them).
      config: what trains, on which losses, and how.
      teacher: the unpruned model, for distillation.
      plan: the prune plan that made `model` from `teacher` (its `kept_layers` align hidden states).
      workdir: checkpoints, metrics.jsonl and TensorBoard go there; a run that stopped there continues, bitwise on the
        same devices and processes, within rounding on others.
      mesh: where to train (default: where the model's arrays live).
      num_steps: optimizer steps (default: `config.steps`).

    Raises:
      UserError: settings that do not fit the model, mesh or checkpoint; a loss or gradient that is not finite (names
        the records); data that ends early; a checkpoint that cannot be written.
      Stopped: SIGTERM; the state is saved.
    """
    total = num_steps or config.steps
    if total is None:
        raise UserError("epochs given without num_steps: pass num_steps=config.num_steps(number of training records)")
    run = _prepare(model, config, teacher, plan, mesh, total)
    stream = iter(batches)
    folder = None if workdir is None else Path(workdir)
    saver = None if folder is None else Checkpointer(folder / "checkpoints", run.identity, config.keep_checkpoints)
    with saver if saver is not None else contextlib.nullcontext():
        state, first = _resume(run, stream, saver)
        context = step_context(run.mesh, config.compute_dtype)
        devices = sorted(jax.tree.leaves(state)[0].sharding.device_set, key=lambda device: device.id)
        with Recorder(folder, first, total, config.log_every, progress, devices) as recorder, context:
            state = _train(run, stream, config, state, (first, total), saver, recorder)
            summary = _summary(run, recorder, first, total)
    return _finish(run, state, model, config.merge_lora), summary


class Program(NamedTuple):
    """What a run compiles, for which no weights are needed.

    `cfg` has the adapters, `groups` is path -> optimizer group of what trains, `shardings` those of the state.
    """

    cfg: ModelConfig
    groups: dict[str, str]
    teacher: Teacher | None
    optimizer: optax.GradientTransformation
    shardings: TrainState | None
    step: Step


def make_program(
    cfg: ModelConfig,
    config: RecoverConfig,
    *,
    teacher_cfg: ModelConfig | None,
    kept_layers: Sequence[int] | None,
    mesh: Mesh | None,
    num_steps: int,
) -> Program:
    """The step of a run, with everything checked that does not depend on weights (`kept_layers`: the prune plan's).

    Raises:
      UserError: settings that do not fit the model, the teacher or the mesh.
    """
    check_teacher(config.losses, cfg, teacher_cfg)
    if mesh is not None:
        check_mesh(mesh, cfg, config)
    if config.lora is not None:
        cfg = with_lora(cfg, config.lora)
    shapes = param_shapes(cfg)
    groups = assign_groups(list(shapes), config.trainable)
    if config.lora is not None and not any(path.endswith(LORA_SUFFIXES) for path in groups):
        raise UserError(f'lora is given but trainable {config.trainable!r} trains no adapter: use "lora", or no lora')
    teacher = None
    if teacher_cfg is not None and config.losses.needs_teacher:
        teacher = Teacher(teacher_cfg, *layer_pairs(config.losses, cfg, teacher_cfg, kept_layers))
    optimizer = make_optimizer(config.optimizer(), groups, num_steps)
    masters = {path: jax.ShapeDtypeStruct(shapes[path], np.float32) for path in groups}
    shardings = state_shardings(masters, optimizer, cfg, mesh)
    step_config = StepConfig(
        cfg, config.losses, teacher, config.accumulation, config.clip_norm, config.compute_dtype, config.remat
    )
    step = make_step(step_config, optimizer, learning_rates(config.optimizer(), groups, num_steps), shardings)
    return Program(cfg, groups, teacher, optimizer, shardings, step)


def _prepare(
    model: Model, config: RecoverConfig, teacher: Model | None, plan: Any, mesh: Mesh | None, total: int
) -> _Run:
    """Check everything that can be checked before the first batch, place the arrays and build the step."""
    mesh = mesh if mesh is not None else mesh_of(model.params)
    program = make_program(
        model.cfg,
        config,
        teacher_cfg=None if teacher is None else teacher.cfg,
        kept_layers=getattr(plan, "kept_layers", None),
        mesh=mesh,
        num_steps=total,
    )
    if config.lora is not None:
        model = add_lora(model, config.lora, jax.random.fold_in(jax.random.key(config.seed), 1))
    flat = _place(model, mesh)
    trainable = {path: leaf for path, leaf in flat.items() if path in program.groups}
    frozen = {path: leaf for path, leaf in flat.items() if path not in program.groups}
    taught, teacher_params = program.teacher, None
    if teacher is not None and taught is not None:
        teacher_params = unflatten({p: x.astype(config.compute_dtype) for p, x in _place(teacher, mesh).items()})
    with step_context(mesh, config.compute_dtype):
        state = init_state(trainable, program.optimizer, config.seed, program.shardings)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_FIELDS}
    identity = {
        "config": settings,
        "num_steps": total,
        "model": {"cfg": dataclasses.asdict(model.cfg), "weights": weights_digest(flat)},
        "teacher": taught and {"cfg": dataclasses.asdict(taught.cfg), "weights": weights_digest(teacher_params)},
        "layers": taught and [taught.student_layers, taught.teacher_layers],
    }
    dtypes = {path: leaf.dtype for path, leaf in trainable.items()}
    teacher_cfg = None if taught is None else taught.cfg
    return _Run(program.cfg, dtypes, mesh, frozen, teacher_cfg, teacher_params, state, program.step, identity)


def check_mesh(mesh: Mesh, cfg: ModelConfig, config: RecoverConfig) -> None:
    """Refuse a mesh that does not divide the model or a micro-batch.

    Raises:
      UserError: names the sizes.
    """
    check_divides(cfg, mesh)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.batch_size // config.accumulation
    if rows % ways:
        raise UserError(
            f"a micro-batch of {rows} rows (batch_size / accumulation) "
            f"does not divide over data x fsdp = {ways} devices: make it a multiple of {ways}"
        )


def _place(model: Model, mesh: Mesh | None) -> Flat:
    """Flat params on the mesh (or the default device); arrays that are there already are not copied."""
    flat = flatten(model.params)
    if mesh is None:
        return {path: jax.numpy.asarray(leaf) for path, leaf in flat.items()}
    axes = param_axes(model.cfg)
    return {path: jax.device_put(leaf, sharding(mesh, axes[path])) for path, leaf in flat.items()}


def _resume(run: _Run, stream: Iterator[Any], saver: Checkpointer | None) -> tuple[TrainState, int]:
    """The state to start from and its step; the stream is moved to where that state left it."""
    if saver is None:
        return run.state, 0
    if not (hasattr(stream, "get_state") and hasattr(stream, "set_state")):
        raise UserError("batches cannot be resumed (no get_state/set_state): use a grain dataset, or no workdir")
    restored = saver.restore(run.state)
    if restored is None:
        return run.state, 0
    state, data_state = restored
    try:
        stream.set_state(data_state)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{saver.folder}: its place in the data does not fit these batches ({error!r})") from error
    return state, int(state.step)


class _Pending(NamedTuple):
    step: int
    metrics: dict[str, jax.Array]
    record_ids: Sequence[str]
    data_seconds: float
    skipped: Sequence[tuple[str, str]]
    flops: int


def _train(
    run: _Run,
    stream: Iterator[Any],
    config: RecoverConfig,
    state: TrainState,
    span: tuple[int, int],
    saver: Checkpointer | None,
    recorder: Recorder,
) -> TrainState:
    """Steps `first ... total - 1`. Metrics are read one step late, so that the device never waits for the host."""
    pending: deque[_Pending] = deque()
    trained = run.state.params.keys()
    flops = batch_flops(run.cfg, run.teacher_cfg, config.losses, trained, rows=config.batch_size)

    def settle(upto: int) -> None:
        while len(pending) > upto:
            done = pending.popleft()
            metrics = jax.device_get(done.metrics)
            recorder.step(done.step, metrics, done.record_ids, done.data_seconds, done.skipped, done.flops)

    with StopSignal() as stop:
        for step in range(*span):
            begin = time.perf_counter()
            batch = _next(stream, run, config, step)
            waited = time.perf_counter() - begin
            state, metrics = run.step(state, run.frozen, run.teacher_params, place_rows(batch.arrays, run.mesh))
            pending.append(_Pending(step + 1, metrics, batch.record_ids, waited, batch.skipped, flops(batch.arrays)))
            settle(1)
            if saver is not None:
                saver.check()
            stopping = stop.requested()
            due = step + 1 == span[1] or (config.save_every and (step + 1) % config.save_every == 0)
            if saver is not None and (due or stopping):
                settle(0)  # a state is only saved after its loss and gradient proved finite
                saver.save(step + 1, state, stream.get_state())  # type: ignore[attr-defined]
                recorder.saved = step + 1
            if stopping:
                kept = f"saved in {saver.folder}: the same command continues it" if saver else "nothing is saved"
                raise Stopped(f"training stopped on SIGTERM after step {step + 1} of {span[1]}; {kept}")
        settle(0)
    return state


def _next(stream: Iterator[Any], run: _Run, config: RecoverConfig, step: int) -> Any:
    """The next batch, checked.

    Raises:
      UserError: the data ended, the batch has another size, or ids do not fit the model.
    """
    batch = next(stream, None)
    if batch is None:
        raise UserError(f"the training data ended after {step} steps: give fewer steps or more epochs of data")
    rows = config.batch_size // jax.process_count()
    ids = batch.arrays["input_ids"]
    if len(ids) != rows:
        raise UserError(f"batch of step {step + 1} has {len(ids)} rows, config says {rows} per process")
    check_inputs(run.cfg, ids, batch.arrays.get("pixel_values"), batch.arrays.get("vision_features"))
    return batch


def _summary(run: _Run, recorder: Recorder, first: int, total: int) -> dict[str, Any]:
    def count(arrays: Iterable[Any]) -> int:
        return sum(int(np.prod(x.shape)) for x in arrays)

    return {
        "steps": total,
        "resumed_from": first,
        "trained_parameters": count(run.state.params.values()),
        "frozen_parameters": count(run.frozen.values()),
        **recorder.summary(),
    }


def _finish(run: _Run, state: TrainState, model: Model, merge: bool) -> Model:
    """The trained model in its original dtypes; frozen leaves are the given arrays."""
    given = flatten(model.params)
    trained = {path: master.astype(run.dtypes[path]) for path, master in state.params.items()}
    frozen = {path: given.get(path, leaf) if run.mesh is None else leaf for path, leaf in run.frozen.items()}
    result = Model(unflatten({**frozen, **trained}), run.cfg)
    return merge_lora(result) if merge else result
