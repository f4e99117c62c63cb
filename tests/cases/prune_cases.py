"""Small models, batches and golden inputs that the prune tests share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from stack_cases import decoder_layer, text_config, tower_config, tower_layer, with_facts

from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import ModelConfig, ProjectorConfig, TextConfig, VisionConfig
from vlmprune_jax.core.layer import BlockConfig, Layer
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.mesh.rules import sharding
from vlmprune_jax.core.mixers import Attention, RopeConfig
from vlmprune_jax.core.models.params import (
    count_params,
    flatten,
    param_axes,
    param_shapes,
    stack_layers,
    unflatten,
    unstack_layers,
)  # fmt: skip
from vlmprune_jax.core.models.vlm import ENCODED, Model, apply, forward
from vlmprune_jax.core.part import LAYERS, Key
from vlmprune_jax.core.plans.kept import axis_sizes
from vlmprune_jax.core.prune import KeptLayer, PrunePlan, Scores, fingerprint
from vlmprune_jax.core.prune.fingerprints import shape_digest
from vlmprune_jax.io.checkpoints.read import load

UNEQUAL = (decoder_layer(4, 2, 12), decoder_layer(4, 2, 12), decoder_layer(8, 2, 10), decoder_layer(4, 4, 12))
EQUAL = (decoder_layer(4, 2, 12),) * 5


def kept_units(index: int, q_heads, kv_heads, neurons) -> KeptLayer:
    """The entry of a layer of attention and a dense MLP."""
    return KeptLayer(index, {"kv_heads": tuple(kv_heads), "q_heads": tuple(q_heads), "mlp": tuple(neurons)})


def tower_neurons(one: Model) -> list[KeptLayer]:
    """Neurons of each layer's own of a tower."""
    shapes = [layer.sizes for layer in one.cfg.vision.layers]
    return [kept_units(i, range(s["q_heads"]), range(s["kv_heads"]), range(i, 30 + i)) for i, s in enumerate(shapes)]


def hand_plan(cfg: ModelConfig, made_for: str = "a-b", method="hybrid", criterion="none", **stacks) -> PrunePlan:
    """A plan that keeps these layers of components, and all others whole."""
    before = count_params(cfg)
    plan = PrunePlan(made_for, method, criterion, axis_sizes(cfg, ("text", *stacks)), {}, before, before, before)
    for name, layers in stacks.items():
        plan = plan.keeping(name, layers)
    return dataclasses.replace(plan, parameters_after=count_params(plan.apply_to(cfg)))


def config(layers: tuple[Layer, ...] = EQUAL, *, vision: bool = False, **changes) -> ModelConfig:
    """A plain decoder, or a LLaVA with a tower of 4 patches (image id 61)."""
    text = text_config(layers, **changes)
    if not vision:
        return ModelConfig(family="llama", layout="transformers", text=text)
    tower = tower_config((tower_layer(2, 2, 10),) * 2)
    projector = ProjectorConfig("relu", True)
    return ModelConfig("llava", "transformers", text, vision=tower, projector=projector, image_token_id=61)


def seeing(layers: Sequence[Layer], **changes: Any) -> Model:
    """A LLaVA whose tower has these layers, and other facts of `with_facts`, such as InternViT's scaled branches."""
    cfg = config(vision=True)
    vision = with_facts(dataclasses.replace(cfg.vision, n_layers_total=len(layers), layers=tuple(layers)), **changes)
    select = "patch" if vision.class_token else "full"
    return model(dataclasses.replace(cfg, vision=vision, feature_select=select))


@functools.lru_cache(maxsize=16)
def model(cfg: ModelConfig, seed: int = 0) -> Model:
    """Random weights on the host, biases included."""
    draw, noisy = np.random.default_rng(seed), {}
    for path, shape in param_shapes(cfg).items():
        noise = draw.standard_normal(shape).astype(np.float32)
        noisy[path] = 1 + 0.2 * noise if "norm" in path else 0.25 * noise
    return Model(unflatten(noisy), cfg)


