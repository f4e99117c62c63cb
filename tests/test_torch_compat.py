"""The torch helper itself: both transformers versions give the golden logits, and it refuses inexact folders."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_compat import VERSIONS, TorchJobError


@pytest.mark.parametrize("version", VERSIONS)
def test_llama_logits_nll_and_greedy_tokens(goldens, torch_outputs, version):
    golden = np.load(goldens / "forward" / "llama_gqa.npz")
    ids, mask, folder = golden["input_ids"], golden["attention_mask"], goldens / "ckpt" / "llama_gqa"
    inputs = {"input_ids": ids, "attention_mask": mask}
    options = {"class_name": "AutoModelForCausalLM", "version": version}
    found = torch_outputs(folder, inputs, want=("logits", "nll"), **options)
    real = mask == 1
    np.testing.assert_allclose(found["logits"][real], golden["logits"][real], atol=1e-4, rtol=0)
    scored = real[:, 1:]
    np.testing.assert_allclose(found["nll"][scored].mean(), golden["loss"], rtol=1e-5)

    prompt = ids[:1, mask[0] == 1].astype(np.int32)
    expected = golden["gen_tokens"]
    answer = torch_outputs(folder, {"input_ids": prompt}, want=(), max_new_tokens=len(expected), **options)
    assert set(answer) == {"tokens"}
    np.testing.assert_array_equal(answer["tokens"][0], expected)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("class_name", ["LlavaForConditionalGeneration", "AutoModelForImageTextToText"])
def test_llava_logits(goldens, torch_outputs, version, class_name):
    golden = np.load(goldens / "forward" / "llava_hf.npz")
    pixels = np.load(goldens / "forward" / "llava.npz")["pixel_values"]
    for row in (0, 1):
        inputs = {"input_ids": golden[f"row{row}_input_ids_expanded"][None], "pixel_values": pixels[row : row + 1]}
        found = torch_outputs(goldens / "ckpt" / "llava_hf", inputs, class_name=class_name, version=version)
        np.testing.assert_allclose(found["logits"][0], golden[f"row{row}_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_inexact_folder_is_refused_and_the_worker_lives_on(goldens, torch_outputs, tmp_path, version, damage):
    source = goldens / "ckpt" / "llama_gqa"
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "unexpected":
        weights["model.layers.1.mlp.extra_proj.weight"] = weights[name]
    else:
        weights[name] = np.ascontiguousarray(weights[name][:-1])
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", tmp_path)
    inputs = {"input_ids": np.array([[1, 5, 9]])}
    options = {"class_name": "AutoModelForCausalLM", "version": version}
    with pytest.raises(TorchJobError, match=r"layers\.1\.mlp\.(up|extra)_proj"):
        torch_outputs(tmp_path, inputs, **options)
    assert torch_outputs(source, inputs, **options)["logits"].shape == (1, 3, 256)
