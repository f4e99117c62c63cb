"""`vlmprune export` as GGUF and as integers: made from a workdir, compared, skipped, refused."""

import json
import re
import shutil
from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest
from experiment_cases import record, write_experiment
from hf_cases import keep_layers
from PIL import Image

from vlmprune_jax.base.console import make_reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import nested, override
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.io.checkpoints.read import load, read_config
from vlmprune_jax.io.exports.pruning import prune_folder
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.experiment.arguments import with_rounding
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.experiment.variants import choose_variants
from vlmprune_jax.run.stages import evaluate, pipeline
from vlmprune_jax.run.stages.work import Work


@pytest.fixture(scope="module")
def root(tmp_path_factory, goldens):
    """A teacher, a config, and a workdir with a pruned model in it."""
    root = tmp_path_factory.mktemp("export")
    write_experiment(root, goldens, [], export={"format": "gguf", "rolled_positions": True})
    prune_folder(root / "teacher", keep_layers(load(root / "teacher"), [0, 2, 5])[1], root / "w/pruned")
    return root


@pytest.fixture
def export(root, tmp_path, capsys):
    """Callable (*flags) -> exit code and what was said, in a workdir with the pruned model."""
    shutil.copytree(root / "w", tmp_path / "w")

    def call(*flags):
        code = main(["export", f"--config={root / 'experiment.yaml'}", f"--workdir={tmp_path / 'w'}", *flags])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def test_gguf_by_command(export, tmp_path):
    out = tmp_path / "w/export"
    assert export("--config.export.quantize=q8_0")[0] == 0
    names = {"README.md", "plan.json", "teacher-pruned-Q8_0.gguf", "mmproj-teacher-pruned-f16.gguf"}
    assert {path.name for path in out.iterdir()} == names
    facts = json.loads((tmp_path / "w/.stages/export.json").read_text())["facts"]
    assert facts["max_abs_logit_difference"] <= facts["tolerance"]
    assert "3 of 6 layers" in (out / "README.md").read_text()
    assert "export: unchanged, skipped" in export("--config.export.quantize=q8_0")[1]
    code, said = export()
    assert (code, '(export.quantize was "q8_0", now "none")' in said) == (2, True)
    assert "add --overwrite to replace it, or write another format or quantisation to export-NAME/ with" in said
    assert export("--overwrite")[0] == 0
    assert (out / "teacher-pruned-BF16.gguf").is_file()
    assert not (out / "teacher-pruned-Q8_0.gguf").exists()


def test_exports_side_by_side_and_uploaded(export, tmp_path, monkeypatch):
    """Each in its own folder; an option that the format lacks is refused only if the command line sets it."""
    sent = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.ModelCard.validate", lambda card: sent.append(card.data.base_model))
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **options: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda api, **options: sent.append(options["repo_id"]))
    hub = ["--config.export.push_to_hub=me/pruned", "--config.export.license=llama2"]
    code, said = export(*hub, "--format=huggingface")
    assert code == 2
    assert "push_to_hub=me/pruned: the model card has no base_model: set export.base_model=ORG/NAME" in said
    hub.append("--config.export.base_model=llava-hf/llava-1.5-7b-hf")
    code, said = export(*hub, "--format=huggingface,q8_0")
    assert code == 0, said
    assert "  uploaded to https://huggingface.co/me/pruned: " in said
    assert sent == 2 * ["llava-hf/llava-1.5-7b-hf", "me/pruned"]
    folders = [tmp_path / "w/export-huggingface", tmp_path / "w/export-q8_0"]
    assert [(folder / "README.md").is_file() for folder in folders] == [True, True]
    assert not (tmp_path / "w/export").exists()
    lines = said.splitlines()
    tower, text = sorted(folders[1].glob("*.gguf"), key=lambda path: "mmproj" not in path.name)
    place = lines.index(next(line for line in lines if line.startswith("exported: pruned, to ")))
    assert re.fullmatch(rf"exported: pruned, to {folders[0]} \(0\.\d+ MB in \d+ files\)", lines[place])
    assert re.fullmatch(
        r"  reloaded in torch: logits differ from those of the model in memory by at most \S+ \(tolerance \S+\)",
        lines[place + 1],
    )
    assert f'  model = LlavaForConditionalGeneration.from_pretrained("{folders[0]}")' in lines
    assert f"  llama-server -m {text} --mmproj {tower}" in lines
    assert "export q8_0: unchanged, skipped (export-q8_0 is up to date)" in export(*hub, "--format=q8_0")[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("config.export.quantize=q8", "export.quantize 'q8' is not one of none, w8a16, w4a16, w8a8, q8_0, q5_1, q4_0;"),
        ("config.export.format=ggf", "export.format 'ggf' is not one of huggingface, gguf; did you mean 'gguf'?"),
        ("format=ggfu", "did you mean 'gguf'?"),
        (
            "format=huggingface config.export.quantize=w4a16 config.export.rounding=gptq config.export.uneven=pad",
            'rounding="gptq" cannot round the zeros that uneven="pad" or head_dim adds',
        ),
        ("format=q8_0 config.export.layout=transformers", "layout='transformers' is an option of format 'huggingface'"),
    ],
)
def test_wrong_settings(export, tmp_path, flags, message):
    code, said = export(*[f"--{flag}" for flag in flags.split()])
    assert (code, message in said) == (2, True), said
    assert not [*(tmp_path / "w").glob("export*")]


