"""Micro-batches of a step: dropout of their own, and rows from where they lie."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import recover_cases as cases

from vlmprune_jax.distributed.mesh import make_mesh
from vlmprune_jax.distributed.planner import collective_bytes
from vlmprune_jax.models.params import flatten
from vlmprune_jax.recover import LossConfig, add_lora
from vlmprune_jax.recover.losses import term_weights
from vlmprune_jax.recover.step import (
    StepConfig,
    TrainState,
    _gradients,
    _split,
    batch_sharding,
    step_context,
)
from vlmprune_jax.recover.trainable import partition


def test_micro_batches_and_steps_draw_dropout_of_their_own():
    """Two of the same row would otherwise have the gradient of one, and the next step that of this one."""
    lora = dataclasses.replace(cases.LORA, dropout=0.5)
    model = add_lora(cases.model(cases.config(vision=False, layers=1)), lora, jax.random.key(0))
    trained, frozen = partition(flatten(model.params), "lora")
    key = jax.random.key_data(jax.random.key(0))
    row = {name: array[:1] for name, array in next(cases.Stream(model.cfg)).arrays.items()}

    @functools.partial(jax.jit, static_argnames="copies")
    def gradient(copies, step):
        config = StepConfig(model.cfg, LossConfig(), None, copies, None, "float32", "none")
        batch = {name: jnp.concatenate([jnp.asarray(array)] * copies) for name, array in row.items()}
        weights = term_weights(config.loss, config.cfg, batch["labels"], batch["attention_mask"])
        return _gradients(config, TrainState(trained, (), step, key), frozen, None, batch, weights)[0]

    once, twice, later = gradient(1, 0), gradient(2, 0), gradient(1, 1)
    for other in (twice, later):
        assert any(np.abs(other[path] - once[path]).max() > 1e-2 * np.abs(once[path]).max() for path in once)


def test_micro_batches_take_rows_from_where_they_lie():
    """Splitting a batch moves nothing between devices."""
    mesh = make_mesh(4, 2, 1)
    rows = jax.device_put(np.arange(48).reshape(16, 3), batch_sharding(mesh, 2))
    with step_context(mesh, "float32"):
        compiled = jax.jit(functools.partial(_split, n=2)).lower(rows).compile()
    assert not collective_bytes(compiled.as_text())
    assert sorted(np.asarray(compiled(rows))[:, :, 0].ravel()) == list(range(0, 48, 3))
