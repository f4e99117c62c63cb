"""What trains: presets and rules, LoRA adapters that change nothing at first and merge exactly."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases
from block_cases import packed
from decoder_cases import PHI, PHI3
from flax import nnx
from hf_cases import make_folder

from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.mesh.rules import sharding
from vlmprune_jax.core.models.context import dropout_masks
from vlmprune_jax.core.models.layers import Projection
from vlmprune_jax.core.models.params import flatten, param_axes, param_shapes, unflatten
from vlmprune_jax.core.models.stack import fill
from vlmprune_jax.core.models.vlm import Model, encode, forward
from vlmprune_jax.core.recovery.trainable import add_lora, assign_groups, decays, merge_lora, partition
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.io.checkpoints.read import load

CFG = cases.config()
WITH_LORA = dataclasses.replace(CFG, lora=cases.LORA)


@pytest.mark.parametrize(
    ("trainable", "main"),
    [
        ("projector", lambda path: False),
        ("lora", lambda path: "lora_" in path),
        ("decoder", lambda path: path.startswith("text/")),
        ("tower", lambda path: path.startswith("vision/layers") and ("self_attn" in path or "mlp" in path)),
        ("all", lambda path: not path.startswith("projector/")),
    ],
)
def test_presets(trainable, main):
    paths = list(param_shapes(WITH_LORA))
    groups = assign_groups(paths, trainable)
    assert {p for p, g in groups.items() if g == "projector"} == {p for p in paths if p.startswith("projector/")}
    assert {p for p, g in groups.items() if g == "main"} == {p for p in paths if main(p)}


def test_first_matching_rule_decides_and_the_rest_is_frozen():
    flat = {path: np.zeros(shape) for path, shape in param_shapes(CFG).items()}
    rules = [(r"text/layers/.*/bias", False), (r"text/layers/1/.*", True), (r"text/norm/weight", "projector")]
    trainable, frozen = partition(flat, assign_groups(list(flat), rules))
    assert trainable.keys() | frozen.keys() == flat.keys()
    expected = {p for p in flat if p.startswith("text/layers/1/") and not p.endswith("bias")} | {"text/norm/weight"}
    assert trainable.keys() == expected
    assert assign_groups(list(flat), rules)["text/norm/weight"] == "projector"


def test_no_decay_on_norms_and_biases():
    undecayed = {path for path in param_shapes(WITH_LORA) if not decays(path)}
    assert undecayed == {path for path in param_shapes(WITH_LORA) if "norm" in path or path.endswith("bias")}


def test_fresh_adapters_change_nothing():
    model = cases.model(CFG)
    adapted = add_lora(model, cases.LORA, jax.random.key(3))
    batch = next(cases.Stream(CFG)).arrays
    inputs, media = batch["input_ids"], {"vision": packed(batch["pixel_values"])}
    before, after = (encode(m.params, m.cfg, inputs, media=media)[0] for m in (model, adapted))
    assert np.array_equal(before, after)
    shapes = param_shapes(adapted.cfg)
    added = {path: leaf for path, leaf in flatten(adapted.params).items() if "lora_" in path}
    assert {path: leaf.shape for path, leaf in added.items()} == {path: shapes[path] for path in added}
    assert len(added) == 2 * 2 * len(cases.LORA.targets)
    for path, leaf in added.items():
        if path.endswith("lora_a"):  # Kaiming-uniform with a = sqrt(5): bound 1/sqrt(inputs)
            bound = 1 / np.sqrt(np.prod(leaf.shape[2:]))
            assert 0.7 * bound < np.abs(leaf).max() <= bound
        else:
            assert not leaf.any()


def test_merged_adapters_give_the_same_states():
    plain = cases.model(CFG).replace(source=Path("DIR"))
    adapted = _with_random_b(add_lora(plain, cases.LORA, jax.random.key(3)))
    merged = merge_lora(adapted)
    assert (merged.cfg, merged.source, merged.params.keys()) == (CFG, plain.source, plain.params.keys())
    ids = next(cases.Stream(CFG)).arrays["input_ids"] % 61
    one, two, before = (encode(m.params, m.cfg, ids)[0] for m in (adapted, merged, plain))
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert np.abs(one - before).max() > 0.05  # the adapters do something


HEADS = ("q_heads", "head")


@pytest.mark.parametrize(("out", "into"), [(HEADS, ("embed",)), (("embed",), HEADS)])
def test_adapter_gradients_are_those_of_the_formula(out, into):
    """y = W x + alpha / rank * B A x, with outputs and inputs of one axis and of two."""
    sizes, rank, draw = {"q_heads": 3, "head": 5, "embed": 7}, cases.LORA.rank, np.random.default_rng(0)
    graph, state = nnx.split(Projection(sizes, out, into, bias=False, lora=cases.LORA))
    left, right = ([sizes[axis] for axis in axes] for axes in (out, into))
    shapes = ([2, 4, *right], [*left, *right], [rank, *right], [*left, rank])
    arrays = [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes]

    def run(x, weight, a, b):
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, {"weight": weight, "lora_a": a, "lora_b": b})
        return jnp.sum(jnp.sin(nnx.merge(graph, filled)(x)))

    def formula(x, weight, a, b):
        n_in, n_out = math.prod(right), math.prod(left)
        merged = weight.reshape(n_out, n_in) + cases.LORA.alpha / rank * b.reshape(n_out, rank) @ a.reshape(rank, n_in)
        return jnp.sum(jnp.sin(x.reshape(-1, n_in) @ merged.T))

    gradients = [jax.grad(f, argnums=(0, 1, 2, 3)) for f in (run, formula)]
    assert "optimization_barrier" in str(jax.make_jaxpr(gradients[0])(*arrays))  # else XLA copies the output's gradient
    for ours, expected in zip(*(gradient(*arrays) for gradient in gradients), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def _with_random_b(model: Model) -> Model:
    flat = flatten(model.params)
    for i, path in enumerate(p for p in flat if p.endswith("lora_b")):
        flat[path] = 0.3 * jax.random.normal(jax.random.key(i), flat[path].shape)
    return model.replace(params=unflatten(flat))


def test_dropout_scales_what_it_keeps():
    """With dropout the adapters see x with a share of zeros and the rest scaled up; without a key, x itself."""
    lora = dataclasses.replace(cases.LORA, dropout=0.5)
    adapted = _with_random_b(add_lora(cases.model(CFG), lora, jax.random.key(3)))
    ids = next(cases.Stream(CFG)).arrays["input_ids"] % 61
    run = jax.jit(lambda key: encode(adapted.params, adapted.cfg, ids, dropout_key=key)[0])
    first, second, again = run(jax.random.key(1)), run(jax.random.key(2)), run(jax.random.key(1))
    assert np.array_equal(first, again)
    assert np.abs(first - second).max() > 1e-2
    module = nnx.eval_shape(lambda: Projection({"embed": 5, "mlp": 3}, ("mlp",), ("embed",), bias=False, lora=lora))
    shapes = {"weight": (3, 5), "lora_a": (lora.rank, 5), "lora_b": (3, lora.rank)}
    arrays = {name: jax.random.normal(jax.random.key(1), shape) for name, shape in shapes.items()}
    projection, x = fill(module, arrays), jnp.ones((1, 2, 5))
    whole, kept = (projection(x, mask) - x @ arrays["weight"].T for mask in (None, jnp.ones(x.shape, bool)))
    np.testing.assert_allclose(kept, 2 * whole, rtol=1e-5)


def test_dropout_masks_are_independent_and_drop_the_share_asked_for():
    """Of one token's inputs, of two tokens and of two projections, which share a draw; an odd number of inputs too."""
    rate, lora = 0.3, LoraConfig(2, 4.0, 0.3, ("x",))
    sizes = {"embed": 45, "mlp": 30}
    module = nnx.eval_shape(lambda: [Projection(sizes, ("mlp",), (name,), bias=False, lora=lora) for name in sizes])
    x = jnp.zeros((40, 50, 45))
    draw = jax.jit(lambda key: dropout_masks(key, x, module))
    assert "optimization_barrier" in str(draw.trace(jax.random.key(0)).jaxpr)  # else XLA draws them for every consumer
    masks = draw(jax.random.key(0))
    assert [mask.shape for mask in masks] == [(40, 50, 45), (40, 50, 30)]
    left = np.concatenate(masks, axis=-1).reshape(2000, 75) - (1 - rate)
    variance = rate * (1 - rate)
    assert np.abs(left.mean(axis=0)).max() < 4.5 * np.sqrt(variance / 2000)
    assert np.abs(left.mean(axis=1)).max() < 4.5 * np.sqrt(variance / 75)
    covariance = left.T @ left / 2000 - variance * np.eye(75)
    assert np.abs(covariance).max() < 5.5 * variance / np.sqrt(2000) + 0.002


