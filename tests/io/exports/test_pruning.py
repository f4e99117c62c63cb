"""File surgery: the bytes of load, apply and save without the model in memory, all or nothing; pruning in one call."""

import json
import os
import resource
import subprocess
import sys

import jax
import numpy as np
import pytest
from decoder_cases import MISTRAL, PHI, PHI3, QWEN2, QWEN3
from hf_cases import LLAMA, LLAVA, edit_weights, keep_layers, keep_width, make_folder, prune
from prune_cases import on_mesh
from refusal import refused
from repository import ROOT

import vlmprune_jax as vp
from vlmprune_jax.base.console import make_reporter
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.checkpoints.read import open_model
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.stages import work as work_module
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.ledger import run_task

DECODERS = {"mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "phi": PHI, "phi3": PHI3}
CUTS = {
    "depth": lambda model: keep_layers(model, [0, 2]),
    "width": lambda model: keep_width(model, [1], range(3, 56, 2)),
    "uneven": lambda model: keep_width(model, [0, 1], range(3, 56, 3), [1, 2]),
}


@pytest.fixture
def llama(tmp_path):
    return make_folder(tmp_path / "llama", LLAMA)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_bytes(tmp_path, source, cut, tower=None, **options):
    model = vp.load(source, vision_dir=tower)
    pruned, plan = cut(model)
    options = {"dtype": "source", **options}
    vp.save(pruned, tmp_path / "saved", source_dir=source, plan=plan, **options)
    vp.prune_folder(source, plan, tmp_path / "cut", vision_dir=tower, **options)
    saved, written = contents(tmp_path / "saved"), contents(tmp_path / "cut")
    assert list(saved) == list(written)
    assert {"config.json", "plan.json", "README.md"} < set(saved)
    assert [name for name in saved if saved[name] != written[name]] == []


# The same bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cut", "options"),
    [
        ("llava_orig", "width", {}),
        ("llava_orig_bin", "uneven", {}),
        ("llama_gqa", "depth", {}),
        ("llava_hf", "uneven", {"dtype": "bfloat16"}),
        ("llava_hf", "uneven", {"dtype": "float16", "uneven": "pad"}),
    ],
)
def test_the_bytes_of_load_apply_and_save(goldens, tmp_path, name, cut, options):
    """The plan has the loaded model's fingerprint, which surgery compares with that of the files."""
    tower = goldens / "ckpt/clip_tower" if "orig" in name else None
    same_bytes(tmp_path, goldens / "ckpt" / name, CUTS[cut], tower, **options)


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder(tmp_path, name):
    """Plain MLPs, biases, norms of heads, windows; in Phi-3, tensors that hold several weights."""
    source = make_folder(tmp_path / "source", DECODERS[name])
    for uneven in ("per_layer", "pad"):
        (tmp_path / uneven).mkdir()
        same_bytes(tmp_path / uneven, source, keep_mixed, uneven=uneven)


def keep_mixed(model):
    """Layer 1 whole, 2 gone, the first without half its neurons, the last without its first group of heads."""
    shape = model.cfg.text.layers[0]
    group = shape.mixer.q_heads // shape.mixer.kv_heads
    heads = {"q_heads": tuple(range(group, shape.mixer.q_heads)), "kv_heads": tuple(range(1, shape.mixer.kv_heads))}
    whole = vp.KeptLayer.whole(1, shape)
    first = vp.KeptLayer(0, {**whole.kept, "mlp": tuple(range(1, shape.channel.mlp, 2))})
    return prune(model, [first, whole, vp.KeptLayer(3, {**whole.kept, **heads})])


def test_mixed_dtypes_and_blocks_smaller_than_a_tensor(tmp_path, monkeypatch):
    """Norms in float32 among float16 weights, carried tensors, several shards, and block ends inside tensors.

    What a plan leaves whole is read in blocks.
    """
    source = make_folder(tmp_path / "llava", LLAVA)
    edit_weights(source, lambda all_: {k: v if "norm" in k else v.astype(np.float16) for k, v in all_.items()})
    monkeypatch.setattr("vlmprune_jax.io.exports.folder.MAX_SHARD_BYTES", 30_000)
    monkeypatch.setattr("vlmprune_jax.io.checkpoints.read.BLOCK", 4096)
    same_bytes(tmp_path, source, CUTS["uneven"])
    monkeypatch.setattr("vlmprune_jax.io.checkpoints.read.FileArray.read", None)
    vp.prune_folder(source, CUTS["depth"](vp.load(source))[1], tmp_path / "blocks")


