"""Settings that change nothing are named with the reason, and no others are."""

import dataclasses
import itertools
from dataclasses import replace

import pytest

from vlmprune_jax.base.settings import STAGES as names_of_stages
from vlmprune_jax.base.settings import nested, override
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.run.cli.config_files import read_experiment, read_hyper, starting_point
from vlmprune_jax.run.cli.flags import parse
from vlmprune_jax.run.cli.stages import stage_command
from vlmprune_jax.run.evaluation.config import SpeedConfig
from vlmprune_jax.run.experiment.recipes import shipped_configs
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.stages.stage import STAGES, Stage
from vlmprune_jax.run.stages.unused import unused_settings
from vlmprune_jax.run.sweep.hyper import sweep_runs

WIDTH = {"prune.method": "width", "score.width": "l1"}
TRIMMED = {"prune.vocabulary.size": 300}


@pytest.fixture(scope="module")
def cfg(goldens):
    return read_config(goldens / "ckpt/llava_hf")[1]


def unused(cfg, changes, sections=()):
    found = unused_settings([(override(Experiment(), nested(Experiment(), changes)), cfg)], sections)
    return sorted(name for names in found.values() for name in names)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"score.variant": "param_mix", "score.reference_compat": True}, "score.variant"),
        (WIDTH | {"score.image_weight": 0.1, "score.samples": 9, "score.seed": 1},
         "score.image_weight score.samples score.seed"),
        ({"prune.method": "width", "score.depth": "angular", "score.memory_budget": 9}, "score.depth"),
        ({"score.width": "l1", "score.options": {"candidates": 3}}, "score.options score.width"),
        (TRIMMED | {"prune.protect": (1,), "score.samples": 9}, "prune.protect score.samples"),
        ({"prune.ratio": 0.2, "prune.vocabulary.bits": False}, "prune.vocabulary.bits"),
        ({"prune.layers_removed": 1, "prune.rounding": "at_least"}, "prune.rounding"),
        (WIDTH | {"prune.heads": "keep", "prune.attn_layers": (1, 2), "prune.mlp_layers": (1, 2)}, "prune.attn_layers"),
        ({"prune.deepstack": "move", "prune.producers": "redirect"}, "prune.deepstack prune.producers"),
        ({"prune.budget.flops": 1e9, "prune.budget.context": 99, "prune.budget.batch": 2}, "prune.budget.batch"),
        ({"prune.budget.step_ms": 9, "prune.budget.slice": "v5e:2x4", "prune.budget.images": 2}, ""),
        ({"reconstruct.samples": 9, "reconstruct.refit": True}, "reconstruct.refit reconstruct.samples"),
        ({"reconstruct.samples": 9, "export.quantize": "w8a16", "export.rounding": "gptq"}, ""),
        ({"recover.steps": 3, "recover.epochs": 2.0, "data.seed": 1}, "data.seed recover.epochs"),
        ({"recover.trainable": "decoder", "recover.lora.rank": 4}, "recover.lora.rank"),
        ({"recover.losses.ce": 0.0, "recover.losses.l2": 1.0, "recover.losses.chunk": 9, "recover.control": False},
         "recover.control recover.losses.chunk"),
        ({"recover.method": "none", "evaluate.unrecovered": False}, "evaluate.unrecovered"),
        ({"recover.teacher_cache": "t", "recover.teacher_top_k": 9}, "recover.teacher_cache recover.teacher_top_k"),
        ({"recover.losses.kl": 1.0, "recover.losses.temperature": 3.0, "recover.teacher_top_k": 9},
         "recover.teacher_top_k"),
        ({"recover.losses.l2_layers": (1,), "recover.losses.temperature": 3.0, "recover.losses.teacher_inputs": "own"},
         "recover.losses.l2_layers recover.losses.teacher_inputs recover.losses.temperature"),
        ({"recover.method": "none", "recover.teacher_cache": "t", "data.fraction": 0.1},
         "data.fraction recover.teacher_cache"),
        ({"prune.layers": (1,), "prune.rounding": "at_least", "score.samples": 9}, "prune.rounding score.samples"),
        ({"prune.method": "none", "prune.ratio": 0.3, "reconstruct.method": "least_squares"},
         "prune.ratio reconstruct.method"),
        ({"evaluate.text_window": 99}, "evaluate.text_window"),
        ({"evaluate.sets": {"a": {"data": "a.json", "metric": "pope"}}, "data.eval": "b", "evaluate.metric": "mme",
          "evaluate.max_length": 9}, "data.eval evaluate.metric"),
        ({"evaluate.sets": {"a": {"text": "a.txt"}}, "data.eval": "b", "evaluate.text_window": 99}, "data.eval"),
        ({"model.vision_dir": "tower", "data.aspect_ratio": "square"}, "model.vision_dir"),
        ({"export.format": "gguf", "export.rolled_positions": True, "speed.batch_size": 2}, "speed.batch_size"),
        ({"recover_variants": {"a": {"recover": {"steps": 3}}, "b": {"recover": {"epochs": 2.0}}}}, ""),
        ({"recover_variants": {"a": {"recover": {"steps": 3, "epochs": 2.0}}, "b": {"recover": {"steps": 1}}}},
         "recover.epochs"),
    ],
)  # fmt: skip
def test_settings_without_effect(cfg, changes, names):
    assert unused(cfg, changes) == names.split()


