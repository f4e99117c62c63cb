"""Delta nets in llama.cpp, whole and cut: log-probabilities, greedy tokens, images, and what it cannot hold."""

import json

import numpy as np
import pytest
from gguf import GGUFReader
from gguf_cases import differences
from golden_cases import Golden, cut_layers
from hf_cases import keep_layers, prune
from llama_cpp import MARKER, llama_cpp
from PIL import Image
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.core.limits import why_not
from vlmprune_jax.io.checkpoints.read import open_model
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.exports.gguf_model import interleaved
from vlmprune_jax.io.exports.write import check_saved

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def models(goldens):
    return {name: Golden(goldens / "families" / name) for name in ("qwen3_5", "qwen3_5_r1", "qwen3_5_r3")}


def save(model, golden, folder, **options):
    vp.save(model, folder, source_dir=golden.ckpt, format="gguf", **{"dtype": "float32", **options})
    return GGUFReader(next(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))).fields


@pytest.mark.parametrize(
    ("name", "cut"),
    [("qwen3_5_r3", ""), ("qwen3_5_r3", "value_heads_2"), ("qwen3_5_r3", "all"), ("qwen3_5_r1", "all"),
     ("qwen3_5_r1", "period")],
)  # fmt: skip
def test_texts(models, tmp_path, name, cut):
    """Patterns without a period; one, two and three value heads per group."""
    golden = models[name]
    model = golden.model
    if cut:
        model = (keep_layers(model, [0, 1]) if cut == "period" else prune(model, cut_layers(golden, cut)))[0]
    fields = save(model, golden, tmp_path / "out")
    assert fields["qwen35.attention.recurrent_layers"].contents() == [
        "delta_heads" in x.sizes for x in model.cfg.text.layers
    ]
    period = fields.get("qwen35.full_attention_interval")
    assert (period.contents() if period else None) == (2 if cut == "period" else None)
    assert ("expect it in every fourth layer" in (tmp_path / "out/README.md").read_text()) == (period is None)
    ids = golden.arrays["text_input_ids"][None]
    found = llama_cpp(tmp_path / "out", rows=ids, prompts=ids, greedy=6)
    assert differences(vp.forward(model, ids)[0][0], found["logits"][0])[0] <= 0.02
    np.testing.assert_array_equal(vp.generate(model, ids, max_new_tokens=6, eos_token_ids=())[0], found["tokens"][0])
    if cut == "all":
        facts = check_saved(model, tmp_path / "out", source_dir=golden.ckpt, format="gguf")
        assert facts["backend"] == "llama.cpp"


@pytest.mark.parametrize(
    ("cut", "order"), [("", [0, 3, 1, 4, 2, 5]), ("value_heads_2", [0, 2, 1, 3]), ("value_heads_1", [0, 1])]
)
def test_heads_are_tiled_with_the_ratio_after_the_cut(models, cut, order):
    golden = models["qwen3_5_r3"]
    model = prune(golden.model, cut_layers(golden, cut))[0] if cut else golden.model
    mixer = model.cfg.text.layers[-1].mixer
    heads = np.arange(mixer.delta_groups * mixer.group)
    np.testing.assert_array_equal(interleaved(heads, 0, mixer.delta_groups), order)
    np.testing.assert_array_equal(interleaved(np.array(order), 0, mixer.group), heads)


def test_an_image(models, tmp_path):
    golden = models["qwen3_5_r3"]
    model, vision = golden.model, golden.model.cfg.vision
    save(model, golden, tmp_path / "out")
    image = (
        np.random.default_rng(0).integers(0, 256, (4 * vision.patch_size, 6 * vision.patch_size, 3)).astype(np.uint8)
    )
    loader = load_image_processor(golden.ckpt, DataSpec(aspect_ratio="square", cache_megabytes=0))
    pixels = loader.preparation.prepare(Image.fromarray(image), 1)
    found = llama_cpp(tmp_path / "out", image=image, prompt=f"{MARKER}what", texts=["what"])
    start, end = (
        json.loads((golden.ckpt / "config.json").read_text())[f"vision_{at}_token_id"] for at in ("start", "end")
    )
    row = np.array([[start, *[model.cfg.image_token_id] * 6, end, *found["ids"][0]]])
    logits, wanted = vp.forward(
        model, row, pixel_values=pixels, image_grid_thw=[[1, 4, 6]], capture=("image_features",)
    )
    features = np.asarray(wanted["image_features"])
    assert np.abs(found["features"] - features).max() <= 2e-3 * np.abs(features).max()
    assert differences(logits[0, -1], found["answer"])[0] <= 0.1


def test_importance_follows_the_order_of_heads(models, tmp_path):
    """Mean squared inputs of the output projections, in llama.cpp's order of heads; files equal those from files."""
    golden = models["qwen3_5_r3"]
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
    golden = models["qwen3_5"]
    refused("no delta nets with keys of 8 and values of 6 channels", save, golden.model, golden, tmp_path / "out")
    whole = models["qwen3_5_r3"].model
    assert why_not(whole.cfg, "gguf") is None
    refused("needs one layer of full attention: keep one", keep_layers, whole, [1, 2])
