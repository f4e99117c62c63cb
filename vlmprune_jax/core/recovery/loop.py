"""The training loop, for recovery of a pruned model and for pretraining; methods differ only in their config."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import mesh_of, rows_of_process
from vlmprune_jax.core.mesh.stop import StopSignal
from vlmprune_jax.core.models.inputs import check_batch
from vlmprune_jax.core.models.params import Flat, flatten, place_params, unflatten
from vlmprune_jax.core.models.vlm import Model, Params
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.core.prune.surgery import trim_vocabulary
from vlmprune_jax.core.recovery.checkpoint import Checkpointer, weights_digest
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.core.recovery.flops import batch_flops, room_of
from vlmprune_jax.core.recovery.metrics import Recorder
from vlmprune_jax.core.recovery.program import Program, TrainState, make_program, place_rows, step_context
from vlmprune_jax.core.recovery.terms import student_layers, terms_of
from vlmprune_jax.core.recovery.trainable import add_lora, merge_lora, partition

BatchShapes = Mapping[str, Any]  # a batch with a jax.ShapeDtypeStruct in place of every array


def recover(
    model: Model,
    batches: Iterable[Any],
    config: RecoverConfig,
    *,
    teacher: Model | None = None,
    plan: PrunePlan | None = None,
    workdir: str | Path | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
    num_steps: int | None = None,
    program: Program | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Train `model` on `batches`; return the trained model and a summary of the run.

    Args:
      model: the pruned model, or a new model (`init_params`) to pretrain; its arrays are not modified.
      batches: this process's rows as `Batch`es, endless or at least `num_steps` batches. With `workdir`, the iterator
        needs `get_state()` and `set_state()` (grain's iterators have them). If `batches` has a method
        `kinds(first, last)` that returns the distinct `BatchShapes` of these batches, the same on all processes
        (`TrainBatches.kinds`), all programs are compiled before the first step.
      config: trainable parameters, losses and optimizer.
      teacher: the unpruned model, for distillation.
      plan: the prune plan that turned `teacher` into `model` (its `kept_layers` align hidden states).
      workdir: folder for checkpoints, metrics.jsonl and loggers. A stopped run continues from this folder; results are
        bitwise equal on the same devices and processes, and equal within rounding on others.
      mesh: devices to train on (default: those of the model's arrays).
      progress: show a progress bar.
      num_steps: optimizer steps (default: `config.steps`).
      program: training step that `make_program` returned for the same arguments (default: built here).

    Raises:
      UserError: settings contradict the model, mesh or checkpoint; a loss or gradient is not finite (the message names
        the records); the data ends early; a checkpoint cannot be written.
      Stopped: on SIGTERM or SIGINT, after saving the state.
    """
    total = num_steps or config.steps
    if total is None:
        raise UserError(
            "recover: config.epochs needs the number of steps: pass num_steps=config.num_steps(number of training "
            "records)"
        )
    run = prepare(model, config, teacher, plan, mesh, total, program)
    stream = iter(batches)
    folder = None if workdir is None else Path(workdir)
    saver = None if folder is None else Checkpointer(folder / "checkpoints", run.identity, config.keep_checkpoints)
    with saver if saver is not None else contextlib.nullcontext():
        state, first = _resume(run, stream, saver)
        kinds = batches.kinds(first, total) if hasattr(batches, "kinds") else []
        context = step_context(run.mesh, config.compute_dtype)
        devices = sorted(jax.tree.leaves(state)[0].sharding.device_set, key=lambda device: device.id)
        with Recorder(folder, first, total, config.log_every, progress, devices, config.loggers) as recorder, context:
            if saver is not None and 0 < first < total:
                recorder.say(f"continues after step {first:,} of {total:,}, saved in {saver.folder}")
            state = _train(run, stream, state, (first, total), kinds, saver, recorder)
            summary = {
                "steps": total,
                "resumed_from": first,
                "trained_parameters": sum(leaf.size for leaf in state.params.values()),
                "frozen_parameters": sum(leaf.size for leaf in run.frozen.values()),
                **recorder.summary(),
                "terms": {name: term.label or name for name, term in terms_of(config.losses, reported=True).items()},
            }
    trained = {path: master.astype(run.dtypes[path]) for path, master in state.params.items()}
    original = flatten(model.params)  # arrays that are frozen and not moved are returned, not copies of them
    frozen = {path: original.get(path, leaf) if run.mesh is None else leaf for path, leaf in run.frozen.items()}
    result = model.replace(
        params=unflatten({**frozen, **trained}), cfg=dataclasses.replace(run.program.cfg, fake_quant=None)
    )
    return merge_lora(result) if config.merge_lora else result, summary


