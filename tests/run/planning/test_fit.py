"""The planner: predicted shapes, model FLOPs against the traced step, costs of programs, compilations for TPUs."""

from __future__ import annotations

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases
from experiment_cases import write_experiment
from jax.sharding import NamedSharding, PartitionSpec
from refusal import refused
from repository import ROOT, full_size_models
from vlm_cases import gemma3_config

from vlmprune_jax.base.settings import override
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.kernels import splash_attention
from vlmprune_jax.core.models.params import count_params, flatten
from vlmprune_jax.core.prune import Scores
from vlmprune_jax.core.prune.criteria.weights import random_scores
from vlmprune_jax.core.prune.fingerprints import shape_digest
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.program import make_program
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.exports.pruning import make_plan
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.planning import case as tpu_case
from vlmprune_jax.run.planning.ahead_of_time import Compiled, DoesNotFit, compile_for_tpu, executed_flops, make_slice
from vlmprune_jax.run.workdir.artefact import read_artefact
from vlmprune_jax.run.workdir.tpu_plan import TPU_PLAN, TpuPlan

SECTIONS = {
    "data": {"train": None, "max_length": 128},
    "prune": {"layers_removed": 1},
    "recover": {
        "batch_size": 8, "accumulation": 2, "compute_dtype": "bfloat16", "remat": "full", "lora": {"rank": 8},
        "losses": {"ce": 0.5, "l2": 0.5},
    },
    "mesh": {"fsdp": -1},
}  # fmt: skip
DTYPE = "--config.model.dtype=bfloat16"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, goldens):
    """Flags of a config for a LLaVA folder that holds config.json and nothing else."""
    folder = tmp_path_factory.mktemp("plan")
    config = json.loads((goldens / "ckpt/llava_hf/config.json").read_text())
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config["text_config"] |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, **heads}
    config["vision_config"] |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return [write_experiment(folder, goldens, [], folder, **SECTIONS), DTYPE]


@pytest.fixture
def plan(experiment, monkeypatch, tmp_path, capsys):
    """Callable (*flags) -> exit code and output of `vlmprune plan` for v5e:2x2; nothing is compiled.

    `compiled_for`: the arguments of every program. `needed`: bytes that it needs, of 16 GiB.
    """

    def compiled(step, *arguments):
        call.compiled_for.append(arguments)
        if call.needed:
            raise DoesNotFit(call.needed, 16 * 2**30)
        return Compiled(1, 1, executed_flops(step.trace(*arguments).jaxpr.jaxpr), 1.0)

    def call(*flags):
        saved = f"--save={tmp_path / TPU_PLAN}"
        code = main(["plan", *experiment, "--topology=v5e:2x2", saved, *flags])
        out, err = capsys.readouterr()
        return code, out + err

    call.compiled_for, call.needed = [], 0
    monkeypatch.setattr(tpu_case, "compile_for_tpu", compiled)
    return call


CACHED_FEATURES = "--config.data.feature_cache=features"


def test_a_cached_teacher_takes_no_memory_and_no_arithmetic(plan, tmp_path):
    """Its top-k logits come with the rows; what is compiled for has no weights of a teacher."""
    losses = "--config.recover.losses=" + repr({"ce": 0.5, "l2": 0.0, "kl": 0.5, "teacher_inputs": "own"})
    told = []
    for more in ([], ["--config.recover.teacher_cache=somewhere", "--config.recover.teacher_top_k=16"]):
        assert plan(losses, *more)[0] == 0
        told += read_artefact(tmp_path / TPU_PLAN, TpuPlan).recoveries.values()
    beside, cached = told
    assert beside.flops["teacher"] > cached.flops["teacher"] == 0
    assert beside.executed_flops > 1.3 * cached.executed_flops
    assert cached.teacher is None
    (_, _, running, _), (_, _, teacher, batch) = plan.compiled_for
    assert teacher is None is not running
    assert (batch["teacher_ids"].shape, batch["teacher_ids"].dtype) == ((8, 128, 16), np.int32)
    assert (batch["teacher_logprobs"].shape, batch["teacher_logprobs"].dtype) == ((8, 128, 17), jnp.bfloat16)


def test_cached_features_take_the_tower_out_of_the_plan(plan):
    plan.needed = 20 * 2**30
    code, out = plan()
    assert code == plan(CACHED_FEATURES)[0] == 2
    assert "on v5e:2x2 needs 20.00 GiB of HBM per chip, 4.00 GiB more than it has" in out
    assert "try --topology=v5e:2x4" in out
    less = "try recover.remat=full or recover.accumulation=2 or --topology=v5e:2x4"
    assert less in plan("--config.recover.remat=none", "--config.recover.accumulation=1")[1]
    held = [[*state.params, *frozen, *flatten(teacher)] for state, frozen, teacher, _ in plan.compiled_for]
    assert [any(path.startswith("vision/") for path in paths) for paths in held] == [True, False, True]
    pixels, features = (batch["media"]["vision"].values for *_, batch in plan.compiled_for[:2])
    assert pixels.shape[-3] == 3
    assert (features.shape, features.dtype) == ((8, 1, 16, 64), jnp.bfloat16)