def test_a_decoder_takes_no_images(cfg):
    decoder = dataclasses.replace(cfg, vision=None, projector=None, family="llama", layout="transformers")
    changes = {"data.max_image_tokens": 9, "data.max_length": 9, "speed.image": False}
    changes |= {"recover.projector_learning_rate": 1e-3}
    assert unused(decoder, changes) == ["data.max_image_tokens", "recover.projector_learning_rate", "speed.image"]
    assert unused(decoder, changes, ("recover",)) == ["recover.projector_learning_rate"]


def test_a_stage_of_the_users_own_may_use_any_setting_of_its_sections(cfg, monkeypatch):
    changes = {"recover.steps": 3, "recover.epochs": 2.0, "data.seed": 1}
    monkeypatch.setitem(
        STAGES, "average", Stage(help="Average weights.", run=lambda work, recover: None, sections=("recover",))
    )
    assert unused(cfg, changes) == ["data.seed"]
    assert unused(cfg, changes, ("recover",)) == []


def test_every_stage_is_declared():
    assert set(names_of_stages) - {"teacher_cache"} == set(STAGES)


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_configs_print_no_note_on_their_own_settings(goldens, cfg, name):
    """Not even if a user's settings or --only leave some of them without effect."""
    variants = {"demo": ("", ":full", ":quick"), "demo_reconstruct": ("", ":tower")}
    variants |= dict.fromkeys(
        ("sweeps/image_tokens", "sweeps/study_vlm", "sweeps/study_vlm_text"), (f":{goldens / 'ckpt/llava_hf'}",)
    )
    for variant in variants.get(name, ("",)):
        flags = parse("run", stage_command("run"), [f"--config={name}{variant}", "--workdir=w"])
        start, whole = starting_point(flags), read_experiment(flags.config)
        if name.startswith("sweeps/"):
            runs = [run.experiment for run in sweep_runs(whole, read_hyper(flags.config_file))]
            assert unused_settings([(run, cfg) for run in runs], start=start) == {}
            continue
        assert unused_settings([(whole, cfg)]) == {}
        runs = [read_experiment(flags.config, only=only) for only in whole.prune_variants]
        runs.append(replace(whole, recover=replace(whole.recover, method="none"), speed=SpeedConfig()))
        for run in runs:
            assert unused_settings([(run, cfg)], start=start) == {}


def test_settings_that_a_config_file_took_over_are_not_the_users(tmp_path, cfg):
    file, body = tmp_path / "mine.py", "config = shipped_config('demo')\n    config.recover.lora.rank = 9"
    file.write_text(
        "from vlmprune_jax.run.cli.config_files import shipped_config\n\n\n"
        f"def get_config():\n    {body}\n    return config\n"
    )
    for flag, names in ("rounds=0", ["recover.lora.rank"]), ("new_tokens=7", ["recover.lora.rank", "speed.new_tokens"]):
        argv = [f"--config={file}", "--workdir=w", "--config.speed.rounds=0", f"--config.speed.{flag}"]
        flags = parse("run", stage_command("run"), argv)
        unused = unused_settings([(read_experiment(flags.config), cfg)], start=starting_point(flags))
        assert sorted(itertools.chain(*unused.values())) == names
