"""The planner: model FLOPs against the traced step, costs read from programs, and one small compilation for TPUs."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from refusal import refused

from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.planning import case as tpu_case
from vlmprune_jax.run.planning.ahead_of_time import (
    Compiled,
    DoesNotFit,
    compile_for_tpu,
    executed_flops,
    make_slice,
)
from vlmprune_jax.run.workdir.artefact import read_artefact
from vlmprune_jax.run.workdir.tpu_plan import TPU_PLAN, TpuPlan

CONFIG = """
from vlmprune_jax.run.cli.config_files import experiment_config

def get_config():
    config = experiment_config()
    config.model.hf_dir = {folder!r}
    config.model.dtype = "bfloat16"
    config.data.max_length = 128
    config.prune.layers_removed = 1
    config.recover.batch_size = 8
    config.recover.accumulation = 2
    config.recover.compute_dtype = "bfloat16"
    config.recover.remat = "full"
    config.recover.lora.rank = 8
    config.recover.losses = {{"ce": 0.5, "l2": 0.5}}
    config.mesh.fsdp = -1
    return config
"""


@pytest.fixture(scope="module")
def experiment_file(tmp_path_factory):
    """A config for a LLaVA folder that holds config.json and nothing else."""
    folder = tmp_path_factory.mktemp("plan")
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "rope_theta": 1e4, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {"model_type": "clip_vision_model", **tower, "image_size": 28, "patch_size": 14, "projection_dim": 64}
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 500,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
        "text_config": text, "vision_config": vision,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "experiment.py"
    path.write_text(CONFIG.format(folder=str(folder)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_a_small_step_compiles_for_tpus(topology, experiment_file, tmp_path, capsys):
    flags = [f"--config={experiment_file}", f"--topology={topology}", "--records=80", f"--workdir={tmp_path}"]
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


def test_a_cached_teacher_takes_no_memory_and_no_arithmetic(experiment_file, monkeypatch, tmp_path):
    """Its top-k logits come with the rows; what is compiled for has no weights of a teacher."""
    compiled_for, saved = [], tmp_path / "tpu_plan.json"

    def seen(step, *arguments):
        compiled_for.append(arguments)
        return Compiled(0, 0, executed_flops(step.trace(*arguments).jaxpr.jaxpr), 0.0)

    monkeypatch.setattr(tpu_case, "compile_for_tpu", seen)
    losses = {"ce": 0.5, "l2": 0.0, "kl": 0.5, "teacher_inputs": "own"}
    path = tmp_path / "cached.py"
    path.write_text(experiment_file.read_text().replace('{"ce": 0.5, "l2": 0.5}', repr(losses)))
    flags = [f"--config={path}", "--topology=v5e:2x2", f"--save={saved}"]
    told = []
    for more in ([], ["--config.recover.teacher_cache=somewhere", "--config.recover.teacher_top_k=16"]):
        assert main(["plan", *flags, *more]) == 0
        told += read_artefact(tmp_path / TPU_PLAN, TpuPlan).recoveries.values()
    beside, cached = told
    assert beside.flops["teacher"] > cached.flops["teacher"] == 0
    assert beside.executed_flops > 1.3 * cached.executed_flops
    assert cached.teacher is None
    _, _, teacher, batch = compiled_for[1]
    assert teacher is None
    assert compiled_for[0][2] is not None
    assert (batch["teacher_ids"].shape, batch["teacher_ids"].dtype) == ((8, 128, 16), np.int32)
    assert (batch["teacher_logprobs"].shape, batch["teacher_logprobs"].dtype) == ((8, 128, 17), jnp.bfloat16)


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


def test_what_to_do_about_a_step_that_does_not_fit(experiment_file, monkeypatch, capsys):
    def refuse(*_, **__):
        raise DoesNotFit(20 * 2**30, 16 * 2**30)

    monkeypatch.setattr(tpu_case, "compile_for_tpu", refuse)
    flags = [f"--config={experiment_file}", "--topology=v5e:2x2"]
    assert main(["plan", *flags]) == 2
    error = capsys.readouterr().err
    assert "on v5e:2x2 needs 20.00 GiB of HBM per chip, 4.00 GiB more than it has" in error
    assert "try --topology=v5e:2x4" in error
    assert main(["plan", *flags, "--config.recover.remat=none", "--config.recover.accumulation=1"]) == 2
    assert "try recover.remat=full or recover.accumulation=2 or --topology=v5e:2x4" in capsys.readouterr().err


def test_cached_features_take_the_tower_out_of_the_plan(experiment_file, monkeypatch, capsys):
    seen = []

    def refuse(step, state, frozen, teacher, batch):
        seen.append(([*state.params, *frozen, *flatten(teacher)], batch))
        raise DoesNotFit(20 * 2**30, 16 * 2**30)

    monkeypatch.setattr(tpu_case, "compile_for_tpu", refuse)
    flags = [f"--config={experiment_file}", "--topology=v5e:2x2"]
    assert main(["plan", *flags]) == main(["plan", *flags, "--config.data.feature_cache=features"]) == 2
    assert [any(path.startswith("vision/") for path in paths) for paths, _ in seen] == [True, False]
    pixels, features = (batch["media"]["vision"].values for _, batch in seen)
    assert pixels.shape[-3] == 3
    assert (features.shape, features.dtype) == ((8, 1, 4, 64), jnp.bfloat16)
    flags += ["--config.data.feature_cache=features", "--config.recover.trainable=all"]
    assert main(["plan", *flags]) == 2
    assert "trains the vision tower, which changes its features" in capsys.readouterr().err


def test_buckets_are_planned_by_the_largest(experiment_file, monkeypatch, capsys):
    seen = []

    def fake(_, state, frozen, teacher, batch):
        seen.append(batch["input_ids"].shape)
        return Compiled(1, 1, 10**12, 1.0)

    monkeypatch.setattr(tpu_case, "compile_for_tpu", fake)
    flags = [f"--config={experiment_file}", "--topology=v5e:2x2", "--records=80"]
    assert main(["plan", *flags]) == 0
    said = capsys.readouterr().out
    assert "bucket" not in said
    assert main(["plan", *flags, "--config.data.length_buckets=(32,64,128)"]) == 0
    said = capsys.readouterr().out
    assert seen == [(8, 128)] * 2
    assert "the largest of 32, 64, 128 tokens" in said
    assert "if every batch is of the largest bucket (how many are of each depends on the data)" in said
    assert main(["plan", *flags, "--config.data.length_buckets=(32,64)"]) == 2
    assert "must end with data.max_length=128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5x:8x8", "'v5x:8x8': unknown TPU .known: v5e, v5p, v6e, tpu7x.: use for example v5e:"),
        ("v5e", "'v5e' is not GENERATION:SIZES or GENERATION:SIZES:SLICES: use for example v5e:"),
        ("v5e:3x5", "does not exist .* use one of v5e: 2x2, 2x4"),
    ],
)
def test_unknown_topologies_suggest_known_ones(topology, message):
    refused(message, make_slice, topology)


def test_a_limit_on_images_of_one_size_is_refused(experiment_file, capsys):
    flags = [f"--config={experiment_file}", "--topology=v5e:2x2", "--config.data.max_image_tokens=64"]
    assert main(["plan", *flags]) == 2
    assert "data.max_image_tokens=64: every image of this model has 4 tokens" in capsys.readouterr().err


def test_a_mesh_that_leaves_chips_idle_is_refused(experiment_file, capsys):
    assert main(["plan", f"--config={experiment_file}", "--topology=v5e:2x2", "--config.mesh.fsdp=2"]) == 2
    assert "needs 2 devices but there are 4" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_images_of_any_size_are_planned_by_their_largest_bucket(goldens, tmp_path, family):
    """The whole step compiles: windows, deepstack and positions in three rows, at the tokens of the largest image."""
    path = tmp_path / "experiment.py"
    path.write_text(CONFIG.format(folder=str(goldens / "families" / family / "ckpt")))
    flags = [f"--config={path}", "--topology=v5e:2x2", "--records=80", f"--workdir={tmp_path}"]
    with jax.default_matmul_precision("default"):
        assert main(["plan", *flags, "--config.data.max_image_tokens=64"]) == 0
    [told] = read_artefact(tmp_path / TPU_PLAN, TpuPlan).recoveries.values()
    assert told.image_tokens_buckets[-1] > 60
    assert told.flops["vision"] > 0