def test_buckets_are_planned_by_the_largest(plan):
    code, said = plan("--records=80")
    assert (code, "bucket" in said) == (0, False)
    code, said = plan("--records=80", "--config.data.length_buckets=(32,64,128)")
    assert code == 0
    assert [batch["input_ids"].shape for *_, batch in plan.compiled_for] == [(8, 128)] * 2
    assert "the largest of 32, 64, 128 tokens" in said
    assert "if every batch is of the largest bucket (how many are of each depends on the data)" in said


@pytest.mark.slow  # steps of both Qwen-VL are compiled below
def test_images_of_any_size_are_planned_by_their_largest_bucket(goldens, plan, tmp_path):
    folder = goldens / "families/qwen3_vl/ckpt"
    assert plan(f"--config.model.hf_dir={folder}", "--config.data.max_image_tokens=64")[0] == 0
    [told] = read_artefact(tmp_path / TPU_PLAN, TpuPlan).recoveries.values()
    assert told.image_tokens_buckets[-1] > 60
    assert told.flops["vision"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5x:8x8"], "'v5x:8x8': unknown TPU (known: v5e, v5p, v6e, tpu7x): use for example v5e:"),
        (["--topology=v5e"], "'v5e' is not GENERATION:SIZES or GENERATION:SIZES:SLICES: use for example v5e:"),
        (["--topology=v5e:3x5"], "use one of v5e: 2x2, 2x4"),
        (["--config.data.length_buckets=(32,64)"], "must end with data.max_length=128"),
        (["--config.data.max_image_tokens=64"], "data.max_image_tokens=64: every image of this model has 16 tokens"),
        (["--config.mesh.fsdp=2"], "needs 2 devices but there are 4"),
        ([CACHED_FEATURES, "--config.recover.trainable=all"], "trains the vision tower, which changes its features"),
    ],
)
def test_what_cannot_be_planned(plan, flags, message):
    code, said = plan(*flags)
    assert (code, message in said) == (2, True), said


@pytest.mark.parametrize(
    ("topology", "size"), [("v5e:2x2", 9), ("v5p:2x2x1", 50), ("v6e:2x2", 17), ("tpu7x:2x2x1", 50)]
)
def test_a_program_that_does_not_fit_says_by_how_much(topology, size):
    """Argument and result of `size` GiB each; the compiler knows what a program may take of the chip's memory."""
    target = make_slice(topology)
    mesh = make_mesh(1, -1, 1, devices=target.devices)
    array = jax.ShapeDtypeStruct((size * 2**18, 2**10), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(DoesNotFit, match=r"needs \d+\.\d\d GiB of HBM per chip, \d\.\d\d GiB more") as caught:
        compile_for_tpu(jax.jit(lambda x: x + 1), array)
    assert caught.value.needed == pytest.approx(2 * size * 2**30, rel=0.05)
    assert caught.value.capacity == pytest.approx(target.chip.hbm, rel=1e-3)


def test_slices_lie_along_data():
    target = make_slice("v5e:2x2:2")
    mesh = make_mesh(2, 2, 2, devices=target.devices)
    assert mesh.shape["data"] == 2
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    refused(r"mesh\.data=1 must be a multiple of the number of TPU slices", make_mesh, 1, -1, 1, devices=target.devices)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_a_small_step_compiles_for_tpus(topology, experiment, tmp_path, capsys):
    flags = [*experiment, f"--topology={topology}", "--records=80", f"--workdir={tmp_path}"]
    with jax.default_matmul_precision("default"):  # the kernels do not compile for float32 products of bfloat16
        assert main(["plan", *flags]) == 0
    said = capsys.readouterr().out
    assert "GiB free" in said
    assert "10 steps" in said
    [told] = read_artefact(tmp_path / TPU_PLAN, TpuPlan).recoveries.values()
    assert (told.chips, told.student.layers, told.teacher.layers) == (4, 2, 3)
    teacher = 2 * told.teacher.parameters / 4  # bytes per chip, less what is not split
    assert teacher < told.hbm.arguments < 4 * teacher
    assert told.received["weights"] > told.received["gradients"] > 0
    assert 1 < told.executed_flops / sum(told.flops.values()) < 2.5
    assert 0 < told.mfu < 1
    assert told.topology == topology
    assert "10 steps: at least" in dict(told.table())["run"]


# --- shapes before there are scores, and what the chips of a step send each other -----------------------------------

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


def test_kernels_count_their_grid_and_loops_as_often_as_they_run_at_most():
    """Splash attention of 2 rows, 4 query and 2 key heads, in blocks of 512 positions; a loop that data may end."""
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, 64), jnp.bfloat16) for heads in (4, 2))
    traced = jax.make_jaxpr(functools.partial(splash_attention, causal=True))(q, k, k)
    assert executed_flops(traced.jaxpr) == 4 * 2 * 4 * 1024**2 * 64

    def loop(x, used):
        return jax.lax.while_loop(
            lambda state: (state[0] < 5) & (state[0] < used), lambda state: (state[0] + 1, state[1] @ x.T @ x), (0, x)
        )[1]

    traced = jax.make_jaxpr(loop)(jax.ShapeDtypeStruct((3, 8), jnp.float32), 2)
    assert executed_flops(traced.jaxpr) == 5 * 2 * (2 * 3 * 3 * 8)
