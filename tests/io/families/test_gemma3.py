"""Gemma 3: spellings of its config, and what its class cannot hold."""

import json

import pytest
from hf_cases import keep_layers, keep_width
from vlm_cases import gemma3_config, make_vlm_folder

import vlmprune_jax as vp


@pytest.fixture(scope="module")
def folder(goldens):
    return goldens / "families/gemma3/ckpt"


@pytest.fixture(scope="module")
def model(folder):
    return vp.load(folder)


def test_a_cut_is_written_in_the_spellings_of_both_versions(model, folder, tmp_path):
    shorter, _ = keep_layers(model, [0, 2, 4])
    vp.save(shorter, tmp_path / "out", source_dir=folder, dtype="float32")
    text = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert text["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert (text["rope_theta"], text["rope_local_base_freq"]) == (1e6, 1e4)
    assert text["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert text["rope_parameters"]["full_attention"]["rope_theta"] == 1e6
    assert vp.load(tmp_path / "out").cfg == shorter.cfg


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    config = gemma3_config()
    config["text_config"] |= {"hidden_size": 50, "num_attention_heads": 10, "num_key_value_heads": 5}
    model = vp.load(make_vlm_folder(tmp_path / "model", config))
    with pytest.raises(vp.UserError, match=r"refuses 8 heads.*keep 2/1"):
        keep_width(model, range(4), range(56))
    assert keep_width(model, range(1), range(56))[0].cfg.text.layers[0].mixer.q_heads == 2
