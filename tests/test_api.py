"""What others install and import: the public API, and the wheel, which finds the configs that come with it by name."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder
from prune_cases import EQUAL, UNEQUAL, batch, config, depth_scores, model, width_scores
from refusal import refused
from repository import ROOT
from stack_cases import decoder_layer

import vlmprune_jax as vp
from vlmprune_jax.core.models.inputs import VisualInputs
from vlmprune_jax.run.experiment.recipes import shipped_configs

EQ = config(EQUAL, vision=True)
ONE, BATCH, SCORES = model(EQ), batch(EQ), depth_scores(EQ, [3.0, 1.0, 2.0, 5.0, 4.0])
PLAN = vp.make_plan(SCORES, EQ, method="depth", ratio=0.1)
BLOCKS, STEP = {"criterion": "block_influence"}, vp.RecoverConfig(steps=1)
INPUTS = {name: values for name, values in BATCH.items() if name != "labels"}


def test_every_public_name_loads():
    assert all(getattr(vp, name) is not None for name in vp.__all__)
    assert vp._HOMES.keys() <= {*vp.__all__}


def test_a_model_is_taken_where_its_config_is():
    ids = [[1, EQ.image_token_id, 5]]
    assert vp.count_params(ONE) == vp.count_params(EQ)
    assert vp.make_plan(SCORES, ONE, method="depth", ratio=0.1).kept_layers == (0, 2, 3, 4)
    np.testing.assert_array_equal(vp.expand_images(ids, ONE)["input_ids"], vp.expand_images(ids, EQ)["input_ids"])


def test_names_and_settings_that_an_editor_shows():
    assert dir(vp) == sorted(vp.__all__)
    settings = {field.name for field in dataclasses.fields(vp.PlanConfig)}
    for function in (vp.make_plan, vp.prune_iteratively):
        assert settings <= inspect.signature(function).parameters.keys()
    assert vp.make_plan.__module__ == "vlmprune_jax"  # so that worker processes find it


def test_forward_gives_what_its_docstring_says_and_methods_of_a_model_are_the_functions():
    capture = ("hidden", "image_features", "inputs_embeds")
    whole = {}
    for dtype in (np.float32, jnp.bfloat16):
        one = ONE.replace(params=jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), ONE.params))
        whole[dtype] = logits, aux = vp.forward(one, **INPUTS, capture=capture)
        assert (logits.shape, logits.dtype) == ((4, 9, 62), dtype)
        assert [x.shape for x in aux["hidden"]] == [(4, 9, 20)] * 6
        found = {name: x.shape for name, x in aux.items() if name != "hidden"}
        assert found == {"image_features": (3, 4, 20), "inputs_embeds": (4, 9, 20)}
    assert vp.forward(one, BATCH["input_ids"][-1:])[1] == {}
    jax.tree.map(np.testing.assert_array_equal, ONE(INPUTS, capture=capture), whole[np.float32])
    tokens = ONE.generate(**INPUTS, max_new_tokens=2)
    np.testing.assert_array_equal(tokens, vp.generate(ONE, **INPUTS, max_new_tokens=2))
    inputs = {"input_ids", "attention_mask", *VisualInputs.__annotations__}
    assert inputs == inspect.signature(vp.forward).parameters.keys() - {"model", "capture", "want"}


def test_folder_and_plan_are_no_part_of_a_model():
    """Neither equality nor the text of a model shows them, and only keywords set them."""
    one = vp.Model({"a": 1}, EQ)
    same = one.replace(source=Path("DIR"), plan=PLAN)
    assert same == one
    assert (same.replace(params={}).source, same.replace(params={}).plan) == (Path("DIR"), PLAN)
    assert repr(ONE.replace(source=Path("DIR"), plan=PLAN)) == repr(ONE)
    with pytest.raises(TypeError):
        vp.Model({}, EQ, Path("DIR"))


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: vp.apply_plan(PLAN, ONE), "model must be of type Model, got PrunePlan: call vp.apply_plan(model, "),
        (lambda: vp.apply_plan(ONE, "plan.json"), "of type PrunePlan, got str: pass vp.PrunePlan.from_json("),
        (lambda: vp.score("DIR", [BATCH], **BLOCKS), "vp.score: model must be of type Model, got str: pass vp.load(DI"),
        (lambda: vp.score(ONE, BATCH, **BLOCKS), "must be of type Iterable, got dict: pass a list, such as [batch]"),
        (lambda: vp.score(ONE, [[1]], **BLOCKS), "calibration batch 0: must be a mapping of arrays, got list: make it"),
        (lambda: vp.reconstruct(ONE, PLAN, ONE, BATCH), "vp.reconstruct: batches must be of type Iterable, got dict"),
        (lambda: vp.make_plan(ONE, SCORES, ratio=0.1), "of type Scores or Sequence, got Model: call vp.make_p"),
        (lambda: vp.make_plan(SCORES, ONE, "depth"), "of type PlanConfig, got str: pass vp.PlanConfig(...)"),
        (lambda: vp.recover(ONE, [BATCH], STEP, progress=False), "batch of step 1 must be a Batch"),
        (lambda: vp.evaluate(ONE, [{}], max_new_tokens=1), "must be a QuestionBatch, got dict: use vp.questions"),
        (lambda: vp.perplexity(ONE, "a", window=2, batch_size=1), "token_ids: must be the ids of a text's tokens"),
        (lambda: vp.measure_speed({"a": "DIR"}), "models: must be Model objects, got str: pass"),
        (lambda: vp.save(ONE, "out", source_dir=ONE), "got Model: call vp.save(model, out_dir, source_dir=...)"),
        (lambda: ONE.save(ONE), "out_dir must be of type str or Path, got Model: call vp.save(model, out_dir)"),
        (lambda: ONE.save("out"), "vp.save: source_dir is not set, and the model was not loaded from a folder: pass"),
        (lambda: ONE([BATCH]), "model(batch): batch must be a mapping with input_ids: pass the outputs of a processor"),
        (lambda: ONE({"pixel_values": 1}), "model(batch): batch must be a mapping with input_ids"),
        (lambda: ONE({"input_ids": [[1]], "pixel_value": 1}), "no input 'pixel_value'; did you mean 'pixel_values'?"),
        (lambda: vp.load(ONE), "vp.load: hf_dir must be of type str or Path, got Model: call vp.load(hf_dir)"),
    ],
)
def test_arguments_of_another_type(call, line):
    refused(re.escape(line), call)


def test_what_a_notebook_shows_is_short():
    cfg = config(UNEQUAL, vision=True)
    assert repr(cfg) == (
        "ModelConfig(llava, transformers layout; text: hidden size 20, 2 x (4/2 heads, 12 neurons), "
        "1 x (8/2 heads, 10 neurons), 1 x (4 heads, 12 neurons); vision: hidden size 8, 2 x (2 heads, 10 neurons))"
    )
    widths = width_scores(cfg)
    plan = vp.make_plan(widths, cfg, method="width", ratio=0.1)
    depth = vp.make_plan(depth_scores(cfg, [3.0, 1.0, 2.0, 4.0]), cfg, method="depth", layers_removed=1)
    assert repr(model(cfg)) == (
        "Model(llava, transformers layout, 14,988 parameters, float32\n"
        "  text: hidden size 20, 2 x (4/2 heads, 12 neurons), 1 x (8/2 heads, 10 neurons), 1 x (4 heads, 12 neurons)\n"
        "  vision: hidden size 8, 2 x (2 heads, 10 neurons))"
    )
    assert repr(model(config(UNEQUAL * 8))).endswith(
        "8 x [2 x (4/2 heads, 12 neurons), 1 x (8/2 heads, 10 neurons), 1 x (4 heads, 12 neurons)])"
    )
    many = tuple(decoder_layer(4, 2, width) for width in range(8, 40))
    assert repr(model(config(many))).endswith("1 x (4/2 heads, 10 neurons), ... (32 layers))")
    assert repr(depth) == (
        "PrunePlan(depth by block_influence: 14,988 -> 12,676 parameters, 15.43 % removed\n  text: 3 of 4 layers, "
        "without 1; 1 x (4/2 heads, 12 neurons), 1 x (8/2 heads, 10 neurons), 1 x (4 heads, 12 neurons))"
    )
    assert repr(plan) == (
        "PrunePlan(width by l1: 14,988 -> 13,498 parameters, 9.94 % removed\n"
        "  text: 4 of 4 layers; 2 x (4/2 heads, 8 neurons), 1 x (8/2 heads, 6 neurons), 1 x (3 heads, 8 neurons))"
    )
    assert repr(widths) == (
        f"Scores(l1, text: importance of 10 key/value heads and 46 neurons of 4 layers; model {widths.fingerprint})"
    )


def test_names_of_version_0_1_are_refused_with_the_new_ones():
    fact = r"criterion 'taylor' has no option 'by_kind'.*: it is now 'by_token_type'"
    refused(fact, vp.score, ONE, [], criterion="taylor", by_kind=True)
    fact = "make_plan has no setting 'snap_for': it is now 'align_to'"
    refused(fact, vp.make_plan, SCORES, EQ, method="depth", ratio=0.2, snap_for=None)


# --- the wheel --------------------------------------------------------------------------------------------------------

SCRIPT = """
from pathlib import Path
from vlmprune_jax.run.cli.config_files import shipped_config
from vlmprune_jax.run.experiment.recipes import shipped_configs
print(*shipped_configs(), sep=",")
print(next(iter(shipped_configs().values())).is_relative_to(Path.cwd()))
print(shipped_config("llava15_7b:depth,0.3").prune.layers_removed, shipped_config("sweeps/demo_cut").recover.name)
"""


def test_an_installed_package_finds_its_configs(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path / "dist"), versions=["standard"])
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path / "site", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [",".join(shipped_configs()), "True", "10 sft_l2"]
    assert {"demo", "llava15_7b", "sweeps/study_vlm"} <= shipped_configs().keys()


def test_the_container_and_the_release_use_what_there_is():
    """The image copies files of the repository and installs extras that exist; a tag's version is the package's."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    image = (ROOT / "Dockerfile").read_text()
    named = re.findall(r"EXTRAS=([\w,]+)", image + (ROOT / "launch/gke.sh").read_text())
    assert {extra for names in named for extra in names.split(",")} == {"demo", "cuda", "tpu"} <= extras.keys()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", image, re.MULTILINE) for name in line.split()]
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / name).exists() for name in copied)
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    steps = [step.get("run", "") for step in release["jobs"]["build"]["steps"]]
    assert [step for step in steps if "build" in step or "twine check" in step]
    assert release["jobs"]["publish"]["needs"] == "build"
