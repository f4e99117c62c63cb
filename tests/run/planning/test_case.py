"""Planning inputs: predicted shapes are those of any scores. A compiled step: what its chips send each other."""

from __future__ import annotations

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import pytest
import recover_cases as cases
from refusal import refused
from repository import ROOT, full_size_models
from vlm_cases import gemma3_config

from vlmprune_jax.base.settings import override
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.kernels import splash_attention
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune import Scores
from vlmprune_jax.core.prune.criteria.weights import random_scores
from vlmprune_jax.core.prune.fingerprints import shape_digest
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.program import make_program
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.exports.pruning import make_plan
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.planning import case as tpu_case
from vlmprune_jax.run.planning.ahead_of_time import executed_flops, make_slice

# Of the text and the tower of every family.
SIZES = {"num_hidden_layers": 4, "depth": 4, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 4,
         "num_heads": 4, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 2048, "out_hidden_size": 512,
         "mm_hidden_size": 512, "deepstack_visual_indexes": [1], "fullatt_block_indexes": [3],
         "partial_rotary_factor": 0.5, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 2048,
         "short_factor": [1.1] * 64, "long_factor": [32.0] * 64, "image_token_index": 2040, "image_token_id": 2040,
         "pad_token_id": 2041, "video_token_id": 2042, "vision_start_token_id": 2043, "vision_end_token_id": 2044,
         "boi_token_index": 2045, "eoi_token_index": 2046, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
CHIPS = 4


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("depth", {"ratio": 0.3}),
        ("depth", {"layers_removed": 3}),
        ("width", {"ratio": 0.25, "attn_layers": [1, 5], "mlp_layers": [2, 6]}),
        ("hybrid", {"ratio": 0.4, "neurons_multiple": 4}),
    ],
)
def test_predicted_shapes_are_those_of_any_scores(method, changes):
    cfg = cases.config(layers=8)
    cfg = cfg.with_layers([cfg.text.layers[0]] * 8)
    experiment = override(Experiment(), {"prune": {"method": method, **changes}})
    predicted = tpu_case.predict_plan(experiment, cfg)
    scores = Scores("random", shape_digest(cfg), {"gqa": "groups"}, random_scores(cfg, seed=5, gqa="groups"))
    plan = make_plan((scores, scores) if method == "hybrid" else scores, cfg, method=method, **changes)
    assert plan.layers != predicted.layers
    assert predicted.parameters_after == plan.parameters_after
    assert len(predicted.layers) == len(plan.layers)
    if method == "width":
        assert predicted.apply_to(cfg) == plan.apply_to(cfg)