def demo_model(folder, goldens, count, **sections):
    """Write a config for the demo's teacher, cut, and questions about pictures of noise; return the flags."""
    draw = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{number}.png")
    source = shutil.copytree(str(resources.files("vlmprune_jax") / "demo" / "teacher"), folder / "teacher")
    prune_folder(source, keep_layers(load(source), [0, 4, 9])[1], folder / "w/pruned")
    records = [record(str(number), f"{number}.png", "what shape is in the image?", "circle") for number in range(count)]
    data = {"images": str(folder), "eval": f"{folder}/records.json"}
    return [write_experiment(folder, goldens, records, source, data=data, **sections), f"--workdir={folder / 'w'}"]


@pytest.mark.slow
def test_integers_by_command(goldens, tmp_path, capsys):
    """Rounded by gptq on records with images, those of `reconstruct`; nearest rounding asks for no records."""
    sections = {"export": {"quantize": "w4a16"}, "reconstruct": {"samples": 4, "batch_size": 2}}
    command = ["export", *demo_model(tmp_path, goldens, 4, **sections)]
    assert main([*command, "--config.export.rounding=gptq"]) == 0
    compensated = (tmp_path / "w/export/model.safetensors").read_bytes()
    assert load(tmp_path / "w/export").cfg.text.layers == load(tmp_path / "w/pruned").cfg.text.layers
    made = json.loads((tmp_path / "w/.stages/export.json").read_text())["made_from"]
    assert made["settings"]["reconstruct.samples"] == 4
    assert main([*command, "--config.export.rounding=gptq"]) == 0
    assert "export: unchanged, skipped" in capsys.readouterr().out
    assert main([*command, "--config.data.train=None", "--overwrite"]) == 0
    assert "4-bit weights are rounded to the nearest integer, which usually loses more" in capsys.readouterr().out
    nearest = (tmp_path / "w/export/model.safetensors").read_bytes()
    assert len(nearest) == len(compensated)
    assert nearest != compensated
    plain = [*command, "--config.export.format=gguf", "--config.export.quantize=none", "--config.export.imatrix=True"]
    assert main([*plain, "--overwrite"]) == 0
    assert (tmp_path / "w/export/imatrix-teacher-pruned.gguf_file").is_file()
    assert main([*plain, "--config.export.quantize=q8_0"]) == 2
    assert "imatrix is for llama-quantize" in capsys.readouterr().err
    assert main([*command, "--config.export.rounding=gptq", "--config.export.quantize=none"]) == 2
    assert "group_size, symmetric and rounding are for integers" in capsys.readouterr().err


