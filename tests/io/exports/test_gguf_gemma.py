"""Gemma 3 and 4 in llama.cpp: windows, shared keys, per-layer inputs and towers, whole and cut; what it cannot hold."""

import json
import shutil

import numpy as np
import pytest
from gguf_cases import compare_limit, differences, noise, prepared
from hf_cases import edit_weights, keep_layers, keep_width, make_folder, prune
from llama_cpp import MARKER, llama_cpp
from prune_cases import kept_units
from stack_cases import changed

import vlmprune_jax as vp
from vlmprune_jax.core.limits import why_not
from vlmprune_jax.io.checkpoints.disk.gguf import read_gguf_header
from vlmprune_jax.io.checkpoints.read import FileArray
from vlmprune_jax.io.exports.write import check_saved

pytest.importorskip("xllamacpp")
S, F = "sliding_attention", "full_attention"
# E2B's kind with what llama.cpp needs, unlike the golden checkpoint: the last layers with keys of their own are S, F.
E2B = {"layer_types": [S, F, S, S, F, S, S, F], "num_hidden_layers": 8, "num_kv_shared_layers": 3}
# Sizes (rows, columns) that need no resizing here or there: pixels of a token, tokens of an image.
SIZES = {"gemma3": (24, 24), "gemma4": (6 * 7, 6 * 10), "gemma4_dense": (4 * 7, 4 * 10)}


@pytest.fixture(scope="module")
def models(goldens, tmp_path_factory):
    """Callable name -> (folder, model), made once; "gemma4" has random weights, the others are golden."""
    made = {}

    def make(name):
        source = goldens / "families" / name / "ckpt"
        if name == "gemma4" and name not in made:
            config = json.loads((source / "config.json").read_text())
            text = {k: v for k, v in config["text_config"].items() if k != "per_layer_config"}
            config["text_config"] = {**text, **E2B, "global_head_dim": 20}
            folder = make_folder(tmp_path_factory.mktemp("gemma") / name, config)
            edit_weights(
                folder, lambda held: {key: np.asarray(_tamed(key, value), np.float32) for key, value in held.items()}
            )
            for path in source.iterdir():
                if path.name not in ("config.json", "model.safetensors"):
                    shutil.copy(path, folder)
            source = folder
        return made.setdefault(name, (source, vp.load(source)))

    return make


def _tamed(key, value):
    """Bounds in order, scales near 1, and weights of which llama.cpp's cache in F16 makes less than the tolerance."""
    if key.endswith(("put_min", "put_max")):
        return np.float32(-2 if key.endswith("min") else 2)
    if "scalar" in key:
        return np.float32(0.7) + np.abs(value) * np.float32(0.2)
    return value if "norm" in key else value * np.float32(0.3)


CUTS = {
    "whole": lambda model: model,
    "layers": lambda model: keep_layers(model, [0, 1, 2] if model.cfg.family == "gemma3" else [0, 2, 3, 4, 5, 7])[0],
    "width": lambda model: keep_width(model, range(1), range(3, 35))[0],
}


@pytest.mark.parametrize(
    ("name", "how"),
    [("gemma3", "whole"), ("gemma3", "layers"), ("gemma3", "width"), ("gemma4", "whole"), ("gemma4", "layers"),
     ("gemma4_dense", "whole")],
)  # fmt: skip
def test_texts(models, tmp_path, name, how):
    """Log-probabilities of a text that is longer than the windows."""
    source, whole = models(name)
    model, out = CUTS[how](whole), tmp_path / "out"
    vp.save(model, out, source_dir=source, format="gguf", dtype="float32")
    ids = np.random.default_rng(0).integers(9, 400, (1, 40))
    found = llama_cpp(out, rows=ids)["logits"][0]
    assert differences(vp.forward(model, ids)[0][0], found)[0] <= 0.1


