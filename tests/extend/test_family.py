"""The decoder family that how-to/extend.md links, from a config on the command line, against stock transformers."""

import importlib
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from experiment_cases import record, registered
from hf_cases import LLAMA, keep_width, make_folder, make_vlm_folder, random_ids
from refusal import refused
from torch_compat import VERSIONS
from vlm_cases import llava_config

import vlmprune_jax as vp
from vlmprune_jax.io.families.decoders import decoder_family
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.workdir.result import read_result

CONFIG = """
import seed_oss  # registers "seed_oss"

from vlmprune_jax.run.cli.config_files import experiment_config

def get_config():
    config = experiment_config()
    config.model.hf_dir = "{folder}/source"
    config.score.width = "l1"
    config.prune.method = "width"
    config.prune.ratio = 0.25
    config.data.train = config.data.eval = "{folder}/records.json"
    config.evaluate.max_new_tokens = 2
    config.recover = {{"name": "sft", "trainable": "lora", "control": False, "batch_size": 2, "steps": 2}}
    config.recover.lora.rank = 2
    config.recover.losses = {{"ce": 0.5, "l2": 0.5}}
    config.export.dtype = "float32"
    return config
"""
# Every hyper-parameter differs from its default.
SEED_OSS = {
    **{key: value for key, value in LLAMA.items() if key not in ("a_field_of_the_future", "architectures")},
    "architectures": ["SeedOssForCausalLM"],
    "model_type": "seed_oss",
    "vocab_size": 400,  # as the tokenizer's
    "attention_bias": False,
    "attention_out_bias": True,
    "mlp_bias": True,
}
CAUSAL = "AutoModelForCausalLM"


@pytest.fixture(scope="module")
def source(goldens, tmp_path_factory):
    """A folder of the family, which the printed file beside it has registered."""
    folder = tmp_path_factory.mktemp("family")
    with registered("A decoder family", folder, vp.families) as path, pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        importlib.import_module(path.stem)
        patch.undo()
        made = make_folder(folder / "source", SEED_OSS)
        yield shutil.copytree(goldens / "tokenizers/llava", made, dirs_exist_ok=True)


@pytest.fixture
def config(source, monkeypatch):
    """The flag of a config that imports the printed file; nothing else has, as on the command line."""
    folder = source.parent
    records = [record(f"r{i}", None, "Is it one?", "yes") for i in range(4)]
    (folder / "records.json").write_text(json.dumps(records))
    (folder / "experiment.py").write_text(CONFIG.format(folder=folder))
    monkeypatch.delitem(vp.families, "seed_oss")
    monkeypatch.delitem(sys.modules, "seed_oss")
    return f"--config={folder / 'experiment.py'}"


@pytest.mark.parametrize("version", VERSIONS)
def test_logits(source, config, tmp_path, torch_outputs, capsys, version):
    """Of a folder that stock transformers wrote; without the config nobody knows it."""
    ids = {"input_ids": np.random.default_rng(0).integers(6, 90, (2, 20))}
    expected = torch_outputs(source, ids, class_name=CAUSAL, version=version, save_to=tmp_path / "stock")["logits"]
    assert main(["inspect", str(tmp_path / "stock")]) == 2
    assert "model_type 'seed_oss' (architectures ['SeedOssForCausalLM']) is not supported" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "stock"), config]) == 0
    assert "seed_oss, transformers layout" in capsys.readouterr().out
    np.testing.assert_allclose(vp.forward(vp.load(tmp_path / "stock"), **ids)[0], expected, atol=1e-4, rtol=0)


def test_scored_pruned_and_reloaded(source, config, tmp_path, torch_outputs):
    for command in ("score", "prune"):
        assert main([command, config, f"--workdir={tmp_path / 'w'}"]) == 0
    pruned, before = vp.load(tmp_path / "w/pruned"), vp.load(source)
    assert pruned.cfg.text.layers[0].channel.mlp < before.cfg.text.layers[0].channel.mlp
    plan = vp.PrunePlan.from_json(tmp_path / "w/plan.json")
    inputs = random_ids(pruned)
    expected = np.asarray(vp.forward(vp.apply_plan(before, plan), **inputs)[0])
    assert 'SeedOssForCausalLM.from_pretrained(".")' in (tmp_path / "w/pruned/README.md").read_text()
    for version in VERSIONS:
        found = torch_outputs(tmp_path / "w/pruned", inputs, class_name=CAUSAL, version=version)["logits"]
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0, err_msg=version)


def test_layers_of_unequal_width(source, tmp_path, torch_outputs):
    """By the PyTorch file that exports ship, which knows no family by name."""
    model, _ = keep_width(vp.load(source), [0, 2], range(3, 43), only=[1, 2])
    vp.save(model, tmp_path / "out", source_dir=source, dtype="float32")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["auto_map"] == {CAUSAL: "modeling_per_layer.PerLayerSeedOssForCausalLM"}
    inputs = random_ids(model)
    expected = vp.forward(model, **inputs)[0]
    for version in VERSIONS:
        options = {"class_name": CAUSAL, "version": version, "trust_remote_code": True}
        found = torch_outputs(tmp_path / "out", inputs, **options, save_to=tmp_path / version)["logits"]
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0, err_msg=version)
        assert (tmp_path / version / "modeling_per_layer.py").is_file()


@pytest.mark.usefixtures("source")
def test_it_is_a_decoder_of_the_vision_language_families_too(tmp_path, torch_outputs):
    text = {key: value for key, value in SEED_OSS.items() if key not in ("architectures", "torch_dtype")}
    model = vp.load(make_vlm_folder(tmp_path / "vlm", llava_config("llama", "clip") | {"text_config": text}))
    assert model.cfg.text.decoder == "seed_oss"
    inputs = random_ids(model)
    found = torch_outputs(tmp_path / "vlm", inputs, class_name="AutoModelForImageTextToText", version="5")["logits"]
    np.testing.assert_allclose(vp.forward(model, **inputs)[0], found, atol=1e-4, rtol=0)


def test_wrong_lines_are_told_by_name(source, monkeypatch):
    good = vp.families["seed_oss"].decoder
    names, lacks = good.names, "its weight table lacks text/layers/0/mlp/{0}/bias, text/layers/0/mlp/{0}/weight"
    layouts = {path: "embed mlp" for path in names if "gate_proj" in path}
    for change, message in (
        ({"names": {k: v for k, v in names.items() if "down_proj" not in k}}, lacks.format("down_proj")),
        ({"names": {k.replace("up_proj", "fc1"): v for k, v in names.items()}}, lacks.format("up_proj")),
        ({"layouts": layouts}, r"layout 'embed mlp' of .*gate_proj/weight does not match .* axes \('mlp', 'embed'\)"),
    ):
        monkeypatch.setitem(vp.families, "seed_oss", decoder_family(replace(good, **change)))
        refused(f"family seed_oss: {message}", vp.load, source)


@pytest.mark.slow
def test_a_whole_run(config, tmp_path):
    """Evaluation, scores, plan, recovery with adapters and a teacher, and an export that torch computes the same."""
    assert main(["run", config, f"--workdir={tmp_path / 'w'}", "--config.prune.attn_layers=(1,3)"]) == 0
    result = read_result(tmp_path / "w")
    assert [run.recovery for run in result.runs] == ["none", "sft"]
    assert result.export.backend == "torch"
    assert result.export.max_abs_logit_difference <= 1e-4