class Run(NamedTuple):
    """Training run that is ready to start: program, original dtypes of trained parameters, and arrays on devices."""

    program: Program
    dtypes: dict[str, Any]
    mesh: Mesh | None
    frozen: Flat
    teacher_params: Params | None
    state: TrainState
    identity: dict[str, Any]


def prepare(
    model: Model,
    config: RecoverConfig,
    teacher: Model | None,
    plan: PrunePlan | None,
    mesh: Mesh | None,
    total: int,
    program: Program | None = None,
) -> Run:
    """Check the run's settings, place the arrays on devices and build the training step, unless `program` has it."""
    mesh = mesh if mesh is not None else mesh_of(model.params)
    if teacher is not None:
        teacher = trim_vocabulary(teacher, getattr(plan, "vocabulary", None))
    if program is None:
        program = make_program(
            model.cfg,
            config,
            teacher_cfg=None if teacher is None else teacher.cfg,
            kept_layers=getattr(plan, "kept_layers", None),
            mesh=mesh,
            num_steps=total,
        )
    if config.adapters is not None:
        model = add_lora(model, config.adapters, jax.random.fold_in(jax.random.key(config.seed), 1))
    flat = place_params(model, mesh)
    trainable, frozen = partition(flat, program.groups)
    taught, teacher_params = program.teacher, None
    if teacher is not None and taught is not None:
        teacher_params = unflatten({p: x.astype(config.compute_dtype) for p, x in place_params(teacher, mesh).items()})
    with step_context(mesh, config.compute_dtype):
        state = program.init(trainable)
    identity = {
        "config": config.identity(),
        "num_steps": total,
        "model": {"cfg": dataclasses.asdict(model.cfg), "weights": weights_digest(flat)},
        "teacher": taught and {"cfg": dataclasses.asdict(taught.cfg), "weights": weights_digest(teacher_params)},
        "layers": taught and [student_layers(config.losses, program.cfg), taught.layers],
    }
    dtypes = {path: leaf.dtype for path, leaf in trainable.items()}
    return Run(program, dtypes, mesh, frozen, teacher_params, state, identity)


def _resume(run: Run, stream: Iterator[Any], saver: Checkpointer | None) -> tuple[TrainState, int]:
    """Return the training state and step to start from, after moving the batches to the same position."""
    if saver is None:
        return run.state, 0
    if not (hasattr(stream, "get_state") and hasattr(stream, "set_state")):
        raise UserError(
            "recover: batches cannot be resumed (no get_state/set_state): use a grain dataset, or leave out workdir"
        )
    restored = saver.restore(run.state)
    if restored is None:
        return run.state, 0
    state, data_state = restored
    try:
        stream.set_state(data_state)
    except Exception as error:  # a stream may raise anything
        raise UserError(
            f"{saver.folder}: the saved data position is not one of these batches ({error!r}): use the same data, or "
            "remove that folder to start again"
        ) from error
    return state, int(state.step)


