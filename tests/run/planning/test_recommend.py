"""`vlmprune recommend` as a person meets it: words, a config that runs, and what is refused."""

import json
import re
import shlex
import shutil

import pytest
import yaml
from PIL import Image
from refusal import refused
from repository import full_size_models
from study_cases import rows, write_sweep
from study_guide import update_guide
from vlm_cases import llava_config

from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.run.cli.config_files import read_experiment, shipped_config
from vlmprune_jax.run.cli.flags import parse, parse_bytes, parse_share
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.cli.stages import stage_command
from vlmprune_jax.run.experiment.variants import check_experiment
from vlmprune_jax.run.planning.case import predict_plan
from vlmprune_jax.run.planning.guide import FILE
from vlmprune_jax.run.workdir.sweep import read_sweep

DEEP = {"num_hidden_layers": 16, "intermediate_size": 200, "hidden_size": 96, "head_dim": 16}


@pytest.fixture
def folder(tmp_path):
    """A LLaVA of 16 layers, of which only config.json is there."""
    config = llava_config("llama", "clip")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "text_config": {**config["text_config"], **DEEP}})
    )
    return tmp_path / "model"


def told(capsys, *argv):
    assert main(["recommend", *argv]) == 0
    return capsys.readouterr().out


def commands_in(out):
    """Return the arguments of the commands in a recommendation."""
    block = out.split("\n\n")[1].replace("\\\n", "")
    return [shlex.split(command) for command in block.split("&&")]


def write_records(folder, count=700):
    """Write a small data set in place of easy-VQA; return its files as `write_dataset` does."""
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>\nRed?"}, {"from": "gpt", "value": "no"}]
    records = [{"id": f"r{number}", "image": "a.png", "conversations": turns} for number in range(count)]
    (folder / "a.json").write_text(json.dumps(records))
    return {"train": folder / "a.json", "test": folder / "a.json", "images": folder}


def experiment_of(path):
    return read_experiment(parse("score", stage_command("score"), [f"--config={path}", "--workdir=w"]).config)


@pytest.mark.parametrize(
    ("asked", "methods", "recovery"),
    [
        (["--ratio=0.2"], {"depth"}, "sft_l2"),
        (["--ratio=35%"], {"depth", "width"}, "sft_l2"),
        (["--ratio=0.1", "--compute=projector"], {"depth"}, "projector"),
        (["--ratio=0.5", "--data=100%"], {"width"}, "sft_l2"),
        (["--ratio=0.1", "--compute=none", "--speed"], {"depth"}, None),
    ],
)
def test_the_config_does_what_is_advised(folder, tmp_path, capsys, asked, methods, recovery):
    path = tmp_path / "mine.yaml"
    out = told(capsys, f"--model={folder}", f"--save={path}", *asked)
    if "--ratio=35%" in asked:
        assert re.match(r"asked: 35 % of the model \(\d+\.\d+ % of the decoder\)\nprune: remove whole layers", out)
        assert "by Block Influence; beside it remove neurons and\n  heads" in out
    experiment = experiment_of(path)
    check_experiment(experiment)
    assert experiment.model.hf_dir == str(folder)
    variants = experiment.prune_variants
    assert set(variants or {experiment.prune.method}) == methods
    assert experiment.data.template == experiment.data.aspect_ratio == "auto"
    assert experiment.data.system is None
    (command,) = commands_in(out)
    assert command[:3] == ["vlmprune", "run", f"--config={path}"]
    files = ["--config.data.train=TRAIN.json", "--config.data.images=IMAGES", "--config.data.eval=QUESTIONS.json"]
    assert command[4:] == files
    if recovery is None:
        assert (experiment.recover.method, experiment.reconstruct.method) == ("none", "least_squares")
    else:
        assert recovery in {experiment.recover.name, *(one["recover"]["name"] for one in variants.values())}
        assert experiment.data.fraction == (1.0 if "--data=100%" in asked else 0.05)
    if not variants:
        _, cfg = read_config(folder)
        reached = predict_plan(experiment, cfg).actual_ratio
        asked_for = parse_share("ratio", asked[0].removeprefix("--ratio="))
        assert reached == pytest.approx(asked_for, abs=0.035)
        assert f"{100 * reached:.4g} % of the model" in out.replace("\n  ", " ")


