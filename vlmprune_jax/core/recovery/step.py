"""The jitted training step: micro-batches, clipping, AdamW; only trained parameters are differentiated."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import row_ways, use_mesh
from vlmprune_jax.core.mesh.rules import constrain, sharding
from vlmprune_jax.core.models.media import merge_of
from vlmprune_jax.core.models.params import Flat, param_axes, unflatten
from vlmprune_jax.core.models.vlm import Params
from vlmprune_jax.core.recovery.config import PROJECTOR, RecoverConfig
from vlmprune_jax.core.recovery.flops import room_of
from vlmprune_jax.core.recovery.losses import Teacher, combine, loss_sums, term_weights
from vlmprune_jax.core.recovery.trainable import decays

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Training state: float32 trained parameters, optimizer state, step int32[], and random key data."""

    params: Flat
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array


def make_schedule(config: RecoverConfig, num_steps: int) -> optax.Schedule:
    """Return the learning-rate schedule: linear warm-up over ceil(warmup_ratio * num_steps) steps, then decay.

    The schedule equals `get_*_schedule_with_warmup` of transformers, except that at least one step has the full rate.
    """
    warmup = min(math.ceil(config.warmup_ratio * num_steps), num_steps - 1)
    rest, peak = max(num_steps - warmup, 1), config.learning_rate
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def learning_rates(config: RecoverConfig, groups: Mapping[str, str], num_steps: int) -> dict[str, optax.Schedule]:
    """Return {metric name: learning-rate schedule}, with a separate one for the projector if it is trained."""
    schedules = {"learning_rate": make_schedule(config, num_steps)}
    if PROJECTOR in groups.values():
        projector = dataclasses.replace(config, learning_rate=config.projector_learning_rate or config.learning_rate)
        schedules["projector_learning_rate"] = make_schedule(projector, num_steps)
    return schedules


def make_optimizer(config: RecoverConfig, groups: Mapping[str, str], num_steps: int) -> optax.GradientTransformation:
    """Return AdamW for flat parameters, with weight decay on matrices only, and a separate rate for the projector.

    `groups`: {path: "main" or "projector"} (see `trainable.assign_groups`).
    """
    ratio = (config.projector_learning_rate or config.learning_rate) / config.learning_rate
    scale = {path: ratio if group == PROJECTOR else 1.0 for path, group in groups.items()}

    def per_group(updates: Flat, _: Any) -> Flat:
        return {path: update * scale[path] for path, update in updates.items()}

    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask={path: decays(path) for path in groups}),
        optax.stateless(per_group),
        optax.scale_by_learning_rate(make_schedule(config, num_steps)),
    )


def init_state(
    trainable: Flat, optimizer: optax.GradientTransformation, seed: int, shardings: TrainState | None
) -> TrainState:
    """Return the training state at step 0, with float32 copies of the trained parameters."""

    build = functools.partial(_initial, optimizer=optimizer, seed=seed)
    return jax.jit(build, out_shardings=shardings)(trainable)