def _train(
    run: Run,
    stream: Iterator[Any],
    state: TrainState,
    span: tuple[int, int],
    kinds: Sequence[BatchShapes],
    saver: Checkpointer | None,
    recorder: Recorder,
) -> TrainState:
    """Run the training steps in `span`; metrics are read one step late so that devices never wait for the host."""
    cfg, config, programs = run.program.cfg, run.program.config, dict[Any, Any]()

    def compile_for(state: TrainState, batch: Mapping[str, Any]) -> None:
        arguments = (state, run.frozen, run.teacher_params, batch)
        programs[shapes_of(batch)] = run.program.step.lower(*arguments).compile()

    teacher_cfg = None if run.program.teacher is None else run.program.teacher.cfg
    flops = batch_flops(cfg, teacher_cfg, config.losses, run.program.groups, rows=config.batch_size)
    pending = deque[Callable[[], None]]()
    with StopSignal() as stop:
        with recorder.compiling():
            zeros = [jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), kind) for kind in kinds]
            if zeros:
                recorder.say(f"compiling {len(kinds)} program{'s' * (len(kinds) > 1)}: {describe(cfg, zeros)}")
            for batch in zeros:  # ahead of the run, which shows a lack of memory at the start
                compile_for(state, place_rows(batch, run.mesh))
                if stop.requested():
                    raise stop.stopped("training", "while compiling, before its first step; nothing is lost")
            if saver is not None:
                saver.prepare(state, -(-(span[1] - span[0]) // (config.save_every or span[1])))
        for step in range(*span):
            begin = time.perf_counter()
            batch = _next(stream, run, step)
            waited = time.perf_counter() - begin
            placed = place_rows(batch.arrays, run.mesh)
            if shapes_of(placed) not in programs:
                remark = f"{'warning: not foreseen, ' if kinds else ''}compiling in step {step + 1}"
                recorder.say(f"{remark}: {describe(cfg, [batch.arrays])}")
                with recorder.compiling():
                    compile_for(state, placed)
            state, metrics = programs[shapes_of(placed)](state, run.frozen, run.teacher_params, placed)
            facts = (batch.record_ids, waited, batch.skipped, flops(batch.arrays))
            pending.append(functools.partial(recorder.step, step + 1, metrics, *facts))
            if len(pending) > 1:
                pending.popleft()()
            if saver is not None:
                saver.check()
            stopping, last = stop.requested(), step + 1 == span[1]
            due = last or (config.save_every and (step + 1) % config.save_every == 0)
            if last or (saver is not None and (due or stopping)):
                pending.popleft()()  # save a state only after its loss and gradient proved finite
            if saver is not None and (due or stopping):
                saver.save(step + 1, state, stream.get_state())  # type: ignore[attr-defined]
                recorder.saved = step + 1
            if stopping:
                remark = f"saved in {saver.folder}: run the same command to continue" if saver else "nothing is saved"
                raise stop.stopped("training", f"after step {step + 1} of {span[1]}; {remark}")
    return state


def _next(stream: Iterator[Any], run: Run, step: int) -> Any:
    """Return the next batch; raise UserError if there is none or its size is wrong."""
    batch = next(stream, None)
    if batch is None:
        raise UserError(
            f"recover: the training data ended after {step} steps: set fewer steps, or pass more epochs of data"
        )
    if not hasattr(batch, "arrays"):
        raise UserError(
            f"recover: batch of step {step + 1} must be a Batch, got {type(batch).__name__}: make it with vp.batches"
        )
    rows = len(rows_of_process(run.mesh, run.program.config.batch_size))
    ids = batch.arrays["input_ids"]
    if len(ids) != rows:
        raise UserError(
            f"recover: batch of step {step + 1} has {len(ids)} rows, expected {rows} per process: check batch_size"
        )
    return dataclasses.replace(batch, arrays=check_batch(run.program.cfg, batch.arrays))


def shapes_of(batch: Mapping[str, Any]) -> Any:
    """Return the shapes and dtypes of a batch's arrays, for each of which the training step is compiled once."""
    arrays, structure = jax.tree.flatten(batch)
    return structure, tuple((array.shape, array.dtype) for array in arrays)


def describe(cfg: ModelConfig, batches: Sequence[Mapping[str, Any]]) -> str:
    """Return batch shapes in words, such as "sequences of 1,024, 512 tokens", with image counts if they differ."""
    lengths, counts = [f"{batch['input_ids'].shape[1]:,}" for batch in batches], list[str]()
    for images in (batch.get("media", {}).get("vision") for batch in batches):
        slots = 0 if images is None else images.values.shape[0] * images.values.shape[1]
        counts.append(f"{slots} image{'s' if slots != 1 else ''}")
        if images is not None and images.grid is not None:
            counts[-1] = f"{len(images.values) * room_of(cfg, images):,} image tokens"
    if len(set(counts)) == 1:
        return f"sequences of {', '.join(lengths)} tokens"
    return "sequences of " + ", ".join(f"{tokens} tokens with {n}" for tokens, n in zip(lengths, counts, strict=True))