def on_mesh(one: Model, data: int, fsdp: int, tensor: int) -> Model:
    """The same model, sharded by its named axes."""
    mesh, axes = make_mesh(data, fsdp, tensor), param_axes(one.cfg)
    flat = flatten(one.params)
    return one.replace(params=unflatten({p: jax.device_put(x, sharding(mesh, axes[p])) for p, x in flat.items()}))


def batch(cfg: ModelConfig, rows: int = 4, length: int = 9, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of different length, padded on the right; with a tower, an image in every row but the last."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 61, (rows, length)).astype(np.int32)
    mask = (np.arange(length)[None] < draw.integers(length - 3, length + 1, rows)[:, None]).astype(np.int32)
    labels = np.where(mask == 1, ids, -100)
    labels[0, :3] = -100
    result = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if cfg.vision is not None:
        ids[:-1, 1:5], labels[:-1, 1:5] = 61, -100
        pixels = draw.standard_normal((rows, 1, 3, 6, 6)).astype(np.float32)
        pixels[-1] = 0
        result["pixel_values"] = pixels
    return result


@functools.partial(jax.jit, static_argnames="cfg")
def plain_gradients(params: Any, cfg: ModelConfig, arrays: dict[str, Any], labels: Any) -> Any:
    """Gradients of the mean loss over the labels of rows, by differentiation of the whole model."""

    def loss(params: Any) -> jax.Array:
        inputs = {name: arrays.get(name) for name in ENCODED}
        logs = jax.nn.log_softmax(apply(params, cfg, arrays["input_ids"], **inputs)[0][:, :-1])
        wanted = labels[:, 1:]
        picked = jnp.take_along_axis(logs, jnp.maximum(wanted, 0)[..., None], axis=-1)[..., 0]
        return -jnp.mean(picked, where=wanted != -100)

    return jax.grad(loss)(params)


@functools.lru_cache(maxsize=1)
def golden_llava(goldens: Path) -> Model:
    """The golden LLaVA in its original layout."""
    return load(goldens / "ckpt" / "llava_orig", vision_dir=goldens / "ckpt" / "clip_tower", dtype="float32", mesh=None)


def expanded(ids: Any, mask: Any, labels: Any, pixels: Any, patches: int = 16) -> dict[str, np.ndarray]:
    """A golden batch with every -200 written out as its patches, as the processors do."""
    times = np.where(ids == -200, patches, 1) * (mask == 1)
    lengths = times.sum(axis=1)
    real = np.arange(lengths.max())[None] < lengths[:, None]
    found = {"pixel_values": pixels[:, None], "attention_mask": real.astype(int)}
    for name, values, fill in (("input_ids", ids, 0), ("labels", np.where(ids == -200, -100, labels), -100)):
        found[name] = np.full(real.shape, fill)
        found[name][real] = np.repeat(values.ravel(), times.ravel())
    return found


REFERENCE_TOTAL = 7_062_902_784  # the reference counts the whole tower: one more block and the post layer norm


def llava_7b() -> ModelConfig:
    """LLaVA-1.5-7B's shapes."""
    attention = Attention(32, 32, head_dim=128, rope=RopeConfig(10000.0, "default"))
    layers = (Layer(attention, Dense(11008)),) * 32
    text = TextConfig(4096, layers, BlockConfig(1e-5), 32000, False, 4096, "llama")
    attention = Attention(16, 16, head_dim=64, bias=True, out_bias=True)
    layers = (Layer(attention, Dense(4096, activation="quick_gelu", gated=False, bias=True)),) * 23
    vision = VisionConfig(1024, layers, BlockConfig(1e-5, norm="layer"), 24, 336, 14, 3, "clip")
    return ModelConfig("llava", "original", text, vision, ProjectorConfig("gelu", True), image_token_id=-200)


def width_scores(cfg: ModelConfig, seed: int = 0, gqa: str = "groups") -> Scores:
    """Random ones."""
    draw = np.random.default_rng(seed)
    heads = tuple(draw.random(s.mixer.kv_heads if gqa == "groups" else s.mixer.q_heads) for s in cfg.text.layers)
    neurons = tuple(draw.random(s.channel.mlp) for s in cfg.text.layers)
    return Scores("l1", shape_digest(cfg) + "-x", {"gqa": gqa}, unit_scores(heads, neurons, gqa))


def unit_scores(heads, mlp, gqa: str = "groups", component: str = "text") -> dict[Key, np.ndarray]:
    """Scores of heads and neurons of a component's layers."""
    axis = "q_heads" if gqa == "q_heads" else "kv_heads"
    return {
        Key(component, i, name): part
        for i, both in enumerate(zip(heads, mlp, strict=True))
        for name, part in zip((axis, "mlp"), both, strict=True)
    }


# What heads and neurons write with, in each stack.
OUTPUTS = {"text": ("self_attn/o_proj", "mlp/down_proj"), "vision": ("self_attn/out_proj", "mlp/fc2")}


def silenced(one: Model, layers: Sequence[KeptLayer], stack: str = "text") -> Model:
    """The model in which all layers, heads and neurons but these write zero to the stream, the biases of layers too."""
    found, rest = unstack_layers(one.params, one.cfg, stack)
    found, alive = [dict(layer) for layer in found], {kept.index: kept for kept in layers}
    for i, layer in enumerate(found):
        for owner, axis in zip(OUTPUTS[stack], ("q_heads", "mlp"), strict=True):
            masked, stay = np.zeros_like(layer[f"{owner}/weight"]), list(alive[i].kept[axis]) if i in alive else []
            masked[:, stay] = np.asarray(layer[f"{owner}/weight"])[:, stay]
            layer[f"{owner}/weight"] = masked
            if i not in alive:
                layer[f"{owner}/bias"] = np.zeros_like(layer[f"{owner}/bias"])
    return one.replace(params=stack_layers(found, rest, one.cfg, stack))


def assert_scores(found: Scores, expected: Scores, **tolerance: float) -> None:
    """Both have the same values, total and by token type, bit for bit unless a tolerance is given."""
    for ours, theirs in zip(
        (found, *found.by_token_type.values()), (expected, *expected.by_token_type.values()), strict=True
    ):
        ours, theirs = (one.values if isinstance(one, Scores) else one for one in (ours, theirs))
        assert ours.keys() == theirs.keys()
        for key, values in theirs.items():
            np.testing.assert_allclose(ours[key], values, **{"rtol": 0, **tolerance}, err_msg=str(key))


def depth_scores(cfg: ModelConfig, importance: list[float]) -> Scores:
    return Scores("block_influence", shape_digest(cfg) + "-x", {}, layer_scores(importance))


def layer_scores(importance, component: str = "text") -> dict[Key, np.ndarray]:
    """Scores of a component's layers."""
    return {Key(component, None, LAYERS): np.asarray(importance, np.float64)}


def rows(number=16, length=12, vocabulary=61, seed=0, batch=4):
    """Calibration batches; every second row is padded."""
    draw = np.random.default_rng(seed)
    ids, mask = draw.integers(0, vocabulary, (number, length)), np.ones((number, length), np.int32)
    mask[1::2, length - 3 :] = 0
    return [
        {"input_ids": ids[at : at + batch], "attention_mask": mask[at : at + batch]} for at in range(0, number, batch)
    ]


def plan_for(teacher: Model, keep) -> PrunePlan:
    """A plan that keeps these layers, or (layer, query heads, key heads, neurons)."""
    layers = [layer if isinstance(layer, KeptLayer) else kept_units(*layer) for layer in keep]
    return hand_plan(teacher.cfg, fingerprint(teacher), text=layers)


def narrow(teacher: Model, neurons: int) -> PrunePlan:
    """A plan for `EQUAL` layers that keeps all heads, and these many neurons of each layer."""
    return plan_for(teacher, [(i, tuple(range(4)), (0, 1), tuple(range(neurons))) for i in range(len(EQUAL))])


def missing(ours: Model, teacher: Model, batch) -> float:
    """Squared error of the final states over a batch's real tokens."""
    a, b = (np.asarray(forward(one, **batch, capture=("hidden",))[1]["hidden"][-1]) for one in (ours, teacher))
    return float((((a - b) ** 2) * batch["attention_mask"][..., None]).sum())