@pytest.mark.slow
def test_a_quantised_export_is_evaluated(goldens, tmp_path, capsys, monkeypatch):
    """Its card has its own scores and those before rounding; without comparable evaluations, the latter alone."""
    sections = {"export": {"format": "gguf"}, "evaluate": {"batch_size": 8, "max_new_tokens": 2}}
    flags = demo_model(tmp_path, goldens, 16, prune={"method": "depth"}, **sections)
    shutil.copy(tmp_path / "w/pruned/plan.json", tmp_path / "w/plan.json")
    assert main(["evaluate", *flags]) == 0, capsys.readouterr().err
    ask, asked, pruned = evaluate.ask, [], load(tmp_path / "w/pruned")
    monkeypatch.setattr(
        evaluate, "ask", lambda model, *args, **options: asked.append(model) or ask(model, *args, **options)
    )

    def rows(name, *options):
        assert main(["export", *flags, f"--format={name}", *options]) == 0, capsys.readouterr().err
        card = (tmp_path / f"w/export-{name}/README.md").read_text()
        return re.findall(r"^\| ((?:before rounding: )?questions) \(", card, re.M), card

    for name in ("q4_0", "w8a8"):
        titles, card = rows(name)
        assert titles == ["questions", "before rounding: questions"]
        assert re.search(r"Quantisation moves the model's logits by at most \d", card)
    before, *rounded = (flatten(model.params)["text/layers/0/mlp/up_proj/weight"] for model in (pruned, *asked[-2:]))
    assert all(0 < np.abs(before - after).max() < 0.2 * np.abs(before).max() for after in rounded)
    capsys.readouterr()
    assert rows("q4_0")[0] == titles
    assert "export q4_0: unchanged, skipped" in capsys.readouterr().out
    assert rows("q4_0", "--config.export.evaluate=False")[0] == titles[1:]
    assert rows("w8a8", "--config.evaluate.max_new_tokens=3")[0] == titles[1:]  # others than those of the model


@pytest.mark.parametrize(
    ("changes", "rounding"),
    [
        ({}, "gptq"),
        ({"data.train": None}, "nearest"),
        ({"export.head_dim": 64}, "nearest"),
        ({"recover.quantize": "w4a16", "recover.trainable": "all"}, "nearest"),
        ({"export.rounding": "nearest"}, "nearest"),
        ({"export.quantize": "w8a16"}, None),
    ],
)
def test_four_bits_are_rounded_by_gptq_if_it_can_be(goldens, changes, rounding):
    values = {"data.train": "records.json", "export.quantize": "w4a16", **changes}
    experiment = override(Experiment(), nested(Experiment(), values))
    for name, expected in (("ckpt/llava_hf", rounding), ("families/qwen3_vl_moe/ckpt", rounding and "nearest")):
        text = read_config(goldens / name)[1].text
        resolved = with_rounding(experiment.export, experiment.data, experiment.recover, text)
        assert resolved.rounding == expected


def test_the_best_of_the_variants_that_are_named(tmp_path, monkeypatch):
    runs = [SimpleNamespace(name=name, path=f"{name}/pruned") for name in ("depth", "width")]
    found = SimpleNamespace(runs=runs, sets={}, labels={"depth": "", "width": ""})
    exported = []
    monkeypatch.setattr(pipeline, "read_result", lambda _: found)
    monkeypatch.setattr(pipeline, "best_run", lambda runs, _: runs[0])
    monkeypatch.setattr(
        pipeline, "_export", lambda _, model, *__: exported.append(model) or SimpleNamespace(facts=None)
    )
    monkeypatch.setattr(pipeline, "describe_export", lambda *_: [])
    (tmp_path / "result.json").touch()
    variants = {name: {"prune": {"method": name}} for name in ("depth", "width", "hybrid")}
    experiment = override(Experiment(), {"prune_variants": variants})
    for only in ("", "width"):
        pipeline.export(Work.at(tmp_path, choose_variants(experiment, only), make_reporter(False)))
    assert exported == [tmp_path / "depth/pruned", tmp_path / "width/pruned"]
    with pytest.raises(UserError, match="has no model of these variants"):
        pipeline.export(Work.at(tmp_path, choose_variants(experiment, "hybrid"), make_reporter(False)))