def test_adapters_follow_their_weights_dtype_and_mesh():
    mesh = make_mesh(2, 2, 2)
    model = cases.model(CFG, 0, "bfloat16")
    flat, axes = flatten(model.params), param_axes(CFG)
    placed = Model(unflatten({p: jax.device_put(x, sharding(mesh, axes[p])) for p, x in flat.items()}), CFG)
    adapted = flatten(add_lora(placed, cases.LORA, jax.random.key(0)).params)
    axes = param_axes(dataclasses.replace(CFG, lora=cases.LORA))
    for path, leaf in adapted.items():
        assert leaf.dtype == jnp.bfloat16
        assert leaf.sharding == sharding(mesh, axes[path]), path


@pytest.mark.parametrize("config", [PHI, PHI3], ids=["phi", "phi3"])
def test_adapters_are_on_every_projection_of_phi(tmp_path, config):
    model = load(make_folder(tmp_path / "model", config))
    adapted = add_lora(model, LoraConfig(2, 4.0, 0.0, ()), jax.random.key(0))
    names = {path.split("/")[-2] for path in flatten(adapted.params) if path.endswith("lora_a")}
    others = {"dense", "fc1", "fc2"} if config is PHI else {"o_proj", "gate_proj", "up_proj", "down_proj"}
    assert names == {"q_proj", "k_proj", "v_proj"} | others
    assert adapted.cfg.lora.targets == tuple(sorted(names))
    ids = np.random.default_rng(0).integers(6, 97, (2, 9))
    np.testing.assert_array_equal(forward(merge_lora(adapted), ids)[0], forward(model, ids)[0])
