"""The training loop, for recovery of a pruned model and for pretraining; methods differ only in their config."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.mesh.mesh import rows_of_process
from vlmprune_jax.core.mesh.preemption import StopSignal
from vlmprune_jax.core.models.inputs import check_batch
from vlmprune_jax.core.models.params import flatten, unflatten
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.core.recovery.checkpoint import Checkpointer
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.core.recovery.flops import batch_flops
from vlmprune_jax.core.recovery.metrics import Recorder
from vlmprune_jax.core.recovery.program import BatchShapes, Program, Run, describe, prepare, shapes_of
from vlmprune_jax.core.recovery.step import TrainState, place_rows, step_context
from vlmprune_jax.core.recovery.terms import reported_terms
from vlmprune_jax.core.recovery.trainable import merge_lora


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
        needs `get_state()` and `set_state()` (grain's iterators have them). If `batches` has a method `kinds`
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
        kinds = batches.kinds(first, total) if isinstance(batches, Foreseen) else []
        context = step_context(run.mesh, config.compute_dtype)
        devices = sorted(jax.tree.leaves(state)[0].sharding.device_set, key=lambda device: device.id)
        with Recorder(folder, first, total, config.log_every, progress, devices, config.loggers) as recorder, context:
            if saver is not None and 0 < first < total:
                recorder.say(f"continues after step {first:,} of {total:,}, saved in {saver.folder}")
            state = _train(run, stream, config, state, (first, total), kinds, saver, recorder)
            summary = {
                "steps": total,
                "resumed_from": first,
                "trained_parameters": sum(leaf.size for leaf in state.params.values()),
                "frozen_parameters": sum(leaf.size for leaf in run.frozen.values()),
                **recorder.summary(),
                "terms": {name: term.label or name for name, term in reported_terms(config.losses).items()},
            }
    trained = {path: master.astype(run.dtypes[path]) for path, master in state.params.items()}
    original = flatten(model.params)  # arrays that are frozen and not moved are returned, not copies of them
    frozen = {path: original.get(path, leaf) if run.mesh is None else leaf for path, leaf in run.frozen.items()}
    result = model.replace(
        params=unflatten({**frozen, **trained}), cfg=dataclasses.replace(run.program.cfg, fake_quant=None)
    )
    return merge_lora(result) if config.merge_lora else result, summary


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


@runtime_checkable
class Foreseen(Protocol):
    """Interface of a batch iterator whose array shapes are all known in advance."""

    def kinds(self, first: int, last: int) -> Sequence[BatchShapes]:
        """Return the distinct array shapes of batches `first` to `last` - 1, the same on all processes."""


def _train(
    run: Run,
    stream: Iterator[Any],
    config: RecoverConfig,
    state: TrainState,
    span: tuple[int, int],
    kinds: Sequence[BatchShapes],
    saver: Checkpointer | None,
    recorder: Recorder,
) -> TrainState:
    """Run the training steps in `span`; metrics are read one step late so that devices never wait for the host."""
    cfg, programs = run.program.cfg, dict[Any, Any]()

    def compile_for(state: TrainState, batch: Mapping[str, Any]) -> None:
        arguments = (state, run.frozen, run.teacher_params, batch)
        programs[shapes_of(batch)] = run.program.step.lower(*arguments).compile()  # type: ignore[attr-defined]

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
            batch = _next(stream, run, config, step)
            waited = time.perf_counter() - begin
            placed = place_rows(batch.arrays, run.mesh)
            if shapes_of(placed) not in programs:
                remark = f"{'warning: not foreseen, ' if kinds else ''}compiling in step {step + 1}"
                recorder.say(f"{remark}: {describe(cfg, [batch.arrays])}")
                with recorder.compiling():
                    compile_for(state, placed)
            state, metrics = programs[shapes_of(placed)](state, run.frozen, run.teacher_params, placed)
            of_batch = (batch.record_ids, waited, batch.skipped, flops(batch.arrays))
            pending.append(functools.partial(recorder.step, step + 1, metrics, *of_batch))
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


def _next(stream: Iterator[Any], run: Run, config: RecoverConfig, step: int) -> Any:
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
    rows = len(rows_of_process(run.mesh, config.batch_size))
    ids = batch.arrays["input_ids"]
    if len(ids) != rows:
        raise UserError(
            f"recover: batch of step {step + 1} has {len(ids)} rows, expected {rows} per process: check batch_size"
        )
    return dataclasses.replace(batch, arrays=check_batch(run.program.cfg, batch.arrays))