def test_the_fingerprint_is_that_of_the_loaded_model(goldens):
    """Whatever its dtype and placement."""
    folder = goldens / "ckpt/llava_hf"
    model, expected = vp.load(folder), vp.fingerprint(open_model(folder))
    for one in (model, vp.load(folder, dtype="bfloat16"), on_mesh(model, 2, 2, 2)):
        assert vp.fingerprint(one) == expected


def test_a_plan_of_another_model_is_refused(llama, tmp_path):
    plan = keep_layers(vp.load(llama), [0, 3])[1]
    other = make_folder(tmp_path / "other", LLAMA, seed=1)
    refused("sizes are equal, but fingerprints differ", vp.prune_folder, other, plan, tmp_path / "out")
    narrow = make_folder(tmp_path / "narrow", {**LLAMA, "intermediate_size": 40})
    refused("plan of another model", vp.prune_folder, narrow, plan, tmp_path / "out")
    assert names(tmp_path) == ["llama", "narrow", "other"]


# Memory and devices ---------------------------------------------------------------------------------------------------

ALONE = """
import sys
import resource
import vlmprune_jax as vp
plan = vp.PrunePlan.from_json(sys.argv[2])
vp.prune_folder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
vp.prune_folder(sys.argv[1], plan, sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["depth", "uneven"])
def test_no_device_and_no_whole_model_in_memory(tmp_path, cut):
    """180 MB of weights, the largest tensor 12 MB, in a process where starting any accelerator is an error."""
    config = {**LLAMA, "intermediate_size": 60_000, "num_hidden_layers": 5}
    source = make_folder(tmp_path / "wide", config)
    size = (source / "model.safetensors").stat().st_size
    assert size > 170e6
    CUTS[cut](vp.load(source))[1].to_json(tmp_path / "plan.json")
    command = [sys.executable, "-c", ALONE, str(source), str(tmp_path / "plan.json"), str(tmp_path / "out")]
    environment = {**os.environ, "JAX_PLATFORMS": "none_such"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 90_000  # KiB: four blocks of 8 MiB, a tensor and its picked copy, file maps
    vp.load(tmp_path / "out")


# The disk -------------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_all_the_same(llama, tmp_path):
    """A real failure of a real write, in the middle of the weights (a limit on file sizes)."""
    out, plan = tmp_path / "out", keep_layers(vp.load(llama), [0, 2, 3])[1]
    vp.prune_folder(llama, plan, out)
    before, limits = contents(out), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        fact = f"{out}: File too large: nothing was written, make room"
        refused(fact, vp.prune_folder, llama, plan, out, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["llama", "out"]
    assert contents(out) == before


# The prune stage ------------------------------------------------------------------------------------------------------


def test_the_prune_stage_does_not_load_the_model(llama, tmp_path, monkeypatch):
    model, work = vp.load(llama), tmp_path / "work"
    scores = vp.score(model, None, criterion="random", seed=3)
    (work / "depth").mkdir(parents=True)
    scores.save(work / "scores.npz")
    experiment = Experiment(
        model=ModelSpec(hf_dir=str(llama)), score=vp.ScoreConfig(depth="random"), prune=vp.PlanConfig(layers_removed=2)
    )
    monkeypatch.setattr(work_module, "load", None)
    place = Work.at(work, experiment, make_reporter(False), stage="prune")
    run_task(place.task, overwrite=False, say=place.say)
    plan = vp.PrunePlan.from_json(work / "plan.json")
    vp.save(vp.apply_plan(model, plan), tmp_path / "saved", source_dir=llama, plan=plan, dtype="float32")
    assert contents(work / "pruned") == contents(tmp_path / "saved")
    assert len(plan.layers) == 2


# In one call: `vp.batches` makes rows of records for the model in a folder, `vp.prune` takes the further steps --------

TEACHER = ROOT / "vlmprune_jax/demo/teacher"


@pytest.fixture(scope="module")
def images(goldens):
    return goldens / "data/images"


@pytest.fixture(scope="module")
def records(goldens):
    listed = json.loads((goldens / "data/samples.json").read_text())
    return [entry for entry in listed if isinstance(entry.get("image"), str)][:4]


def test_rows_go_into_scores_and_losses_as_they_are(images, records):
    made = vp.batches(TEACHER, records[:3], images=images, batch_size=2, aspect_ratio="square")
    assert [len(batch.record_ids) for batch in made] == [2, 2]
    assert made[1].record_ids[1] == ""  # a row that only fills the batch
    model = vp.load(TEACHER)
    assert (vp.score(model, made, criterion="block_influence").layers > 0).all()
    assert 0 < float(vp.losses(model, made[0], vp.LossConfig())["ce"]) < 100


def test_a_file_and_its_entries_are_the_same_rows(images, records, tmp_path):
    (tmp_path / "records.json").write_text(json.dumps(records))
    settings = {"images": images, "batch_size": 4, "max_length": 400, "aspect_ratio": "square"}
    (one,), (two,) = (vp.batches(TEACHER, source, **settings) for source in (tmp_path / "records.json", records))
    assert one.record_ids == two.record_ids
    assert "vision" in one.arrays["media"]
    jax.tree.map(np.testing.assert_array_equal, one.arrays, two.arrays)
    assert one.arrays["input_ids"].shape == (4, 400)


def test_one_call_is_the_same_as_its_steps(images, records):
    pruned = vp.prune(TEACHER, records, ratio=0.3, images=images, scoring={"samples": 3, "seed": 7})
    model, drawn = vp.load(TEACHER), vp.batches(TEACHER, records, images=images, samples=3, seed=7)
    assert [name for batch in drawn for name in batch.record_ids] != [entry["id"] for entry in records[:3]]
    assert len(drawn) == 3
    plan = vp.make_plan(vp.score(model, drawn, criterion="block_influence"), model, method="depth", ratio=0.3)
    expected = vp.apply_plan(model, plan)
    assert pruned.cfg == expected.cfg
    jax.tree.map(np.testing.assert_array_equal, pruned.params, expected.params)


def test_listed_layers_keep_their_original_numbers(tmp_path):
    vp.prune(TEACHER, layers=(3, 4)).save(tmp_path / "out")
    plan = vp.PrunePlan.from_json(tmp_path / "out/plan.json")
    assert plan.kept_layers == (0, 1, 2, 5, 6, 7, 8, 9)
    assert plan == vp.make_plan(None, vp.load(TEACHER), layers=(3, 4))


@pytest.mark.parametrize(
    ("function", "options", "fact"),
    [
        ("batches", {"max_lenght": 3}, "'max_lenght' .* did you mean 'max_length'"),
        ("batches", {"fraction": 0.5}, "'fraction' is not accepted"),
        ("batches", {"batch_size": 0}, "batch_size=0"),
        ("batches", {"images": None}, "no image folder"),
        ("batches", {"max_length": 3, "truncate": False}, "maximum length 3"),
        ("batches", {"records": []}, "no records"),
        ("prune", {}, "exactly one of ratio, layers_removed, layers and budget, got none"),
        ("prune", {"ratio": 0.3, "layers": (3,)}, "got ratio and layers"),
        ("prune", {"ratio": 0.3}, "'block_influence' needs calibration batches"),
        ("prune", {"layers": range(10)}, "at least 1 must remain"),
        ("prune", {"layers": (3,), "protect": (3, 5)}, r"layers \[3\] must stay .prune.protect"),
        ("prune", {"layers": (3,), "stack": "both"}, "prune.layers lists layers of one stack"),
        ("prune", {"layers": (3,), "method": "width"}, "'width' has no such setting, only depth"),
        ("prune", {"layers": (3,), "reconstruct": True}, "reconstruct=True needs calibration records"),
        ("prune", {"method": "none"}, 'prune.method="none" removes nothing'),
    ],
)
def test_calls_that_cannot_be(images, records, function, options, fact):
    if function == "batches":
        options = {"records": records, "images": images, "aspect_ratio": "square", **options}
    refused(fact, getattr(vp, function), TEACHER, **options)