def _row(model, source, count, text):
    config = json.loads((source / "config.json").read_text())
    start, end = (config.get(f"{at}_token_index") or config[f"{at}_token_id"] for at in ("boi", "eoi"))
    return np.array([[text[0], start, *[model.cfg.image_token_id] * count, end, *text[1:]]])


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_images(models, tmp_path, name):
    """Features of an image and the answer behind it; llama.cpp treats images of E2B's kind as those of the dense."""
    source, model = models(name)
    if name == "gemma4":
        shapes = model.cfg.text.layers
        kept = [kept_units(i, (0, 2), (0,), range(s.channel.mlp // 7, s.channel.mlp)) for i, s in enumerate(shapes)]
        model = prune(model, kept)[0]
    vp.save(model, tmp_path / "out", source_dir=source, format="gguf", dtype="float32")
    image = noise(*SIZES[name])
    pixels = prepared(source, image)
    found = llama_cpp(tmp_path / "out", image=image, prompt=f"{MARKER}Where is it", texts=["Where is it"])
    row = _row(model, source, len(found["features"]), found["ids"][0])
    arrays = {"pixel_values": pixels}
    if model.cfg.dynamic_resolution:
        sides = [side // model.cfg.vision.patch_size for side in SIZES[name]]
        arrays = {"pixel_values": pixels, "image_grid_thw": [[1, *sides]]}
    layers = model.cfg.text.layers
    sees = [changed(x, {"sees_images": x.mixer.sees_images or x.mixer.window is not None}) for x in layers]
    seeing = model.replace(cfg=model.cfg.with_layers(sees))
    logits, aux = vp.forward(seeing, row, **arrays, capture=("image_features",))
    features = np.asarray(aux["image_features"]).reshape(-1, model.cfg.text.hidden_size)
    assert np.abs(found["features"] - features).max() <= 0.02
    assert differences(logits[0, -1], found["answer"])[0] <= 0.1
    remarks = (tmp_path / "out/README.md").read_text()
    assert ("answers about images differ" in remarks) == (name == "gemma4")
    assert check_saved(model, tmp_path / "out", source_dir=source, format="gguf")["backend"] == "llama.cpp"


def test_the_budget_of_tokens_is_an_option(models, tmp_path):
    source, model = models("gemma4_dense")
    compare_limit(source, model, tmp_path, -1, 140)
    tower = read_gguf_header(next((tmp_path / "out").glob("mmproj-*"))).fields
    assert tower["clip.vision.image_size"] == model.cfg.vision.image_size  # the image of `vlmprune bench`


@pytest.mark.parametrize("crops", [True, False])
def test_the_card_says_that_images_are_not_cropped(models, tmp_path, crops):
    source, model = models("gemma3")
    copy = shutil.copytree(source, tmp_path / "source")
    settings = json.loads((copy / "processor_config.json").read_text())
    settings["image_processor"]["do_pan_and_scan"] = crops
    (copy / "processor_config.json").write_text(json.dumps(settings))
    vp.save(model, tmp_path / "out", source_dir=copy, format="gguf", dtype="float32")
    assert ("llama.cpp has no pan and scan" in (tmp_path / "out/README.md").read_text()) == crops


def test_large_tables_are_written_in_parts(models, tmp_path, monkeypatch):
    """Embedding and per-layer table, cut and whole, read from files: the same bytes as from memory."""
    source, whole = models("gemma4")
    model, plan = keep_layers(whole, [0, 2, 3, 4, 5, 7])
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
    ("name", "kept", "said"),
    [
        (
            "gemma3",
            [0, 1, 2, 4, 5],
            r"full attention in layers \[2, 4\] of 5, only in every n-th: remove n consecutive",
        ),
        ("gemma4", [0, 1, 2, 3, 5, 7], "last two layers with their own are sliding, full: keep both"),
    ],
)
def test_what_it_cannot_hold(models, tmp_path, name, kept, said):
    source, whole = models(name)
    model = keep_layers(whole, kept)[0]
    with pytest.raises(vp.UserError, match=said):
        vp.save(model, tmp_path / "out", source_dir=source, format="gguf")
    assert why_not(whole.cfg, "gguf") is None
    assert why_not(model.cfg, "gguf") is not None


def test_the_attention_scale_of_27b(models):
    """By its 62 layers llama.cpp recognises the 27B, whose scale is not head_dim ** -0.5."""
    text = models("gemma3")[1].cfg.text
    (architecture,) = vp.families["gemma3"].decoder.gguf
    assert np.isclose(architecture.query_gain(text), (text.attention.head_dim / 18) ** 0.5)
    large = text.with_layers(text.layers[:1] * 62)
    assert np.isclose(architecture.query_gain(large), (48 // 4 / 18) ** 0.5)
