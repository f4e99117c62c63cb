"""Gemma 3 and 4: what their classes cannot hold is refused with reason and alternative; configs of cuts."""

import json

import numpy as np
import pytest
from hf_cases import keep_layers, keep_width
from prune_cases import layer_scores
from refusal import refused
from vlm_cases import gemma3_config, make_vlm_folder

import vlmprune_jax as vp
from vlmprune_jax.core.prune.fingerprints import fingerprint
from vlmprune_jax.io.checkpoints.read import blocks_of, open_model


@pytest.fixture(scope="module")
def folder(goldens):
    return goldens / "families/gemma4/ckpt"


@pytest.fixture(scope="module")
def model(folder):
    return vp.load(folder)


def test_a_cut_of_gemma_3_is_written_in_the_spellings_of_both_versions(goldens, tmp_path):
    folder = goldens / "families/gemma3/ckpt"
    shorter, _ = keep_layers(vp.load(folder), [0, 2, 4])
    vp.save(shorter, tmp_path / "out", source_dir=folder, dtype="float32")
    text = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert text["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert (text["rope_theta"], text["rope_local_base_freq"]) == (1e6, 1e4)
    assert text["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert text["rope_parameters"]["full_attention"]["rope_theta"] == 1e6
    assert vp.load(tmp_path / "out").cfg == shorter.cfg


def test_heads_of_gemma_3_that_do_not_divide_the_width(tmp_path):
    config = gemma3_config()
    config["text_config"] |= {"hidden_size": 50, "num_attention_heads": 10, "num_key_value_heads": 5}
    model = vp.load(make_vlm_folder(tmp_path / "model", config))
    refused(r"refuses 8 heads.*keep 2/1", keep_width, model, range(4), range(56))
    assert keep_width(model, range(1), range(56))[0].cfg.text.layers[0].mixer.q_heads == 2


@pytest.mark.parametrize(
    ("gone", "reason"), [(2, "no layer with full attention has keys"), (8, "last layer of Gemma 4 must have full")]
)
def test_illegal_cuts(model, gone, reason):
    refused(reason, keep_layers, model, [i for i in range(9) if i != gone])


def test_depth_plans_are_legal(model):
    """Producers (2, 4) stay by default; the last layer, and one that makes keys for each type, stay always."""
    scores = vp.Scores(criterion="by hand", fingerprint=fingerprint(model), values=layer_scores(np.arange(9.0)[::-1]))
    assert vp.make_plan(scores, model, method="depth", layers_removed=3).removed_layers == (5, 6, 7)
    moved = vp.make_plan(scores, model, method="depth", layers_removed=6, producers="redirect")
    assert moved.removed_layers == (1, 3, 4, 5, 6, 7)
    refused("between 0 and 6", vp.make_plan, scores, model, method="depth", layers_removed=7)


def test_a_cut_writes_one_config_for_every_version(model, folder, tmp_path):
    shorter, _ = keep_layers(model, [0, 1, 2, 3, 5, 7, 8])
    # layers that share keys and values are twice as wide, which zeros need not make equal
    vp.save(shorter, tmp_path / "out", source_dir=folder, dtype="float32", uneven="pad", max_image_tokens=140)
    config = json.loads((tmp_path / "out/config.json").read_text())
    text = config["text_config"]
    assert config["vision_config"]["default_output_length"] == 140  # vLLM counts the tokens of an image by it
    assert "per_layer_config" not in text
    assert (text["num_kv_shared_layers"], text["global_head_dim"], len(text["layer_types"])) == (3, 20, 7)
    assert vp.load(tmp_path / "out").cfg == shorter.cfg


def test_double_wide_layers_stay_twice_as_wide(model):
    scores = vp.score(model, criterion="l2")
    pruned = vp.apply_plan(model, vp.make_plan(scores, model, method="width", ratio=0.07))
    widths = {shape.mixer.source is not None: shape.channel.mlp for shape in pruned.cfg.text.layers}
    assert widths[True] == 2 * widths[False] < 112
    assert pruned.cfg.text.uniform


def test_large_tables_are_cut_in_parts(model, folder, tmp_path, monkeypatch):
    """The per-layer table by layers and by tokens, in files: the same bytes as in memory."""
    pruned, plan = keep_layers(model, [0, 1, 2, 3, 4, 5, 7, 8])
    kept = tuple(range(0, 422, 2))
    monkeypatch.setattr("vlmprune_jax.io.checkpoints.read.BLOCK", 4000)
    vp.save(pruned, tmp_path / "memory", source_dir=folder, dtype="float32", plan=plan)
    vp.prune_folder(folder, plan, tmp_path / "files")
    memory, files = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "files"))
    assert memory == files
    lazy = open_model(folder).params["text"]["extra_inputs"]["table"]["weight"]
    rows = lazy.take(np.asarray(kept), axis=0).take(np.asarray([1, 4]), axis=1)
    whole = np.asarray(model.params["text"]["extra_inputs"]["table"]["weight"])
    blocks = np.concatenate([block.copy() for block in blocks_of([rows], as_stored=True)])
    np.testing.assert_array_equal(blocks, whole[list(kept)][:, [1, 4]])
