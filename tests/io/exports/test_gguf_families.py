"""Gemma, delta nets and experts in llama.cpp, whole and cut: texts, tokens, images, and what it cannot hold."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from gguf import GGUFReader
from gguf_cases import compare_answers, compare_limit, differences, noise, prepared
from golden_cases import Golden, cut_layers
from hf_cases import edit_weights, keep_layers, keep_width, make_folder, prune
from llama_cpp import MARKER, llama_cpp
from prune_cases import kept_units
from refusal import refused
from stack_cases import changed

import vlmprune_jax as vp
from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.limits import why_not
from vlmprune_jax.io.checkpoints.disk.gguf import read_gguf_header
from vlmprune_jax.io.checkpoints.read import FileArray, open_model
from vlmprune_jax.io.exports.gguf_model import interleaved
from vlmprune_jax.io.exports.write import check_saved

pytest.importorskip("xllamacpp")
S, F = "sliding_attention", "full_attention"
# E2B's kind with what llama.cpp needs, unlike the golden checkpoint: the last layers with keys of their own are S, F.
E2B = {"layer_types": [S, F, S, S, F, S, S, F], "num_hidden_layers": 8, "num_kv_shared_layers": 3}
MIXED = "qwen3_5_moe"


@pytest.fixture(scope="module")
def models(goldens, tmp_path_factory):
    """Callable name -> Golden; "gemma4" and the mixed one get new weights, for what llama.cpp needs."""
    made = {}

    def make(name):
        if name not in made:
            folder = goldens / "families" / name
            if name in (MIXED, "gemma4"):
                folder = shutil.copytree(folder, tmp_path_factory.mktemp("gguf") / name)
                config = json.loads((folder / "ckpt/config.json").read_text())
                text = config["text_config"]
                if name == MIXED:
                    # its delta nets normalise queries and keys with rms_norm_eps, transformers' always with 1e-6
                    text |= {"linear_value_head_dim": text["linear_key_head_dim"], "rms_norm_eps": 1e-6}
                else:
                    text |= {**E2B, "global_head_dim": 20}
                    del text["per_layer_config"]
                make_folder(folder / "ckpt", config)
            if name == "gemma4":
                edit_weights(folder / "ckpt", lambda held: {key: _tamed(key, value) for key, value in held.items()})
            made[name] = Golden(folder)
        return made[name]

    return make


def _tamed(key, value):
    """Bounds in order, scales near 1, and weights of which llama.cpp's cache in F16 makes less than the tolerance."""
    if key.endswith(("put_min", "put_max")):
        return np.float32(-2 if key.endswith("min") else 2)
    if "scalar" in key:
        return np.float32(0.7) + np.abs(value) * np.float32(0.2)
    return value if "norm" in key else value * np.float32(0.3)


def save(model, golden, folder, **options):
    vp.save(model, folder, source_dir=golden.ckpt, format="gguf", **{"dtype": "float32", **options})
    return GGUFReader(next(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))).fields


# Delta nets and experts -----------------------------------------------------------------------------------------------


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
def test_hybrids(models, tmp_path, name, cut):
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


def test_hybrids_that_it_cannot_hold(models, tmp_path):
    golden = models("qwen3_5")
    refused("no delta nets with keys of 8 and values of 6 channels", save, golden.model, golden, tmp_path / "out")
    whole = models("qwen3_5_r3").model
    assert why_not(whole.cfg, "gguf") is None
    refused("needs one layer of full attention: keep one", keep_layers, whole, [1, 2])
    model = models("qwen3_vl_moe").model
    layers = [*model.cfg.text.layers]
    layers[1] = dataclasses.replace(layers[1], channel=Dense(40))
    assert "no dense layers among those of experts" in why_not(model.cfg.with_layers(layers), "gguf")


# Gemma: windows, shared keys, per-layer inputs and towers -------------------------------------------------------------

# Sizes (rows, columns) that need no resizing here or there: pixels of a token, tokens of an image.
SIZES = {"gemma3": (24, 24), "gemma4": (6 * 7, 6 * 10), "gemma4_dense": (4 * 7, 4 * 10)}


