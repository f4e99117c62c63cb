"""Adapters as a peft folder: on the pruned model's folder in torch they compute what the merged model does."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import stat

import jax
import numpy as np
import pytest
from decoder_cases import PHI3
from gguf_cases import byte_tokenizer
from hf_cases import LLAMA, LLAVA, keep_layers, keep_width, make_folder, random_ids
from refusal import refused
from safetensors import safe_open
from safetensors.numpy import load_file
from torch_compat import VERSIONS

import vlmprune_jax as vp
from vlmprune_jax.base.files import read_json
from vlmprune_jax.core.models.params import flatten, unflatten
from vlmprune_jax.core.recovery.trainable import add_lora, assign_groups, merge_lora
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.io.exports import peft
from vlmprune_jax.io.exports.peft import write_adapter
from vlmprune_jax.io.exports.vocabulary import vocabulary_digest
from vlmprune_jax.run.experiment.arguments import recover_config

CLASSES = {"llama": "AutoModelForCausalLM", "llava": "LlavaForConditionalGeneration"}
LORA = LoraConfig(rank=3, alpha=7.0, dropout=0.1, targets=("q_proj", "v_proj", "o_proj", "down_proj"))


def trained_model(base: vp.Model, rules="lora", lora: LoraConfig = LORA) -> tuple[vp.Model, list[str]]:
    """The model with adapters, everything that the rules train moved at random; and the paths of that."""
    model = add_lora(base, lora, jax.random.key(1))
    flat, rng = flatten(model.params), np.random.default_rng(2)
    trained = assign_groups(list(flat), rules)
    moved = {p: flat[p] + 0.05 * rng.standard_normal(flat[p].shape, np.float32) for p in trained}
    return vp.Model(unflatten({**flat, **moved}), model.cfg), list(trained)


@pytest.fixture
def pruned(tmp_path):
    """Callable (family, pruning) -> the pruned model and its folder."""

    def make(family, pruning):
        source = make_folder(tmp_path / "source", {"llama": LLAMA, "llava": LLAVA}[family])
        model = vp.load(source)
        if pruning == "depth":
            model, plan = keep_layers(model, [0, 3])
        else:
            model, plan = keep_width(model, [2], range(5, 45), only=[1, 2] if pruning == "uneven" else None)
        uneven = "per_layer" if pruning == "uneven" else "refuse"
        vp.save(model, tmp_path / "pruned", source_dir=source, plan=plan, dtype="float32", uneven=uneven)
        return model, tmp_path / "pruned"

    return make


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("family", "pruning"), [("llama", "width"), ("llava", "depth")])
def test_peft_computes_what_the_merged_model_does(pruned, torch_outputs, tmp_path, family, pruning, version):
    base, folder = pruned(family, pruning)
    model, trained = trained_model(base)
    write_adapter(model, tmp_path / "adapter", base_dir=folder, trained=trained)
    merged = merge_lora(model)
    vp.save(merged, tmp_path / "merged", source_dir=folder, dtype="float32")
    inputs = random_ids(model)
    # In float64: a float32 forward of these logits is 1.2e-5 from its own function; what is left, 5e-6, is the rounding
    # of the merged weights.
    run = {"class_name": CLASSES[family], "version": version, "dtype": "float64"}
    adapted = torch_outputs(folder, inputs, adapter=tmp_path / "adapter", **run)["logits"]
    np.testing.assert_allclose(adapted, torch_outputs(tmp_path / "merged", inputs, **run)["logits"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(adapted, vp.forward(merged, **inputs)[0], atol=1e-4, rtol=0)
    assert np.abs(adapted - torch_outputs(folder, inputs, **run)["logits"]).max() > 0.01  # it does something


def test_modules_that_trained_whole_are_in_the_folder(pruned, torch_outputs, tmp_path):
    base, folder = pruned("llava", "depth")
    rules = (
        (r"projector/linear_2/weight", True),
        (r"text/(norm|layers/.*layernorm)/.*", True),
        (r".*/lora_[ab]", True),
    )
    model, trained = trained_model(base, rules)
    write_adapter(model, tmp_path / "adapter", base_dir=folder, trained=trained)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    norms = [f"layers.{i}.{name}_layernorm" for i in (0, 1) for name in ("input", "post_attention")] + ["norm"]
    expected = {f"model.language_model.{name}" for name in norms} | {"model.multi_modal_projector.linear_2"}
    assert set(config["modules_to_save"]) == expected
    inputs = random_ids(model)
    found = torch_outputs(folder, inputs, adapter=tmp_path / "adapter", class_name=CLASSES["llava"], version="5")
    np.testing.assert_allclose(found["logits"], vp.forward(merge_lora(model), **inputs)[0], atol=1e-4, rtol=0)


def test_what_the_folder_says(pruned, tmp_path):
    """Also that its files follow the umask."""
    base, folder = pruned("llava", "depth")
    model, trained = trained_model(base)
    content = read_json(byte_tokenizer(folder) / "tokenizer.json")
    before = os.umask(0o027)
    try:
        write_adapter(model, tmp_path / "adapter", base_dir=folder, trained=trained)
    finally:
        os.umask(before)
    with safe_open(tmp_path / "adapter" / peft.WEIGHTS_FILE, "np") as file:
        assert file.metadata() == {"format": "pt", "vocabulary": vocabulary_digest(content)}
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "adapter").iterdir()}
    assert modes == dict.fromkeys([peft.CARD_FILE, peft.CONFIG_FILE, peft.WEIGHTS_FILE], 0o640)
    config = json.loads((tmp_path / "adapter" / peft.CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 7.0, 0.1)
    assert config["base_model_name_or_path"] == "../pruned"
    assert config["rank_pattern"] == {}
    targets = config["target_modules"].split("|")
    assert len(targets) == 4  # one regex for all layers
    assert targets[0] == r"model\.language_model\.layers\.\d+\.self_attn\.q_proj"
    tensors = load_file(tmp_path / "adapter" / peft.WEIGHTS_FILE)
    assert len(tensors) == 2 * 4 * 2 + 4  # A and B of four projections in two layers, and the projector's two layers
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}


def test_names_of_folders_are_text_in_the_card(pruned, tmp_path):
    base, folder = pruned("llama", "depth")
    evil = folder.rename(tmp_path / 'a"); import os # `b`\n# c <img>')
    model, trained = trained_model(base)
    write_adapter(model, tmp_path / "adapter", base_dir=evil, trained=trained)
    card = (tmp_path / "adapter" / peft.CARD_FILE).read_text()
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert headings == [r"""# Adapters for a"); import os \# \`b\` \# c \<img\>""", "## Loading"]
    code = "".join(part for part in card.split("```")[1::2]).replace("python\n", "\n")
    assert not [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import)]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "pruning"), [("llama", "depth"), ("llava", "uneven")])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_card_loads_it_as_printed(pruned, torch_outputs, tmp_path, family, pruning, version):
    """peft's Auto classes find base and class, also after the folder that holds both has moved."""
    base, folder = pruned(family, pruning)
    model, trained = trained_model(base)
    write_adapter(model, tmp_path / "run/adapter", base_dir=folder, trained=trained)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("pruned", "run"):
        shutil.move(tmp_path / name, moved / name)
    card = (moved / "run/adapter" / peft.CARD_FILE).read_text()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: pruned\n")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert [("AutoPeftModel" in block) for block in blocks] == [True, False]
    inputs = random_ids(model)
    for block in blocks:
        found = torch_outputs.code(moved / "run/adapter", block, inputs, version=version)
        np.testing.assert_allclose(found, vp.forward(merge_lora(model), **inputs)[0], atol=1e-4, rtol=0)


