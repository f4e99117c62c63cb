"""The program of a training run: micro-batches, clipping, AdamW; only trained parameters are differentiated."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import Experts
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import row_ways, use_mesh
from vlmprune_jax.core.mesh.rules import check_divides, constrain, sharding
from vlmprune_jax.core.models.layers import FAKE_QUANTS
from vlmprune_jax.core.models.params import Flat, param_axes, param_shapes, unflatten
from vlmprune_jax.core.models.vlm import Params
from vlmprune_jax.core.recovery.config import PROJECTOR, RecoverConfig
from vlmprune_jax.core.recovery.flops import room_of
from vlmprune_jax.core.recovery.losses import combine, loss_sums, term_weights
from vlmprune_jax.core.recovery.terms import Teacher, make_teacher
from vlmprune_jax.core.recovery.trainable import assign_groups, decays, with_lora


class TrainState(NamedTuple):
    """Training state: float32 trained parameters, optimizer state, step int32[], and random key data."""

    params: Flat
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array


def make_schedule(config: RecoverConfig, num_steps: int, peak: float | None = None) -> optax.Schedule:
    """Return the learning-rate schedule: linear warm-up over ceil(warmup_ratio * num_steps) steps, then decay.

    The schedule equals `get_*_schedule_with_warmup` of transformers, except that at least one step has the full rate.
    `peak`: the full rate, instead of `config.learning_rate`.
    """
    warmup = min(math.ceil(config.warmup_ratio * num_steps), num_steps - 1)
    rest, peak = max(num_steps - warmup, 1), peak or config.learning_rate
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


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


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Training program of a run, which does not depend on weight values."""

    cfg: ModelConfig
    """Config of the student, with LoRA adapters and simulated integer rounding."""

    config: RecoverConfig
    teacher: Teacher | None

    groups: Mapping[str, str]
    """Optimizer group of each trained parameter, by path."""

    optimizer: optax.GradientTransformation

    rates: Mapping[str, optax.Schedule]
    """Learning-rate schedules to log, by metric name."""

    shardings: TrainState | None
    """Shardings of the training state; None without a mesh."""

    @functools.cached_property
    def init(self) -> Any:
        """Jitted function `trained params -> state` at step 0, with float32 copies of the parameters."""

        def init(trainable: Flat) -> TrainState:
            masters = {path: jnp.copy(x.astype(jnp.float32)) for path, x in trainable.items()}
            key = jax.random.key_data(jax.random.key(self.config.seed))
            return TrainState(masters, self.optimizer.init(masters), jnp.int32(0), key)

        return jax.jit(init, out_shardings=self.shardings)

    @functools.cached_property
    def step(self) -> Any:
        """Jitted training step `(state, frozen, teacher params, batch) -> (state, metrics)`; `state` is donated.

        `batch`: global arrays, rows split over (data, fsdp). Metrics are float32 scalars on the device; nothing in the
        step waits for the host.
        """
        outputs = None if self.shardings is None else (self.shardings, self.shardings.step)
        return jax.jit(self._step, donate_argnums=(0,), out_shardings=outputs)

    def _step(
        self, state: TrainState, frozen: Flat, teacher_params: Params | None, batch: dict[str, Any]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        losses = self.config.losses
        weights = term_weights(losses, self.cfg, batch["labels"], batch["attention_mask"])
        grads, sums = self.gradients(state, frozen, teacher_params, batch, weights)
        norm = optax.tree.norm(grads)
        if self.config.clip_norm is not None:
            factor = jnp.minimum(1.0, self.config.clip_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
            grads = {path: grad * factor for path, grad in grads.items()}
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer step counts
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            metrics = {name: jnp.asarray(rate(state.step), jnp.float32) for name, rate in self.rates.items()}
        terms = {name: value / jnp.maximum(weights[name], 1.0) for name, value in sums.items()}
        metrics |= {"loss": combine(sums, weights, losses), "grad_norm": norm, **self._padding(batch)}
        if taken := metrics.keys() & terms.keys():
            raise UserError(f"losses: {', '.join(taken)} is also the name of a training metric: rename the loss term")
        return TrainState(params, opt_state, state.step + 1, state.key), {**terms, **metrics}

    def _padding(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """Return a batch's number of tokens, its shares of padding, and its number of rows without tokens."""
        mask, images = batch["attention_mask"], batch.get("media", {}).get("vision")
        tokens = jnp.sum(mask, dtype=jnp.float32)
        empty = jnp.sum(~jnp.any(mask != 0, axis=1), dtype=jnp.float32)
        metrics = {"tokens": tokens, "padding": (mask.size - tokens) / mask.size, "empty_rows": empty}
        if images is not None and images.grid is not None:
            room = len(images.grid) * room_of(self.cfg, images) * self.cfg.merge**2  # patches
            metrics["image_padding"] = 1 - jnp.sum(jnp.prod(images.grid, axis=-1), dtype=jnp.float32) / room
        return metrics

    def gradients(
        self,
        state: TrainState,
        frozen: Flat,
        teacher_params: Params | None,
        batch: dict[str, Any],
        weights: dict[str, jax.Array],
    ) -> tuple[Flat, dict[str, jax.Array]]:
        """Return the gradients of the total loss, and the summed loss terms, accumulated over micro-batches."""
        cfg, config, dtype = self.cfg, self.config, jnp.dtype(self.config.compute_dtype)
        dropout = cfg.lora is not None and cfg.lora.dropout > 0
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        taught = None if teacher_params is None else jax.tree.map(lambda x: x.astype(dtype), teacher_params)
        fixed = {path: x.astype(dtype) for path, x in frozen.items()}

        def total(masters: Flat, micro: dict[str, Any], index: jax.Array) -> tuple[jax.Array, dict]:
            sums = loss_sums(
                unflatten({**fixed, **{path: x.astype(dtype) for path, x in masters.items()}}),
                cfg,
                micro,
                config.losses,
                teacher=self.teacher,
                teacher_params=taught,
                remat=config.remat,
                dropout_key=jax.random.fold_in(step_key, index) if dropout else None,
            )
            return combine(sums, weights, config.losses), sums

        gradient = jax.grad(total, has_aux=True)
        if config.accumulation == 1:
            return gradient(state.params, batch, jnp.int32(0))

        def body(carry: Any, xs: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, gradient(state.params, *xs)), None

        zeros = {path: jnp.zeros_like(x) for path, x in state.params.items()}
        start = (zeros, {name: jnp.float32(0) for name in weights})
        micro = jax.tree.map(lambda x: _split(x, config.accumulation), batch)
        return jax.lax.scan(body, start, (micro, jnp.arange(config.accumulation)))[0]


def make_program(
    cfg: ModelConfig,
    config: RecoverConfig,
    *,
    teacher_cfg: ModelConfig | None,
    kept_layers: Sequence[int] | None,
    mesh: Mesh | None,
    num_steps: int,
) -> Program:
    """Check all settings that need no weights, then build the training step.

    Raises UserError if settings contradict the model, the teacher or the mesh.
    """
    teacher = make_teacher(config.losses, cfg, teacher_cfg, kept_layers)
    if mesh is not None:
        check_divides(cfg, mesh)
        ways, rows = row_ways(mesh), config.batch_size // config.accumulation
        if rows % ways:
            raise UserError(
                f"recover: a micro-batch of {rows} rows (batch_size / accumulation) must be a multiple of mesh.data x "
                f"mesh.fsdp = {ways} devices: change batch_size or accumulation"
            )
    if config.adapters is not None:
        cfg = with_lora(cfg, config.adapters)
    if config.quantize != "none":
        if any(isinstance(layer.channel, Experts) for layer in cfg.text.layers):
            raise UserError(
                f"recover.quantize={config.quantize!r}: layers of experts are not rounded in training: "
                'use "none", and export.quantize after it'
            )
        rounding = FAKE_QUANTS[one_of("recover.quantize", config.quantize, FAKE_QUANTS)]
        cfg = dataclasses.replace(cfg, fake_quant=rounding(cfg))
    shapes = param_shapes(cfg)
    groups = assign_groups(list(shapes), config.trainable)
    optimizer = make_optimizer(config, groups, num_steps)
    masters = {path: jax.ShapeDtypeStruct(shapes[path], np.float32) for path in groups}
    shardings = state_shardings(masters, optimizer, cfg, mesh)
    rates = {"learning_rate": make_schedule(config, num_steps)}
    if PROJECTOR in groups.values():
        rates["projector_learning_rate"] = make_schedule(config, num_steps, config.projector_learning_rate)
    return Program(cfg, config, teacher, groups, optimizer, rates, shardings)


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
    mixed = compute_dtype == "bfloat16"
    promotion: Any = jax.numpy_dtype_promotion("standard") if mixed else contextlib.nullcontext()
    with use_mesh(mesh), promotion:
        yield