@pytest.mark.parametrize(
    ("name", "how"),
    [("gemma3", ""), ("gemma3", "layers"), ("gemma3", "width"), ("gemma4", ""), ("gemma4", "layers"),
     ("gemma4_dense", "")],
)  # fmt: skip
def test_gemma(models, tmp_path, name, how):
    """Log-probabilities of a text that is longer than the windows."""
    golden, out = models(name), tmp_path / "out"
    model = golden.model
    if how == "layers":
        model, _ = keep_layers(model, [0, 1, 2] if name == "gemma3" else [0, 2, 3, 4, 5, 7])
    elif how == "width":
        model, _ = keep_width(model, range(1), range(3, 35))
    save(model, golden, out)
    ids = np.random.default_rng(0).integers(9, 400, (1, 40))
    assert differences(vp.forward(model, ids)[0][0], llama_cpp(out, rows=ids)["logits"][0])[0] <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_images(models, tmp_path, name):
    """Features of an image and the answer behind it; llama.cpp treats images of E2B's kind as those of the dense."""
    golden, out = models(name), tmp_path / "out"
    source, model = golden.ckpt, golden.model
    if name == "gemma4":
        shapes = model.cfg.text.layers
        kept = [kept_units(i, (0, 2), (0,), range(s.channel.mlp // 7, s.channel.mlp)) for i, s in enumerate(shapes)]
        model = prune(model, kept)[0]
    save(model, golden, out)
    image = noise(*SIZES[name])
    found = llama_cpp(out, image=image, prompt=f"{MARKER}Where is it", texts=["Where is it"])
    config, (first, *text) = json.loads((source / "config.json").read_text()), found["ids"][0]
    start, end = (config.get(f"{at}_token_index") or config[f"{at}_token_id"] for at in ("boi", "eoi"))
    row = np.array([[first, start, *[model.cfg.image_token_id] * len(found["features"]), end, *text]])
    arrays = {"pixel_values": prepared(source, image)}
    if model.cfg.dynamic_resolution:
        arrays["image_grid_thw"] = [[1, *(side // model.cfg.vision.patch_size for side in SIZES[name])]]
    layers = model.cfg.text.layers
    sees = [changed(x, {"sees_images": x.mixer.sees_images or x.mixer.window is not None}) for x in layers]
    seeing = model.replace(cfg=model.cfg.with_layers(sees))
    logits, aux = vp.forward(seeing, row, **arrays, capture=("image_features",))
    features = np.asarray(aux["image_features"]).reshape(-1, model.cfg.text.hidden_size)
    assert np.abs(found["features"] - features).max() <= 0.02
    assert differences(logits[0, -1], found["answer"])[0] <= 0.1
    assert ("answers about images differ" in (out / "README.md").read_text()) == (name == "gemma4")
    assert check_saved(model, out, source_dir=source, format="gguf")["backend"] == "llama.cpp"


def test_the_budget_of_tokens_is_an_option(models, tmp_path):
    model = models("gemma4_dense").model
    compare_limit(models("gemma4_dense").ckpt, model, tmp_path, -1, 140)
    tower = read_gguf_header(next((tmp_path / "out").glob("mmproj-*"))).fields
    assert tower["clip.vision.image_size"] == model.cfg.vision.image_size  # the image of `vlmprune bench`


@pytest.mark.parametrize("crops", [True, False])
def test_the_card_says_that_images_are_not_cropped(models, tmp_path, crops):
    copy = shutil.copytree(models("gemma3").ckpt, tmp_path / "source")
    settings = json.loads((copy / "processor_config.json").read_text())
    settings["image_processor"]["do_pan_and_scan"] = crops
    (copy / "processor_config.json").write_text(json.dumps(settings))
    vp.save(models("gemma3").model, tmp_path / "out", source_dir=copy, format="gguf", dtype="float32")
    assert ("llama.cpp has no pan and scan" in (tmp_path / "out/README.md").read_text()) == crops


def test_large_tables_are_written_in_parts(models, tmp_path, monkeypatch):
    """Embedding and per-layer table, cut and whole, read from files: the same bytes as from memory."""
    source = models("gemma4").ckpt
    model, plan = keep_layers(models("gemma4").model, [0, 2, 3, 4, 5, 7])
    monkeypatch.setattr("vlmprune_jax.io.checkpoints.read.BLOCK", 4000)
    monkeypatch.setattr("vlmprune_jax.io.exports.gguf_model._CHUNK", 3000)
    options = {"format": "gguf", "quantize": "q8_0", "dtype": "float16"}
    vp.save(model, tmp_path / "memory", source_dir=source, plan=plan, **options)
    read, seen = FileArray.pieces, []

    def pieces(array, rows, **options):
        for piece in read(array, rows, **options):
            seen.append((array.source.key, piece.nbytes))
            yield piece

    monkeypatch.setattr(FileArray, "pieces", pieces)
    vp.prune_folder(source, plan, tmp_path / "files", **options)
    assert max(size for key, size in seen if "embed_tokens" in key) <= 4000
    for path in (tmp_path / "memory").glob("*.gguf"):
        assert path.read_bytes() == (tmp_path / "files" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("name", "kept", "fact"),
    [
        (
            "gemma3",
            [0, 1, 2, 4, 5],
            r"full attention in layers \[2, 4\] of 5, only in every n-th: remove n consecutive",
        ),
        ("gemma4", [0, 1, 2, 3, 5, 7], "last two layers with their own are sliding, full: keep both"),
    ],
)
def test_gemma_that_it_cannot_hold(models, tmp_path, name, kept, fact):
    golden = models(name)
    model, _ = keep_layers(golden.model, kept)
    refused(fact, save, model, golden, tmp_path / "out")
    assert why_not(golden.model.cfg, "gguf") is None
    assert why_not(model.cfg, "gguf") is not None


def test_the_attention_scale_of_27b(models):
    """By its 62 layers llama.cpp recognises the 27B, whose scale is not head_dim ** -0.5."""
    text = models("gemma3").model.cfg.text
    (architecture,) = vp.families["gemma3"].decoder.gguf
    assert np.isclose(architecture.query_gain(text), (text.attention.head_dim / 18) ** 0.5)
    large = text.with_layers(text.layers[:1] * 62)
    assert np.isclose(architecture.query_gain(large), (48 // 4 / 18) ** 0.5)