def test_bytes_are_kept_to(folder, tmp_path, capsys):
    _, cfg = read_config(folder)
    whole, path = 2 * count_params(cfg), tmp_path / "a.yaml"
    out = told(capsys, f"--model={folder}", f"--bytes={0.8 * whole:.0f}", "--compute=projector", f"--save={path}")
    plan = predict_plan(experiment_of(path), cfg)
    assert 0.7 * whole < 2 * plan.parameters_after <= 0.8 * whole
    assert experiment_of(path).export.dtype == "bfloat16"
    assert f"size: {2 * plan.parameters_after / 1e6:.3g} MB of {whole / 1e6:.3g} MB in bfloat16" in out


@pytest.mark.parametrize("asked", ["--ratio=0.3", "--ratio=34%", "--bytes=1.9MB"])
def test_what_is_printed_for_the_demo_runs_as_printed(tmp_path, capsys, monkeypatch, asked):
    """Three lines of decision, the commands, three lines of evidence; then the commands, up to the first model call."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlmprune_jax.run.demo.easyvqa.write_dataset", lambda path: write_records(tmp_path))
    out = told(capsys, f"--model={shipped_config('demo').model.hf_dir}", asked)
    blocks = [[line for line in block.splitlines() if line[0] != " "] for block in out.split("\n\n")]
    labels = [list(dict.fromkeys(line.partition(":")[0] for line in block)) for block in blocks]
    assert [label for label in labels[0] if label != "steps"] == ["asked", "prune", "recover", "size"]
    assert [label for label in labels[2] if label not in ("measured", "warning")] == ["expect", "because", "more"]
    assert max(len(line) for line in out.splitlines() if "/" not in line) <= 80
    first, run = commands_in(out)  # recommend --save, then run
    for _ in range(2):  # the same command again does no harm
        assert main(first[1:]) == 0
    assert commands_in(capsys.readouterr().out)[0] == run
    assert main([*run[1:], "--dry_run"]) == 0
    lines = capsys.readouterr().out
    assert "no effect" not in lines
    assert "but the model folder says" not in lines
    assert "but those of the folder's chat template" not in lines


@pytest.mark.parametrize("name", ["llava", "demo"])
def test_prompts_and_images_are_prepared_as_the_model_folder_says(tmp_path, capsys, name):
    """Neither as the family's recipe does (LLaVA's: llava_v1, pad) nor as the evidence did (the demo's: square)."""
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text(json.dumps(full_size_models()["llava"]))
    model = tmp_path / "llava" if name == "llava" else shipped_config("demo").model.hf_dir
    told(capsys, f"--model={model}", "--ratio=0.3", f"--save={tmp_path / 'a.yaml'}")
    data = experiment_of(tmp_path / "a.yaml").data
    assert data.fraction == 0.05  # the paper does not say how much data its rows used
    assert (data.template, data.system, data.aspect_ratio) == ("auto", None, "auto")
    assert data.max_length == (2048 if name == "llava" else 88)


def test_files_of_ones_own_take_the_place_of_the_evidences_data(folder, tmp_path, capsys):
    model, path = shipped_config("demo").model.hf_dir, tmp_path / "own.yaml"
    train = write_records(tmp_path, 3000)["train"]
    given = (f"--train={train}", f"--images={tmp_path}", "--eval=e.json")
    out = told(capsys, f"--model={model}", "--ratio=0.3", *given, f"--save={path}")
    data = experiment_of(path).data
    assert (data.source, data.train, data.eval, data.images) == ("files", str(train), "e.json", str(tmp_path))
    assert data.fraction == 0.64  # 5 % would be 4 steps
    assert "steps: 60 of 32 records (1,920 of 3,000 records in 1 pass)" in out
    assert "expect: unknown, as nothing was measured with this model, data and ratio" in out
    assert data.max_length is None
    (command,) = commands_in(out)
    assert len(command) == 4
    assert "--train" not in out
    out = told(capsys, f"--model={folder}", "--ratio=0.3", *given[:2])
    assert commands_in(out)[1][4:] == ["--config.data.eval=QUESTIONS.json"]


@pytest.mark.parametrize(
    ("data", "counted"), [(["--data=5%"], "1 of 32 records (12 of"), ([], "7 of 32 records (240 of")]
)
def test_too_few_steps_are_not_advised(tmp_path, capsys, data, counted):
    """Of 240 records, 5 % are one step, after which a model answers worse than before."""
    model, files = shipped_config("demo").model.hf_dir, write_records(tmp_path, 240)
    asked = [f"--model={model}", "--ratio=0.3", f"--train={files['train']}", f"--images={tmp_path}", *data]
    out = told(capsys, *asked, f"--save={tmp_path / 'a.yaml'}")
    assert f"steps: do not train: too few: {counted} 240 records in 1 pass); the shortest" in out.replace("\n  ", " ")
    assert "expect: unknown" in out
    assert experiment_of(tmp_path / "a.yaml").recover.method == "none"


def test_rows_of_ones_own(folder, tmp_path, capsys):
    study, guide = write_sweep(tmp_path / "sweep", rows()), tmp_path / "guide.json"
    update_guide(guide, {"mine": read_sweep(study)})
    out = told(capsys, f"--model={folder}", "--ratio=0.1", f"--guide={guide}").replace("\n  ", " ")
    (measured,) = (line for line in out.splitlines() if "with teacher" in line)
    assert measured == (
        "measured: 98.10 % (96.08 to 100.12, 3 seeds) with teacher, 1.06 M, 16 % of its decoder removed, "
        "depth + sft_l2 on 5 % of the data: accuracy on questions"
    )


def test_names_in_a_guide_and_of_folders_stay_names_in_the_config(folder, tmp_path, capsys):
    """A guide is a file from anywhere; the model's folder may have any name."""
    keys = ("x = 0\n    open('OWNED', 'w'); y", "class", "a b", "1", "x.y", "", "&a !!python/x")
    guide, odd = json.loads(FILE.read_text()), tmp_path / '"; import os #\n"""\\ !!x: {'
    shutil.copytree(folder, odd)
    for settings in guide["settings"].values():
        settings.setdefault("recover", {}).setdefault("losses", {})["extra"] = dict.fromkeys(keys, 0.5)
    (tmp_path / "guide.json").write_text(json.dumps(guide))
    told(capsys, f"--model={odd}", "--ratio=0.1", f"--guide={tmp_path}/guide.json", f"--save={tmp_path / 'a.yaml'}")
    saved = yaml.safe_load((tmp_path / "a.yaml").read_text())
    assert saved["model"]["hf_dir"] == str(odd)
    assert saved["recover"]["losses"]["extra"] == dict.fromkeys(keys, 0.5)


def test_what_is_refused(folder, tmp_path, capsys):
    model, ratio = f"--model={folder}", "--ratio=0.2"
    both = "give either --ratio=0.3 (share of all parameters to remove) or --bytes=2GB (maximum size)"
    (tmp_path / "there.yaml").write_text("mine")
    for flags, fact in (
        ([ratio], "no model given: add --model=DIR"),
        ([f"--model={tmp_path / 'nowhere'}", ratio], "nowhere"),
        ([model], both),
        ([model, ratio, "--bytes=2GB"], both),
        ([model, "--bytes=2GB"], "bytes in bfloat16, so no pruning is needed"),
        ([model, "--bytes=1000"], "no measurement supports removing 102 % of the decoder"),
        ([model, "--ratio=0.3", "--compute=none", "--speed"], "no measurement supports removing"),
        ([model, "--ratio=1.2"], "ratio=1.2 must be at least 0 and below 1"),
        ([model, "--ratio=much"], "--ratio=much: must be a share, such as 5% or 0.05"),
        ([model, ratio, "--compute=ful"], "did you mean 'full'?"),
        ([model, ratio, f"--save={tmp_path / 'there.yaml'}"], "exists already"),
        ([model, ratio, f"--save={tmp_path / 'there.json'}"], "must be the name of a config file"),
        ([model, ratio, f"--guide={tmp_path / 'none.json'}"], "no such file"),
    ):
        assert main(["recommend", *flags]) == 2
        err = capsys.readouterr().err
        assert fact in err
        assert err.count("\n") == 1
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_sizes_and_shares():
    sizes = {"2e9": 2e9, "2GB": 2e9, "2 gb": 2e9, "2GiB": 2**31, "1.5MB": 1.5e6, "700": 700.0, "2E+9": 2e9}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "GB", "-2GB", "0", "1e999", "2GBit", "1.2.3", "nan", "inf"):
        refused("--bytes", parse_bytes, text)
    shares = {"5%": 0.05, "0.05": 0.05, "none": 0.0, " 30 %": 0.3}
    assert {text: parse_share("data", text) for text in shares} == pytest.approx(shares)