def test_fused_projections_become_one_adapter_of_a_higher_rank(tmp_path, torch_outputs):
    """Phi-3 holds q, k and v as one tensor, and gate and up: adapters on two of the three, and on one of the two."""
    folder = make_folder(tmp_path / "phi3", {**PHI3, "rope_scaling": None, "sliding_window": None})
    lora = dataclasses.replace(LORA, targets=("q_proj", "v_proj", "up_proj", "o_proj"))
    model, trained = trained_model(vp.load(folder), "lora", lora)
    write_adapter(model, tmp_path / "adapter", base_dir=folder, trained=trained)
    config = json.loads((tmp_path / "adapter" / peft.CONFIG_FILE).read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"qkv_proj": 6}, {"qkv_proj": 14.0})
    inputs = random_ids(model)
    found = torch_outputs(folder, inputs, adapter=tmp_path / "adapter", class_name=CLASSES["llama"], version="5")
    np.testing.assert_allclose(found["logits"], vp.forward(merge_lora(model), **inputs)[0], atol=1e-4, rtol=0)


def test_what_an_adapter_cannot_be(pruned, tmp_path):
    base, folder = pruned("llava", "depth")
    model, trained = trained_model(base)
    options = {"base_dir": folder, "trained": [*trained, "vision/class_embedding/weight"]}
    refused("the model has no LoRA adapters to write", write_adapter, merge_lora(model), tmp_path / "out", **options)
    fact = r"cannot contain a trained vision tower \(vision/class_embedding/weight\)"
    refused(fact, write_adapter, model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    config = vp.RecoverConfig(trainable="projector", save_adapter=True)
    refused("recover.trainable='projector' trains no adapter", recover_config, config)
    assert recover_config(vp.RecoverConfig(save_adapter=True)).merge_lora is False
