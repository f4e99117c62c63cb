"""Layers of experts in llama.cpp, whole and cut: log-probabilities, greedy tokens, and what it cannot hold."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from gguf_cases import differences
from golden_cases import Golden, cut_layers
from hf_cases import make_folder, prune
from llama_cpp import llama_cpp

import vlmprune_jax as vp
from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.limits import why_not
from vlmprune_jax.io.checkpoints.disk.gguf import read_gguf_header
from vlmprune_jax.io.exports.write import check_saved

pytest.importorskip("xllamacpp")
HYBRID = "qwen3_5_moe"


@pytest.fixture(scope="module")
def make_golden(goldens, tmp_path_factory):
    """Callable name -> Golden; the hybrid gets new weights, for the values and eps that llama.cpp's delta nets need."""
    made = {}

    def make(name):
        if name not in made:
            folder = goldens / "families" / name
            if name == HYBRID:
                folder = shutil.copytree(folder, tmp_path_factory.mktemp("gguf") / name)
                config = json.loads((folder / "ckpt/config.json").read_text())
                key_dim = config["text_config"]["linear_key_head_dim"]
                # its delta nets normalise queries and keys with rms_norm_eps, transformers' always with 1e-6
                config["text_config"] |= {"linear_value_head_dim": key_dim, "rms_norm_eps": 1e-6}
                make_folder(folder / "ckpt", config)
            made[name] = Golden(folder)
        return made[name]

    return make


def without_first_heads(model, layers):
    """These layers without their first group of heads, and without some neurons of the shared expert."""
    cut = []
    for layer in layers:
        mixer = model.cfg.text.layers[layer.index].mixer
        parent, child = (axis.name for axis in mixer.axes)
        kept = {parent: layer.kept[parent][1:], child: layer.kept[child][mixer.group :], "mlp": range(3, 19)}
        cut.append(vp.KeptLayer(layer.index, {**layer.kept, **kept}))
    return cut


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("qwen3_vl_moe", ""),
        ("qwen3_vl_moe", "all"),
        ("gemma4_moe", "experts"),
        ("internvl_moe", "all"),
        (HYBRID, ""),
        (HYBRID, "depth"),
        (HYBRID, "all"),
    ],
)
def test_texts(make_golden, tmp_path, name, cut):
    golden = make_golden(name)
    model, layers = golden.model, cut_layers(golden, cut) if cut else []
    if (name, cut) == (HYBRID, "all"):
        layers = without_first_heads(model, layers)
    model = prune(model, layers)[0] if cut else model
    vp.save(model, tmp_path / "out", source_dir=golden.ckpt, format="gguf", dtype="float32")
    if name == HYBRID:
        fields = read_gguf_header(next((tmp_path / "out").glob("ckpt-*.gguf"))).fields
        assert fields["qwen35moe.expert_shared_feed_forward_length"] == (16 if cut == "all" else 20)
    ids = golden.arrays["text_input_ids"][None]
    ours, theirs = vp.forward(model, ids)[0][0], llama_cpp(tmp_path / "out", rows=ids)["logits"][0]
    assert differences(ours, theirs)[0] <= 0.02
    first, second = np.sort(np.asarray(ours), axis=-1)[:, :-3:-1].T
    clear = first - second > 0.02  # llama.cpp rounds keys and values to F16
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])
    if cut == "all":
        facts = check_saved(model, tmp_path / "out", source_dir=golden.ckpt, format="gguf")
        assert facts["backend"] == "llama.cpp"


def test_dense_layers_among_experts(goldens):
    model = Golden(goldens / "families/qwen3_vl_moe").model
    layers = [*model.cfg.text.layers]
    layers[1] = dataclasses.replace(layers[1], channel=Dense(40))
    assert "no dense layers among those of experts" in why_not(model.cfg.with_layers(layers), "gguf")
