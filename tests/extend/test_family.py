"""The decoder family that how-to/extend.md links, from a config on the command line, against stock transformers."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from experiment_cases import printed_file
from hf_cases import LLAMA, keep_width, make_folder, make_vlm_folder, random_ids
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
    config.recover.name = "sft"
    config.recover.trainable = "lora"
    config.recover.control = False
    config.recover.lora.rank = 2
    config.recover.losses = {{"ce": 0.5, "l2": 0.5}}
    config.recover.batch_size = 2
    config.recover.steps = 2
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


@pytest.fixture
def config(goldens, tmp_path):
    """The flag of a config that imports the printed file, which lies beside it; a folder of its family is `source`."""
    before = dict(vp.families)
    path = printed_file("A decoder family", tmp_path)
    sys.path.insert(0, str(tmp_path))
    __import__(path.stem)
    sys.path.remove(str(tmp_path))
    shutil.copytree(goldens / "tokenizers/llava", make_folder(tmp_path / "source", SEED_OSS), dirs_exist_ok=True)
    talk = [{"from": "human", "value": "Is it one?"}, {"from": "gpt", "value": "yes"}]
    records = [{"id": f"r{i}", "conversations": talk} for i in range(4)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "experiment.py").write_text(CONFIG.format(folder=tmp_path))
    # as on the command line, where only the config's own import adds it
    sys.modules.pop(path.stem)
    added = vp.families.pop("seed_oss")
    yield f"--config={tmp_path / 'experiment.py'}"
    sys.modules.pop(path.stem, None)
    vp.families.clear()
    vp.families.update(before)
    assert added.name == "seed_oss"


@pytest.mark.parametrize("version", VERSIONS)
def test_logits(config, tmp_path, torch_outputs, capsys, version):
    """Of a folder that stock transformers wrote; without the config nobody knows it."""
    ids = {"input_ids": np.random.default_rng(0).integers(6, 90, (2, 20))}
    stock = tmp_path / "stock"
    expected = torch_outputs(tmp_path / "source", ids, class_name=CAUSAL, version=version, save_to=stock)["logits"]
    assert main(["inspect", str(stock)]) == 2
    assert "model_type 'seed_oss' (architectures ['SeedOssForCausalLM']) is not supported" in capsys.readouterr().err
    assert main(["inspect", str(stock), config]) == 0
    assert "seed_oss, transformers layout" in capsys.readouterr().out
    np.testing.assert_allclose(vp.forward(vp.load(stock), **ids)[0], expected, atol=1e-4, rtol=0)


def test_scored_pruned_and_reloaded(config, tmp_path, torch_outputs):
    assert main(["score", config, f"--workdir={tmp_path / 'w'}"]) == 0
    assert main(["prune", config, f"--workdir={tmp_path / 'w'}"]) == 0
    pruned, before = vp.load(tmp_path / "w/pruned"), vp.load(tmp_path / "source")
    assert pruned.cfg.text.layers[0].channel.mlp < before.cfg.text.layers[0].channel.mlp
    plan = vp.PrunePlan.from_json(tmp_path / "w/plan.json")
    inputs = random_ids(pruned)
    expected = np.asarray(vp.forward(vp.apply_plan(before, plan), **inputs)[0])
    card = (tmp_path / "w/pruned/README.md").read_text()
    assert 'SeedOssForCausalLM.from_pretrained(".")' in card
    for version in VERSIONS:
        found = torch_outputs(tmp_path / "w/pruned", inputs, class_name=CAUSAL, version=version)["logits"]
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0, err_msg=version)


@pytest.mark.parametrize("version", VERSIONS)
def test_layers_of_unequal_width(config, tmp_path, torch_outputs, version):
    """By the PyTorch file that exports ship, which knows no family by name."""
    assert main(["inspect", str(tmp_path / "source"), config]) == 0
    model, _ = keep_width(vp.load(tmp_path / "source"), [0, 2], range(3, 43), only=[1, 2])
    vp.save(model, tmp_path / "out", source_dir=tmp_path / "source", dtype="float32")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["auto_map"] == {CAUSAL: "modeling_per_layer.PerLayerSeedOssForCausalLM"}
    inputs = random_ids(model)
    options = {"class_name": CAUSAL, "version": version, "trust_remote_code": True}
    found = torch_outputs(tmp_path / "out", inputs, **options, save_to=tmp_path / "saved")["logits"]
    np.testing.assert_allclose(found, vp.forward(model, **inputs)[0], atol=1e-4, rtol=0)
    assert (tmp_path / "saved/modeling_per_layer.py").is_file()


def test_it_is_a_decoder_of_the_vision_language_families_too(config, tmp_path, torch_outputs):
    assert main(["inspect", str(tmp_path / "source"), config]) == 0
    text = {key: value for key, value in SEED_OSS.items() if key not in ("architectures", "torch_dtype")}
    model = vp.load(make_vlm_folder(tmp_path / "vlm", llava_config("llama", "clip") | {"text_config": text}))
    assert model.cfg.text.decoder == "seed_oss"
    inputs = random_ids(model)
    found = torch_outputs(tmp_path / "vlm", inputs, class_name="AutoModelForImageTextToText", version="5")["logits"]
    np.testing.assert_allclose(vp.forward(model, **inputs)[0], found, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda names: {"names": {path: name for path, name in names.items() if "down_proj" not in path}},
            "its weight table lacks text/layers/0/mlp/down_proj/bias, text/layers/0/mlp/down_proj/weight",
        ),
        (
            lambda names: {"names": {path.replace("up_proj", "fc1"): name for path, name in names.items()}},
            "its weight table lacks text/layers/0/mlp/up_proj/bias, text/layers/0/mlp/up_proj/weight",
        ),
        (
            lambda names: {"layouts": {path: "embed mlp" for path in names if "gate_proj" in path}},
            r"layout 'embed mlp' of text/layers/0/mlp/gate_proj/weight does not match .* axes \('mlp', 'embed'\)",
        ),
    ],
)
def test_wrong_lines_are_told_by_name(config, tmp_path, monkeypatch, change, message):
    assert main(["inspect", str(tmp_path / "source"), config]) == 0
    good = vp.families["seed_oss"].decoder
    monkeypatch.setitem(vp.families, "seed_oss", decoder_family(replace(good, **change(good.names))))
    with pytest.raises(vp.UserError, match=f"family seed_oss: {message}"):
        vp.load(tmp_path / "source")


@pytest.mark.slow
def test_a_whole_run(config, tmp_path):
    """Evaluation, scores, plan, recovery with adapters and a teacher, and an export that torch computes the same."""
    assert main(["run", config, f"--workdir={tmp_path / 'w'}", "--config.prune.attn_layers=(1,3)"]) == 0
    result = read_result(tmp_path / "w")
    assert [run.recovery for run in result.runs] == ["none", "sft"]
    assert result.export.backend == "torch"
    assert result.export.max_abs_logit_difference <= 1e-4