def test_heads_that_must_stay_are_predicted_to_stay(tmp_path):
    """Of 10/5 heads transformers loads 2/1 in this Gemma 3: plans keep all, and so do predicted ones."""
    config = gemma3_config()
    config["text_config"] |= {"hidden_size": 50, "num_attention_heads": 10, "num_key_value_heads": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, cfg = read_config(tmp_path, None)
    plan = tpu_case.predict_plan(override(Experiment(), {"prune": {"method": "width", "ratio": 0.2}}), cfg)
    assert {shape.mixer.q_heads for shape in plan.apply_to(cfg).text.layers} == {10}


# One of every kind of layer, tower and image.
STEPS = ("llava", "gemma3", "gemma4_e4b", "gemma4_moe", "qwen2.5vl", "qwen3vl_moe", "qwen3.5-4b", "smolvlm-256m")


def reduced(config):
    """A config of true size with the widths and depths in SIZES."""
    if not isinstance(config, dict):
        return config
    return {key: SIZES.get(key, reduced(value)) if value is not None else None for key, value in config.items()}


@pytest.fixture
def little_effort():
    """Compile in 0.4 of the time; gathers may then overlap less with arithmetic."""
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("family", STEPS)
def test_a_step_receives_little_more_than_its_weights(family, tmp_path, monkeypatch, little_effort):
    """Each chip gathers student and teacher; the student's layers a second time, to recompute them. Bar: 2.5 times."""
    config = reduced(full_size_models()[family])
    if family.startswith("gemma"):
        config["text_config"]["layer_types"] = ["sliding_attention", "full_attention"] * 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, cfg = read_config(tmp_path)
    plan = tpu_case.predict_plan(override(Experiment(), {"prune": {"layers_removed": 1}}), cfg)
    settings = {"trainable": "lora", "compute_dtype": "bfloat16", "remat": "full", "losses": LossConfig(ce=0.5, l2=0.5)}
    target, student = make_slice("v5e:2x2"), plan.apply_to(cfg)
    mesh = make_mesh(1, CHIPS, 1, devices=target.devices)
    taught = {"teacher_cfg": cfg, "kept_layers": plan.kept_layers}
    case = tpu_case.Case(
        cfg=student,
        program=make_program(student, cases.settings(**settings), **taught, mesh=mesh, num_steps=1000),
        dtype="bfloat16",
        slice=target,
        mesh=mesh,
        lengths=(128 if cfg.vision is None else 1024,),
        slots=(0 if cfg.vision is None else 1,),
        image_tokens=(64,) if cfg.dynamic_resolution else (),
    )
    programs, compile_for_tpu = [], tpu_case.compile_for_tpu
    keep = lambda *arguments: programs.append(compile_for_tpu(*arguments)) or programs[-1]  # noqa: E731
    monkeypatch.setattr(tpu_case, "compile_for_tpu", keep)
    with jax.default_matmul_precision("default"):
        planned = sum(tpu_case.estimate(case).received.values())
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    received = sum(importlib.import_module("compiled_text").collective_bytes(programs[0].text).values())
    weights = 2 * (count_params(case.cfg) + count_params(cfg)) * (CHIPS - 1) / CHIPS
    assert weights < received < 2.5 * weights
    assert 0.6 < planned / received < 1.6


@pytest.mark.parametrize(
    ("family", "slots", "tokens", "patches"), [("qwen2_5_vl", 1, 160, 16), ("internvl3", 32, None, 1)]
)
def test_steps_with_videos(goldens, family, slots, tokens, patches):
    """`data.video_frames` plans rows with a video: patches of its frames, or a slot for each."""
    folder = goldens / "video" / family / "ckpt"
    found = tpu_case._image_slots(DataSpec(video_frames=32), read_config(folder)[1], folder)
    assert (found[0][-1], *found[1][-1:], found[2]) == (slots, *([] if tokens is None else [tokens]), patches)
    larger = tpu_case._image_slots(DataSpec(video_frames=96), read_config(folder)[1], folder)
    assert larger[2] == 3 * patches or larger[0][-1] == 3 * slots


# --- what is known of a program before it runs on TPUs ---------------------------------------------------------------


def test_kernels_count_their_grid():
    """Splash attention forward: scores and mixing of 2 rows, 4 query and 2 key heads, in blocks of 512 positions."""
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, 64), jnp.bfloat16) for heads in (4, 2))
    traced = jax.make_jaxpr(functools.partial(splash_attention, causal=True))(q, k, k)
    assert executed_flops(traced.jaxpr) == 4 * 2 * 4 * 1024**2 * 64


def test_loops_count_as_often_as_they_run_at_most():
    """One that ends when the data says so: see core/models/vocabulary.py."""
    x = jax.ShapeDtypeStruct((3, 8), jnp.float32)

    def loop(x, used):
        return jax.lax.while_loop(
            lambda state: (state[0] < 5) & (state[0] < used), lambda state: (state[0] + 1, state[1] @ x.T @ x), (0, x)
        )[1]

    assert executed_flops(jax.make_jaxpr(loop)(x, 2).jaxpr) == 5 * 2 * (2 * 3 * 3 * 8)


def test_slices_lie_along_data():
    target = make_slice("v5e:2x2:2")
    mesh = make_mesh(2, 2, 2, devices=target.devices)
    assert mesh.shape["data"] == 2
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    refused(r"mesh\.data=1 must be a multiple of the number of TPU slices", make_mesh, 1, -1, 1, devices=target.devices)
