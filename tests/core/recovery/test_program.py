"""The compiled step: FLOPs by the formula, its memory, that it never waits for the host; and its optimizer."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases
import torch
import transformers
from stack_cases import decoder_layer, tower_layer

from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.params import param_shapes, unflatten
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.flops import step_flops
from vlmprune_jax.core.recovery.program import make_optimizer, make_program, make_schedule, step_context
from vlmprune_jax.core.recovery.terms import needs_teacher
from vlmprune_jax.core.recovery.trainable import partition
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.run.planning.ahead_of_time import executed_flops

ROWS, LENGTH = 8, 12
VOCAB, CHUNK = 16411, 2  # no other size of the model is 16,411


def step_arguments(cfg, config, length, build=jax.ShapeDtypeStruct, teacher_cfg=None):
    """(program, parameters that train, other arguments of its step), for ROWS rows with an image each."""
    program = make_program(cfg, config, teacher_cfg=teacher_cfg, kept_layers=None, mesh=None, num_steps=10)
    params = {path: build(shape, np.float32) for path, shape in param_shapes(program.cfg).items()}
    masters, frozen = partition(params, program.groups)
    names = ("input_ids", "attention_mask", "labels")
    batch = {"media": {}} | {name: build((ROWS, length), np.int32) for name in names}
    if cfg.vision is not None:
        shape = (3, 6, 6) if cfg.tower else cfg.feature_shape
        batch["media"]["vision"] = Packed(build((ROWS, 1, *shape), np.float32))
    if top_k := config.losses.teacher_top_k:
        batch["teacher_ids"] = build((ROWS, length, top_k), np.int32)
        batch["teacher_logprobs"] = build((ROWS, length, top_k + 1), np.float32)
    taught = {} if program.teacher is None else param_shapes(teacher_cfg)
    teacher = unflatten({path: build(shape, np.float32) for path, shape in taught.items()}) or None
    return program, masters, frozen, teacher, batch


def compiled_step(cfg, config, length, teacher_cfg=None):
    program, masters, *rest = step_arguments(cfg, config, length, teacher_cfg=teacher_cfg)
    return program.step.lower(program.init.eval_shape(masters), *rest).compile()


CE, L2 = LossConfig(chunk=4), LossConfig(ce=0.0, l2=1.0, chunk=4)
ALL_TERMS = LossConfig(ce=0.5, l2=0.5, kl=0.1, teacher_inputs="own", chunk=4)
STORED_KL = LossConfig(ce=0.5, kl=0.1, teacher_inputs="own", chunk=4, teacher_top_k=5)
MODELS = [*itertools.product(["vision", "tied", "cached", "unequal tower"], ["all", "lora"])]
MODELS += [("vision", "projector"), ("cached", "projector")]  # a decoder alone has none
SOME = [("vision", "all"), ("tied", "lora"), ("cached", "lora")]


@pytest.mark.parametrize(
    ("model", "trainable", "loss"),
    [*((*one, ALL_TERMS) for one in MODELS), *((*one, loss) for one in SOME for loss in (CE, L2, STORED_KL))],
)
def test_the_formula_counts_what_the_step_computes(model, trainable, loss):
    """A decoder alone is "tied"; features come from a cache where the model is "cached"."""
    changes = {"vision": model != "tied", "tie_embeddings": model == "tied"}
    cfg, teacher_cfg = cases.config(**changes), cases.config(layers=3, **changes) if needs_teacher(loss) else None
    if model == "cached":
        cfg = dataclasses.replace(cfg, tower=False)
        teacher_cfg = teacher_cfg and dataclasses.replace(teacher_cfg, tower=False)
    if model == "unequal tower":
        layers = (tower_layer(2, 2, 16), tower_layer(1, 1, 5), tower_layer(1, 1, 5), tower_layer(2, 2, 3))
        cfg = cfg.with_layers(layers, "vision")
    config = cases.settings(trainable=trainable, lora=cases.LORA, losses=loss, remat="none")
    program, masters, *rest = step_arguments(cfg, config, LENGTH, teacher_cfg=teacher_cfg)
    with step_context(None, "float32"):
        executed = executed_flops(program.step.trace(program.init.eval_shape(masters), *rest).jaxpr.jaxpr)
    images = 0 if cfg.vision is None else ROWS
    found = step_flops(program.cfg, teacher_cfg, loss, program.groups, rows=ROWS, length=LENGTH, images=images)
    # The formula counts visible pairs of positions, XLA's attention computes all.
    expected = found.total + found.attention * (2 * LENGTH / (LENGTH + 1) - 1)
    # Logits are computed again in the backward pass, the student's and the teacher's.
    text = cfg.text
    head = 2 * text.vocab_size * text.hidden_size * ROWS * LENGTH
    expected += head * bool(loss.ce or loss.kl) + head * bool(loss.kl and needs_teacher(loss))
    # The input of the projector's first layer needs a gradient only if the tower trains.
    if cfg.vision is not None and (trainable != "all" or not cfg.tower):
        expected -= 2 * cfg.vision.hidden_size * text.hidden_size * ROWS * cfg.tokens_per_image
    assert executed == round(expected)


CACHED = {"kl": 1.0, "teacher_top_k": 8, "teacher_inputs": "own"}


@pytest.mark.parametrize(
    "terms", [pytest.param({"ce": 1.0}, marks=pytest.mark.slow), {"kl": 1.0, "rkl": 1.0}, CACHED], ids=str
)
def test_no_logits_of_the_whole_sequence(terms):
    """Of all arrays with a vocabulary axis, none has more positions than a chunk has, in any dtype."""
    cfg = cases.config(vision=False)
    cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, vocab_size=VOCAB))
    loss, seq = LossConfig(chunk=CHUNK, **terms), 64
    settings = cases.settings(losses=loss, remat="none")
    compiled = compiled_step(cfg, settings, seq, cfg if needs_teacher(loss) else None)
    shapes = {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())}
    of_vocabulary = {math.prod(shape) // VOCAB for shape in shapes if VOCAB in shape}
    assert max(of_vocabulary) == ROWS * CHUNK
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * ROWS * seq * VOCAB / 2  # half of one float32 [B, T, V]


def test_frozen_weights_have_no_gradients():
    """What a LoRA step needs beside its arguments, its activations included, is less than gradients would take."""
    cfg = cases.config(vision=False)
    text = dataclasses.replace(cfg.text, hidden_size=256)
    cfg = dataclasses.replace(cfg, text=text).with_layers((decoder_layer(4, 2, 2048),) * 4)
    frozen = sum(math.prod(shape) for path, shape in param_shapes(cfg).items() if path.endswith("/weight"))
    settings = cases.settings(trainable="lora", lora=cases.LORA, losses=LossConfig(), remat="none")
    compiled = compiled_step(cfg, settings, 4)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * frozen


@pytest.mark.slow
def test_what_the_backward_pass_keeps():
    """Of every layer "full" keeps its input; "dots" what has a name as well; "none" much more."""
    inputs = {"q_proj": 16, "k_proj": 16, "v_proj": 16, "o_proj": 24, "fc1": 16, "fc2": 96}
    outputs = {"q_proj": 24, "k_proj": 12, "v_proj": 12, "o_proj": 16, "fc1": 96}  # the backward pass needs none of fc2
    lora = LoraConfig(rank=8, alpha=6.0, dropout=0.1, targets=tuple(inputs))
    n_layers, seq = 24, 64
    cfg = cases.config(vision=False, gated=False)
    cfg = cfg.with_layers((cfg.text.layers[0].resized({"q_heads": 4, "kv_heads": 2, "mlp": 96}),) * n_layers)
    settings = cases.settings(trainable="lora", lora=lora, losses=LossConfig(chunk=4))
    held = {
        remat: compiled_step(cfg, dataclasses.replace(settings, remat=remat), seq).memory_analysis().temp_size_in_bytes
        for remat in ("none", "dots", "full")
    }
    masks, low = sum(inputs.values()), 4 * lora.rank * len(inputs)
    named = 4 * sum(outputs.values()) + low + masks  # bytes of a position in a layer
    assert (held["dots"] - held["full"]) / (n_layers * ROWS * seq) > named - 0.75 * min(low, masks)
    assert held["none"] > 2 * held["dots"]


def test_the_step_does_not_wait_for_the_host():
    """No transfer that was not asked for, and no callback: with its arguments on the device a step is device work."""
    lora = dataclasses.replace(cases.LORA, dropout=0.1)
    settings = cases.settings(trainable="lora", lora=lora, losses=LossConfig(), remat="none")
    rng = np.random.default_rng(0)

    def build(shape, dtype):
        return jax.device_put(rng.integers(0, 2, shape).astype(dtype))

    program, masters, *rest = step_arguments(cases.config(vision=False), settings, 16, build)
    state = program.init(masters)
    lowered = program.step.lower(state, *rest)
    given = [leaf.donated for leaf in jax.tree.leaves(lowered.args_info)]
    assert given == [True] * len(jax.tree.leaves(state)) + [False] * (len(given) - len(jax.tree.leaves(state)))
    compiled = lowered.compile()
    with jax.transfer_guard("disallow"):
        _, metrics = compiled(state, *rest)
    assert np.isfinite(metrics["loss"])
    assert not re.findall(r"callback|infeed|outfeed|stablehlo\.(?:send|recv)", lowered.as_text())


# --- the optimizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 30])
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
    for large in (0.03, 0.99):  # a step at the full rate is left, also of a single step
        rate = make_schedule(cases.settings(schedule=name, learning_rate=2e-3, warmup_ratio=large), steps)
        assert max(float(rate(step)) for step in range(steps)) == pytest.approx(2e-3)


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
    rates = {"text/a/weight": (0.1, 0.2), "text/norm/weight": (0.1, 0.0), "projector/l/bias": (0.3, 0.0)}
    reference = torch.optim.AdamW(
        [{"params": [theirs[path]], "lr": rate, "weight_decay": decay} for path, (rate, decay) in rates.items()],
        betas=(config.b1, config.b2),
        eps=config.eps,
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
