"""Layers of experts in llama.cpp, whole and cut: log-probabilities, greedy tokens, and what it cannot hold."""

import dataclasses

import numpy as np
import pytest
from gguf_cases import differences
from golden_cases import Golden, kept_layers
from hf_cases import prune
from llama_cpp import llama_cpp

import vlmprune_jax as vp
from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.limits import why_not
from vlmprune_jax.export.gguf_check import check_gguf

pytest.importorskip("xllamacpp")


@pytest.mark.parametrize(
    ("name", "cut"), [("qwen3_vl_moe", ""), ("qwen3_vl_moe", "all"), ("gemma4_moe", "experts"), ("internvl_moe", "all")]
)
def test_texts(goldens, tmp_path, name, cut):
    golden = Golden(goldens / "families" / name)
    model = prune(golden.model, kept_layers(golden, cut))[0] if cut else golden.model
    vp.save(model, tmp_path / "out", source_dir=golden.ckpt, format="gguf", dtype="float32")
    ids = golden.arrays["text_input_ids"][None]
    ours, theirs = vp.forward(model, ids)[0][0], llama_cpp(tmp_path / "out", rows=ids)["logits"][0]
    assert differences(ours, theirs)[0] <= 0.02
    first, second = np.sort(np.asarray(ours), axis=-1)[:, :-3:-1].T
    clear = first - second > 0.02  # llama.cpp rounds keys and values to F16
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])
    if cut == "all":
        facts = check_gguf(model, tmp_path / "out", source_dir=golden.ckpt, uneven="per_layer")
        assert facts["backend"] == "llama.cpp"


def test_dense_layers_among_experts(goldens):
    model = Golden(goldens / "families/qwen3_vl_moe").model
    layers = [*model.cfg.text.layers]
    layers[1] = dataclasses.replace(layers[1], channel=Dense(40))
    assert "no dense layers among those of experts" in why_not(model.cfg.with_layers(layers), "gguf")
