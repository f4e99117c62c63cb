"""The optimizer: schedules equal transformers', AdamW with groups equals torch's, gradients are clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases
import torch
import transformers

from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.recovery.loop import recover
from vlmprune_jax.core.recovery.program import make_optimizer, make_schedule


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules_equal_transformers(name: str, steps: int):
    ratio = 0.11
    warmup = min(int(np.ceil(ratio * steps)), steps - 1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    if name == "constant":
        expected = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        expected = getattr(transformers, f"get_{name}_schedule_with_warmup")(optimizer, warmup, steps)
    ours = make_schedule(cases.settings(schedule=name, learning_rate=2e-3, warmup_ratio=ratio), steps)
    for step in range(steps):
        np.testing.assert_allclose(float(ours(step)), expected.get_last_lr()[0], atol=1e-9)
        optimizer.step()
        expected.step()


def test_optimizer_equals_torch_adamw():
    """Three steps: groups with their own rate, decay on matrices only."""
    rng = np.random.default_rng(0)
    shapes = {"text/a/weight": (3, 4), "text/norm/weight": (4,), "projector/l/bias": (3,)}
    start = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    rates = {"learning_rate": 0.1, "projector_learning_rate": 0.3}
    # b2 as small as this: at 0.999, 1 - b2**t keeps only 4 digits in float32 (torch computes it in float64).
    config = cases.settings(**rates, b2=0.9, weight_decay=0.2, schedule="constant", warmup_ratio=0.0)
    groups = {"text/a/weight": "main", "text/norm/weight": "main", "projector/l/bias": "projector"}
    ours = make_optimizer(config, groups, 3)
    theirs = {path: torch.nn.Parameter(torch.tensor(x)) for path, x in start.items()}
    settings = {"betas": (config.b1, config.b2), "eps": config.eps}
    reference = torch.optim.AdamW(
        [
            {"params": [theirs["text/a/weight"]], "lr": 0.1, "weight_decay": 0.2},
            {"params": [theirs["text/norm/weight"]], "lr": 0.1, "weight_decay": 0.0},
            {"params": [theirs["projector/l/bias"]], "lr": 0.3, "weight_decay": 0.0},
        ],
        **settings,
    )
    params = {path: jnp.asarray(x) for path, x in start.items()}
    state = ours.init(params)
    for _ in range(3):
        grads = {path: rng.normal(size=x.shape).astype(np.float32) for path, x in start.items()}
        with jax.numpy_dtype_promotion("standard"):
            updates, state = ours.update({p: jnp.asarray(g) for p, g in grads.items()}, state, params)
        params = {path: params[path] + updates[path] for path in params}
        for path, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[path])
        reference.step()
    for path, parameter in theirs.items():
        np.testing.assert_allclose(params[path], parameter.detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_gradients_are_clipped_by_their_global_norm():
    """With a huge eps and no decay a first step moves along the clipped gradient: clipping scales all moves equally.

    The model is a plain decoder with tied embeddings.
    """
    cfg = cases.config(vision=False, tie_embeddings=True, qkv_bias=False, out_bias=False)
    base = {"trainable": "decoder", "steps": 1, "warmup_ratio": 0.0, "weight_decay": 0.0}
    base |= {"eps": 1e4, "learning_rate": 10.0}

    def trained(config):
        return recover(cases.model(cfg), cases.Stream(cfg), config, progress=False)

    free, summary = trained(cases.settings(**base, clip_norm=None))
    clip = summary["last"]["grad_norm"] / 4
    clipped, same = trained(cases.settings(**base, clip_norm=clip))
    assert same["last"]["grad_norm"] == pytest.approx(summary["last"]["grad_norm"])  # reported before clipping
    start, one, two = (flatten(m.params) for m in (cases.model(cfg), free, clipped))
    moves = [(np.asarray(one[p] - start[p]).ravel(), np.asarray(two[p] - start[p]).ravel()) for p in start]
    whole, quarter = (np.concatenate([move[i] for move in moves]) for i in (0, 1))
    np.testing.assert_allclose(np.linalg.norm(whole) / np.linalg.norm(quarter), 4, rtol=1e-3)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_warmup_leaves_a_step_at_the_full_rate(schedule: str, steps: int):
    """Before, the only step of a run, and all steps of a run with a large ratio, were warm-up."""
    for ratio in (0.03, 0.99):
        rate = make_schedule(cases.settings(schedule=schedule, learning_rate=2e-3, warmup_ratio=ratio), steps)
        assert max(float(rate(step)) for step in range(steps)) == pytest.approx(2e-3)
