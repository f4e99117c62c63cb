"""Layers of unequal width at their true size in PyTorch: the file that exports ship, in transformers 5 and 4.57."""

import json

import numpy as np
import pytest
from hf_cases import LLAMA, LLAVA, keep_width, make_folder, random_ids
from torch_compat import VERSIONS

from vlmprune_jax.hf.read import load
from vlmprune_jax.hf.write import save
from vlmprune_jax.models.generate import generate
from vlmprune_jax.models.vlm import forward

AUTO = {"llama": "AutoModelForCausalLM", "llava": "AutoModelForImageTextToText"}
CONFIGS = {"llama": LLAMA, "llava": LLAVA}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Writes one model whose layers 1 and 2 are narrower, once; gives it and its folder."""
    done = {}

    def export(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            source = make_folder(folder / "source", CONFIGS[name])
            model, plan = keep_width(load(source), [0, 2], range(7, 47), only=[1, 2])
            save(model, folder / "out", source_dir=source, plan=plan, uneven="per_layer", dtype="float32")
            done[name] = model, folder / "out"
        return done[name]

    return export


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_torch_computes_the_same(exported, torch_outputs, tmp_path, name, version):
    """Logits, greedy tokens with a cache, and the folder that save_pretrained writes."""
    model, out = exported(name)
    inputs = random_ids(model)
    options = {"class_name": AUTO[name], "version": version, "trust_remote_code": True}
    found = torch_outputs(out, inputs, max_new_tokens=6, save_to=tmp_path / "saved", **options)
    expected = np.asarray(forward(model, **inputs)[0])
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(found["tokens"], generate(model, max_new_tokens=6, eos_token_ids=(), **inputs))
    again = torch_outputs(tmp_path / "saved", inputs, **options)
    np.testing.assert_allclose(again["logits"], expected, atol=1e-4, rtol=0)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    written = json.loads((out / "config.json").read_text())
    assert config["architectures"] == written["architectures"]
    assert config["auto_map"] == written["auto_map"]
    reloaded = load(tmp_path / "saved")
    assert reloaded.cfg.text.layers == model.cfg.text.layers
    np.testing.assert_allclose(forward(reloaded, **inputs)[0], expected, atol=1e-6, rtol=0)
