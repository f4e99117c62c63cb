"""Delta nets and experts in llama.cpp, whole and cut: log-probabilities, tokens, images, and what it cannot hold."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from gguf import GGUFReader
from gguf_cases import compare_answers, differences
from golden_cases import Golden, cut_layers
from hf_cases import keep_layers, make_folder, prune
from llama_cpp import llama_cpp
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.limits import why_not
from vlmprune_jax.io.checkpoints.read import open_model
from vlmprune_jax.io.exports.gguf_model import interleaved
from vlmprune_jax.io.exports.write import check_saved

pytest.importorskip("xllamacpp")


MIXED = "qwen3_5_moe"


@pytest.fixture(scope="module")
def models(goldens, tmp_path_factory):
    """Callable name -> Golden; the mixed one gets new weights, for values and eps that llama.cpp's delta nets need."""
    made = {}

    def make(name):
        if name not in made:
            folder = goldens / "families" / name
            if name == MIXED:
                folder = shutil.copytree(folder, tmp_path_factory.mktemp("gguf") / name)
                config = json.loads((folder / "ckpt/config.json").read_text())
                key_dim = config["text_config"]["linear_key_head_dim"]
                # its delta nets normalise queries and keys with rms_norm_eps, transformers' always with 1e-6
                config["text_config"] |= {"linear_value_head_dim": key_dim, "rms_norm_eps": 1e-6}
                make_folder(folder / "ckpt", config)
            made[name] = Golden(folder)
        return made[name]

    return make


def save(model, golden, folder, **options):
    vp.save(model, folder, source_dir=golden.ckpt, format="gguf", **{"dtype": "float32", **options})
    return GGUFReader(next(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))).fields


def without_first_heads(model, layers):
    """These layers without their first group of heads, and without some neurons of the shared expert."""
    cut = []
    for layer in layers:
        mixer = model.cfg.text.layers[layer.index].mixer
        parent, child = (axis.name for axis in mixer.axes)
        kept = {parent: layer.kept[parent][1:], child: layer.kept[child][mixer.group :], "mlp": range(3, 19)}
        cut.append(vp.KeptLayer(layer.index, {**layer.kept, **kept}))
    return cut


CASES = [
    *(("qwen3_5_r3", cut) for cut in ("", "value_heads_2", "all")),
    *(("qwen3_5_r1", cut) for cut in ("all", "period")),
    *(("qwen3_vl_moe", cut) for cut in ("", "all")),
    ("gemma4_moe", "experts"),
    ("internvl_moe", "all"),
    *((MIXED, cut) for cut in ("", "depth", "all")),
]


@pytest.mark.parametrize(("name", "cut"), CASES)
def test_texts(models, tmp_path, name, cut):
    """Patterns without a period; one, two and three value heads per group; experts."""
    golden = models(name)
    model, delta = golden.model, name.startswith("qwen3_5_r")
    if cut == "period":
        model, _ = keep_layers(model, [0, 1])
    elif cut:
        layers = cut_layers(golden, cut)
        model, _ = prune(model, without_first_heads(model, layers) if (name, cut) == (MIXED, "all") else layers)
    fields, ids = save(model, golden, tmp_path / "out"), golden.arrays["text_input_ids"][None]
    if name == MIXED:
        shared = fields["qwen35moe.expert_shared_feed_forward_length"].contents()
        assert shared == (16 if cut == "all" else 20)
    if delta:
        recurrent = ["delta_heads" in layer.sizes for layer in model.cfg.text.layers]
        assert fields["qwen35.attention.recurrent_layers"].contents() == recurrent
        period = fields.get("qwen35.full_attention_interval")
        assert (period.contents() if period else None) == (2 if cut == "period" else None)
        assert ("expect it in every fourth layer" in (tmp_path / "out/README.md").read_text()) == (period is None)
    found = llama_cpp(tmp_path / "out", rows=ids, prompts=ids if delta else (), greedy=6)
    ours, theirs = np.asarray(vp.forward(model, ids)[0][0]), found["logits"][0]
    assert differences(ours, theirs)[0] <= 0.02
    first, second = np.sort(ours, axis=-1)[:, :-3:-1].T
    clear = first - second > 0.02  # llama.cpp rounds keys and values to F16
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])
    if delta:
        tokens = vp.generate(model, ids, max_new_tokens=6, eos_token_ids=())[0]
        np.testing.assert_array_equal(tokens, found["tokens"][0])
    if cut == "all":
        facts = check_saved(model, tmp_path / "out", source_dir=golden.ckpt, format="gguf")
        assert facts["backend"] == "llama.cpp"


@pytest.mark.parametrize(
    ("cut", "order"), [("", [0, 3, 1, 4, 2, 5]), ("value_heads_2", [0, 2, 1, 3]), ("value_heads_1", [0, 1])]
)
def test_heads_are_tiled_with_the_ratio_after_the_cut(models, cut, order):
    golden = models("qwen3_5_r3")
    model = prune(golden.model, cut_layers(golden, cut))[0] if cut else golden.model
    mixer = model.cfg.text.layers[-1].mixer
    heads = np.arange(mixer.delta_groups * mixer.group)
    np.testing.assert_array_equal(interleaved(heads, 0, mixer.delta_groups), order)
    np.testing.assert_array_equal(interleaved(np.array(order), 0, mixer.group), heads)


def test_an_image(models, tmp_path):
    golden = models("qwen3_5_r3")
    save(golden.model, golden, tmp_path / "out")
    compare_answers(golden.ckpt, golden.model, tmp_path / "out", (2, 3), "what")


def test_importance_follows_the_order_of_heads(models, tmp_path):
    """Mean squared inputs of the output projections, in llama.cpp's order of heads; files equal those from files."""
    golden = models("qwen3_5_r3")
    ids = golden.arrays["text_input_ids"][None]
    importance = vp.imatrix(golden.model, [{"input_ids": ids, "labels": ids, "attention_mask": np.ones_like(ids)}])
    save(golden.model, golden, tmp_path / "out", imatrix=importance)
    sums = {t.name: t.data for t in GGUFReader(next((tmp_path / "out").glob("imatrix-*"))).tensors}
    mean = importance.means["text/layers/1/linear_attn/out_proj/weight"].reshape(2, 3, -1)
    written = sums["blk.1.ssm_out.weight.in_sum2"].reshape(3, 2, -1) / importance.tokens
    np.testing.assert_allclose(written, mean.swapaxes(0, 1), rtol=1e-6)
    save(golden.model, golden, tmp_path / "memory", quantize="q8_0", dtype="float16")
    save(open_model(golden.ckpt), golden, tmp_path / "files", quantize="q8_0", dtype="float16")
    for path in (tmp_path / "memory").glob("*.gguf"):
        assert path.read_bytes() == (tmp_path / "files" / path.name).read_bytes()


def test_what_it_cannot_hold(models, tmp_path):
    golden = models("qwen3_5")
    refused("no delta nets with keys of 8 and values of 6 channels", save, golden.model, golden, tmp_path / "out")
    whole = models("qwen3_5_r3").model
    assert why_not(whole.cfg, "gguf") is None
    refused("needs one layer of full attention: keep one", keep_layers, whole, [1, 2])


def test_dense_layers_among_experts(models):
    model = models("qwen3_vl_moe").model
    layers = [*model.cfg.text.layers]
    layers[1] = dataclasses.replace(layers[1], channel=Dense(40))
    assert "no dense layers among those of experts" in why_not(model.cfg.with_layers(layers), "gguf")