def abstract_state(trainable: Flat, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Return the training state as abstract arrays with shardings."""
    state = jax.eval_shape(functools.partial(_initial, optimizer=optimizer, seed=0), trainable)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings)


def _initial(trainable: Flat, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    masters = {path: jnp.copy(x.astype(jnp.float32)) for path, x in trainable.items()}
    return TrainState(masters, optimizer.init(masters), jnp.int32(0), jax.random.key_data(jax.random.key(seed)))


def state_shardings(
    trainable: Flat, optimizer: optax.GradientTransformation, cfg: ModelConfig, mesh: Mesh | None
) -> TrainState | None:
    """Return the sharding of every array in the training state; Adam moments are sharded like their parameters."""
    if mesh is None:
        return None
    axes = param_axes(cfg)
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    params = {path: sharding(mesh, axes[path], leaf.shape) for path, leaf in trainable.items()}
    opt_state = jax.eval_shape(optimizer.init, trainable)
    placed = optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, opt_state, params, transform_non_params=lambda _: everywhere
    )
    return TrainState(params, placed, everywhere, everywhere)


Step = Callable[[TrainState, Flat, Params | None, dict[str, Any]], tuple[TrainState, Metrics]]


def make_step(
    cfg: ModelConfig,
    config: RecoverConfig,
    teacher: Teacher | None,
    optimizer: optax.GradientTransformation,
    rates: Mapping[str, optax.Schedule],
    shardings: TrainState | None,
) -> Step:
    """Return the jitted step `(state, frozen, teacher params, batch) -> (state, metrics)`; `state` is donated.

    `batch`: global arrays, rows split over (data, fsdp). `rates`: schedules to log, by metric name. Metrics are
    float32 scalars on the device; nothing in the step waits for the host.
    """
    replicated = None if shardings is None else shardings.step

    def step(
        state: TrainState, frozen: Flat, teacher_params: Params | None, batch: dict[str, Any]
    ) -> tuple[TrainState, Metrics]:
        weights = term_weights(config.losses, cfg, batch["labels"], batch["attention_mask"])
        grads, sums = _gradients(cfg, config, teacher, state, frozen, teacher_params, batch, weights)
        norm = optax.tree.norm(grads)
        if config.clip_norm is not None:
            factor = jnp.minimum(1.0, config.clip_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
            grads = {path: grad * factor for path, grad in grads.items()}
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer step counts
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            metrics = {name: jnp.asarray(rate(state.step), jnp.float32) for name, rate in rates.items()}
        terms = {name: value / jnp.maximum(weights[name], 1.0) for name, value in sums.items()}
        valid = jnp.sum(batch["attention_mask"], dtype=jnp.float32)
        slots = batch["attention_mask"].size
        metrics |= {
            "loss": combine(sums, weights, config.losses),
            "grad_norm": norm,
            "tokens": valid,
            "padding": (slots - valid) / slots,
            "empty_rows": jnp.sum(~jnp.any(batch["attention_mask"] != 0, axis=1), dtype=jnp.float32),
        }
        images = batch["media"].get("vision")
        if images is not None and images.grid is not None:
            room = len(images.grid) * room_of(cfg, images) * merge_of(cfg) ** 2  # patches
            metrics["image_padding"] = 1 - jnp.sum(jnp.prod(images.grid, axis=-1), dtype=jnp.float32) / room
        if taken := metrics.keys() & terms.keys():
            raise UserError(f"losses: {', '.join(taken)} is also the name of a training metric: rename the loss term")
        return TrainState(params, opt_state, state.step + 1, state.key), {**terms, **metrics}

    return jax.jit(step, donate_argnums=(0,), out_shardings=None if shardings is None else (shardings, replicated))


def _gradients(
    cfg: ModelConfig,
    config: RecoverConfig,
    teacher: Teacher | None,
    state: TrainState,
    frozen: Flat,
    teacher_params: Params | None,
    batch: dict[str, Any],
    weights: dict[str, jax.Array],
) -> tuple[Flat, dict[str, jax.Array]]:
    """Return the gradients of the total loss, and the summed loss terms, accumulated over micro-batches."""
    dtype = jnp.dtype(config.compute_dtype)
    dropout = cfg.lora is not None and cfg.lora.dropout > 0
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    taught = None if teacher_params is None else jax.tree.map(lambda x: x.astype(dtype), teacher_params)
    fixed = {path: x.astype(dtype) for path, x in frozen.items()}

    def total(masters: Flat, micro: dict[str, Any], index: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = unflatten({**fixed, **{path: x.astype(dtype) for path, x in masters.items()}})
        key = jax.random.fold_in(step_key, index) if dropout else None
        sums = loss_sums(
            params,
            cfg,
            micro,
            config.losses,
            teacher=teacher,
            teacher_params=taught,
            remat=config.remat,
            dropout_key=key,
        )
        return combine(sums, weights, config.losses), sums

    gradient = jax.grad(total, has_aux=True)
    if config.accumulation == 1:
        return gradient(state.params, batch, jnp.int32(0))

    def body(carry: Any, xs: Any) -> tuple[Any, None]:
        micro, index = xs
        return jax.tree.map(jnp.add, carry, gradient(state.params, micro, index)), None

    zeros = {path: jnp.zeros_like(x) for path, x in state.params.items()}
    start = (zeros, {name: jnp.float32(0) for name in weights})
    micro = jax.tree.map(lambda x: _split(x, config.accumulation), batch)
    return jax.lax.scan(body, start, (micro, jnp.arange(config.accumulation)))[0]


def _split(x: jax.Array, n: int) -> jax.Array:
    """Reshape [rows, ...] to [n, rows / n, ...] so that every device keeps its rows in all n micro-batches.

    Neighbouring rows stay together, so that packed rows of images are split as the rows of their tokens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else row_ways(mesh)
    split = jnp.swapaxes(x.reshape(ways, n, -1, *x.shape[1:]), 0, 1).reshape(n, -1, *x.shape[1:])
    return constrain(split, (None, "batch", *(None,) * (x.ndim - 1)))


@functools.cache
def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Return the sharding that splits batch rows over the mesh axes (data, fsdp)."""
    return sharding(mesh, ("batch", *(None,) * (ndim - 1)))


def place_rows(arrays: Mapping[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """Assemble the batch rows of all processes into global device arrays."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, dict(arrays))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh, x.ndim), x), dict(arrays))


def local_rows(array: jax.Array) -> np.ndarray:
    """Return this process's rows of a global array that is sharded over rows only (undoes `place_rows`)."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


@contextlib.contextmanager
def step_context(mesh: Mesh | None, compute_dtype: str) -> Iterator[None]:
    """Context for running a training step, in which activations are sharded over `mesh`.

    Implicit dtype promotion is allowed in bfloat16, because jax.nn's attention mixes it with float32.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_mesh(mesh))
        if compute_dtype == "bfloat16":
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
        yield
