"""Exported folders in stock transformers on torch, versions 5 and 4.57: the same logits within 1e-4."""

import io
import json
import logging
import sys

import jax
import numpy as np
import pytest
from hf_cases import LLAMA, LLAVA, edit_weights, keep_layers, keep_width, make_folder, random_ids
from refusal import refused
from torch_compat import VERSIONS

import vlmprune_jax as vp
from vlmprune_jax.io.exports import reload
from vlmprune_jax.io.exports.reload import check_export

CLASSES = {"llama": "AutoModelForCausalLM", "llava": "LlavaForConditionalGeneration"}
CONFIGS = {"llama": LLAMA, "llava": LLAVA}
PRUNED = {
    "whole": lambda model: (model, None),
    "depth": lambda model: keep_layers(model, [0, 3]),
    "mistral": lambda model: keep_width(model, [0, 1, 3, 4, 5], range(0, 56, 2)),  # 5 of 6 heads do not
}


@pytest.fixture
def saved(tmp_path, request):
    """Writes one pruned model; gives it and its folder."""

    def write_one(family, pruning, **options):
        config = CONFIGS[family]
        if pruning == "mistral":
            text = {"num_key_value_heads": 6, "tie_word_embeddings": False}
            text = text if family == "llama" else {"text_config": {**config["text_config"], **text}}
            config = {**config, **text}
        source = make_folder(tmp_path / "source", config)
        model, plan = PRUNED[pruning](vp.load(source))
        vp.save(model, tmp_path / "out", source_dir=source, plan=plan, **options)
        return model, tmp_path / "out"

    return write_one


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", CLASSES)
def test_heads_that_do_not_divide(saved, torch_outputs, family, version):
    """Mistral's class takes 5 of 6 heads; other folders are in test_support_matrix.py and below."""
    model, out = saved(family, "mistral", dtype="float32")
    config = json.loads((out / "config.json").read_text())
    assert config.get("text_config", config)["model_type"] == "mistral"
    inputs = random_ids(model)
    found = torch_outputs(out, inputs, class_name=CLASSES[family], version=version)
    np.testing.assert_allclose(vp.forward(model, **inputs)[0], found["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", CLASSES)
def test_sharded_bfloat16_folder(saved, torch_outputs, monkeypatch, family, version):
    monkeypatch.setattr("vlmprune_jax.io.exports.folder.MAX_SHARD_BYTES", 30_000)
    model, out = saved(family, "depth", dtype="bfloat16")
    assert len(list(out.glob("*.safetensors"))) > 2
    inputs = random_ids(model)
    found = torch_outputs(out, inputs, class_name=CLASSES[family], version=version)
    np.testing.assert_allclose(vp.forward(vp.load(out), **inputs)[0], found["logits"], atol=1e-4, rtol=0)


# check_export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("llava", "bfloat16")])
@pytest.mark.parametrize("torch_is_there", [True, False])
def test_check_export(saved, monkeypatch, family, dtype, torch_is_there):
    if not torch_is_there:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model, out = saved(family, "depth", dtype=dtype)
    report = check_export(model, out)
    assert report["backend"] == ("torch" if torch_is_there else "jax")
    assert report["tolerance"] == 1e-4
    assert report["max_abs_logit_difference"] <= 1e-4


@pytest.mark.parametrize("torch_is_there", [True, False])
def test_check_export_notices_a_wrong_weight(saved, monkeypatch, torch_is_there):
    if not torch_is_there:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model, out = saved("llava", "depth", dtype="float32")
    key = "multi_modal_projector.linear_2.bias"
    edit_weights(out, lambda tensors: tensors[key].__setitem__(3, tensors[key][3] + 0.01))
    refused("logits differ from the model's by", check_export, model, out)


@pytest.mark.parametrize("torch_is_there", [True, False])
def test_check_export_knows_what_rounding_alone_does(saved, monkeypatch, torch_is_there):
    """Where the tolerance is too narrow for a model, its own response to changed last bits decides."""
    model, out = saved("llama", "whole", dtype="float32")
    monkeypatch.setattr(reload, "torch_loads", lambda *_: torch_is_there)
    model = vp.Model(jax.tree.map(lambda leaf: leaf * (1 + 2**-23), model.params), model.cfg)
    usual = reload.TOLERANCE
    for name in ("TOLERANCE", "RELATIVE_TOLERANCE"):
        monkeypatch.setattr(reload, name, 1e-12)
    assert 0 < check_export(model, out)["max_abs_logit_difference"] < usual  # processors differ: 1e-6 to 1.3e-5
    monkeypatch.setattr(reload, "_ROUNDINGS", 0)
    refused("logits differ from the model's by", check_export, model, out)


def test_check_export_notices_what_transformers_would_initialise(saved):
    model, out = saved("llava", "whole", dtype="float32")
    name = "vision_tower.vision_model.post_layernorm.bias"
    edit_weights(out, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    refused(r"missing_keys: .*post_layernorm\.bias", check_export, model, out)


def test_check_export_is_silent_about_slow_kernels(goldens):
    """Qwen3.5 has layers with kernels in other packages; the check needs none of them."""
    import transformers

    folder, lines, logger = goldens / "families/qwen3_5/ckpt", io.StringIO(), transformers.utils.logging.get_logger()
    handler = logging.StreamHandler(lines)
    transformers.utils.logging.warning_once.cache_clear()  # each is shown once per process
    logger.addHandler(handler)
    try:
        assert check_export(vp.load(folder), folder)["backend"] == "torch"
    finally:
        logger.removeHandler(handler)
    assert not lines.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "tower", "wrong"),
    [
        ("llava_orig", "clip_tower", "model.norm.weight"),
        ("bunny", "siglip_tower", "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight"),
    ],
)
def test_check_export_of_the_hub_layouts(goldens, tmp_path, name, tower, wrong, dtype):
    """The tower's own folder is float32, as on the hub, whatever dtype the model is loaded and written in."""
    tower, source = goldens / "ckpt" / tower, goldens / "ckpt" / name
    model, _ = keep_layers(vp.load(source, vision_dir=tower, dtype=dtype), [0, 1, 4])
    vp.save(model, tmp_path / "out", source_dir=source, dtype=dtype)
    report = check_export(model, tmp_path / "out", vision_dir=tower)
    assert report["backend"] == "jax"
    assert report["max_abs_logit_difference"] <= 1e-6
    edit_weights(tmp_path / "out", lambda tensors: tensors.update({wrong: tensors[wrong] * 2}))
    refused("logits differ from the model's by", check_export, model, tmp_path / "out", vision_dir=tower)


def test_torch_is_only_imported_to_check(saved):
    """Reading, writing and computing leave torch alone, so that it can be missing."""
    import subprocess

    _, out = saved("llava", "depth")
    code = (
        "import sys; import vlmprune_jax.io.exports.reload; from vlmprune_jax import load, save\n"
        f"save(load({str(out)!r}), {str(out) + '2'!r}, source_dir={str(out)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
