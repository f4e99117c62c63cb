"""What the compiled step holds in memory, from its HLO and XLA's own report; and that it never waits for the host."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
import recover_cases as cases
from stack_cases import decoder_layer

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.params import param_shapes, unflatten
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.program import make_program
from vlmprune_jax.core.recovery.terms import needs_teacher
from vlmprune_jax.core.recovery.trainable import partition
from vlmprune_jax.core.sections import LoraConfig

ROWS, VOCAB, CHUNK = 8, 16411, 2  # no other size of the model is 16,411
TOTAL = 10


def make_arguments(cfg: ModelConfig, loss: LossConfig, trainable: str, seq: int, build, remat: str = "none"):
    """(program, parameters that train, other arguments of its step): `build(shape, dtype)` makes every array."""
    settings = cases.settings(losses=loss, remat=remat, trainable=trainable, lora=cfg.lora or LoraConfig())
    teacher_cfg, cfg = cfg if needs_teacher(loss) else None, dataclasses.replace(cfg, lora=None)
    program = make_program(cfg, settings, teacher_cfg=teacher_cfg, kept_layers=None, mesh=None, num_steps=TOTAL)
    top_k = loss.teacher_top_k
    params = {path: build(shape, "float32") for path, shape in param_shapes(program.cfg).items()}
    masters, frozen = partition(params, program.groups)
    batch = {"media": {}} | {name: build((ROWS, seq), "int32") for name in ("input_ids", "attention_mask", "labels")}
    if top_k:
        batch |= {"teacher_ids": build((ROWS, seq, top_k), "int32")}
        batch |= {"teacher_logprobs": build((ROWS, seq, top_k + 1), "float32")}
    taught = None
    if program.teacher is not None:
        taught = unflatten({path: build(shape, "float32") for path, shape in param_shapes(teacher_cfg).items()})
    return program, masters, frozen, taught, batch


def compiled_step(cfg: ModelConfig, loss: LossConfig, trainable: str, seq: int, remat: str = "none"):
    """The step, compiled for shapes."""
    program, masters, *rest = make_arguments(cfg, loss, trainable, seq, jax.ShapeDtypeStruct, remat)
    return program.step.lower(program.init.eval_shape(masters), *rest).compile()


CACHED = {"kl": 1.0, "teacher_top_k": 8, "teacher_inputs": "own"}


@pytest.mark.parametrize(
    "terms", [pytest.param({"ce": 1.0}, marks=pytest.mark.slow), {"kl": 1.0, "rkl": 1.0}, CACHED], ids=str
)
def test_no_logits_of_the_whole_sequence(terms):
    """Of all arrays with a vocabulary axis, none has more positions than a chunk has, in any dtype."""
    cfg = cases.config(vision=False)
    cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, vocab_size=VOCAB))
    seq = 64
    compiled = compiled_step(cfg, LossConfig(chunk=CHUNK, **terms), "all", seq)
    shapes = {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())}
    of_vocabulary = {math.prod(shape) // VOCAB for shape in shapes if VOCAB in shape}
    assert max(of_vocabulary) == ROWS * CHUNK
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * ROWS * seq * VOCAB / 2  # half of one float32 [B, T, V]


def test_frozen_weights_have_no_gradients():
    """What a LoRA step needs beside its arguments, its activations included, is less than gradients would take."""
    cfg = dataclasses.replace(cases.config(vision=False), lora=cases.LORA)
    text = dataclasses.replace(cfg.text, hidden_size=256)
    cfg = dataclasses.replace(cfg, text=text).with_layers((decoder_layer(4, 2, 2048),) * 4)
    frozen = sum(math.prod(shape) for path, shape in param_shapes(cfg).items() if path.endswith("/weight"))
    compiled = compiled_step(cfg, LossConfig(), "lora", seq=4)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * frozen


@pytest.mark.slow
def test_what_the_backward_pass_keeps():
    """Of every layer "full" keeps its input; "dots" what has a name as well; "none" much more."""
    inputs = {"q_proj": 16, "k_proj": 16, "v_proj": 16, "o_proj": 24, "fc1": 16, "fc2": 96}
    outputs = {"q_proj": 24, "k_proj": 12, "v_proj": 12, "o_proj": 16, "fc1": 96}  # the backward pass needs none of fc2
    lora = LoraConfig(rank=8, alpha=6.0, dropout=0.1, targets=tuple(inputs))
    n_layers, seq = 24, 64
    cfg = dataclasses.replace(cases.config(vision=False, gated=False), lora=lora)
    cfg = cfg.with_layers((cfg.text.layers[0].resized({"q_heads": 4, "kv_heads": 2, "mlp": 96}),) * n_layers)
    held = {
        remat: compiled_step(cfg, LossConfig(chunk=4), "lora", seq, remat).memory_analysis().temp_size_in_bytes
        for remat in ("none", "dots", "full")
    }
    masks, low = sum(inputs.values()), 4 * lora.rank * len(inputs)
    named = 4 * sum(outputs.values()) + low + masks  # bytes of a position in a layer
    assert (held["dots"] - held["full"]) / (n_layers * ROWS * seq) > named - 0.75 * min(low, masks)
    assert held["none"] > 2 * held["dots"]


def test_the_step_does_not_wait_for_the_host():
    """No transfer that was not asked for, and no callback: with its arguments on the device a step is device work."""
    cfg = dataclasses.replace(cases.config(vision=False), lora=dataclasses.replace(cases.LORA, dropout=0.1))
    rng = np.random.default_rng(0)

    def build(shape, dtype):
        return jax.device_put(rng.integers(0, 2, shape).astype(dtype))

    program, masters, *rest = make_arguments(cfg, LossConfig(), "lora", 16, build)
    state = program.init(masters)
    lowered = program.step.lower(state, *rest)
    given = [leaf.donated for leaf in jax.tree.leaves(lowered.args_info)]
    assert given == [True] * len(jax.tree.leaves(state)) + [False] * (len(given) - len(jax.tree.leaves(state)))
    compiled = lowered.compile()
    with jax.transfer_guard("disallow"):
        _, metrics = compiled(state, *rest)
    assert np.isfinite(metrics["loss"])
    assert not re.findall(r"callback|infeed|outfeed|stablehlo\.(?:send|recv)", lowered.as_text())
