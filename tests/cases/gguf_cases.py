"""Tokenizers and Qwen-VL folders that llama.cpp takes, and how far its numbers may be from ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from hf_cases import edit_weights, make_folder
from llama_cpp import MARKER, llama_cpp
from PIL import Image
from repository import GOLDENS
from scipy.special import log_softmax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import vlmprune_jax as vp
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")
FAMILIES = GOLDENS / "families"
LIMITS = {"longest_edge": 40_000, "shortest_edge": 100}  # pixels of an image
# What of the golden checkpoints llama.cpp has no place for, as the models that people use have it.
USUAL = {
    "qwen3_vl": {
        "vision_config": {
            "temporal_patch_size": 2, "hidden_act": "gelu_pytorch_tanh", "num_position_embeddings": 36,
        },
        "text_config": {"attention_bias": False},
    },
    "qwen2_5_vl": {
        "vision_config": {"temporal_patch_size": 2, "hidden_act": "silu", "patch_size": 14, "window_size": 112},
        "text_config": {},
    },
}  # fmt: skip


def byte_tokenizer(folder: Path, specials: tuple[str, ...] = SPECIALS) -> Path:
    """A byte-level tokenizer.json with these marks and all 256 bytes, without merges to speak of."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *bytes_])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(one, normalized=False, special=True) for one in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def differences(expected: Any, found: np.ndarray, top: int = 5) -> tuple[float, float, float]:
    """Largest and mean difference of the log-probabilities of the likeliest words, and the mean divergence (nats)."""
    ours, theirs = (log_softmax(np.asarray(one, np.float64), axis=-1) for one in (expected, found))
    best = np.argsort(-ours, axis=-1)[..., :top]
    gaps = np.abs(np.take_along_axis(ours - theirs, best, axis=-1))
    return float(gaps.max()), float(gaps.mean()), float((np.exp(ours) * (ours - theirs)).sum(-1).mean())


def noise(height: int, width: int) -> np.ndarray:
    """An image uint8[height, width, 3]."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def prepared(source: Path, image: np.ndarray) -> np.ndarray:
    """The pixels that a folder's processor makes of an image."""
    loader = load_image_processor(source, DataSpec(aspect_ratio="square", cache_megabytes=0))
    return loader.preparation.prepare(Image.fromarray(image), 1)


def compare_answers(source: Path, model: vp.Model, out: Path, cells: tuple[int, int], text: str) -> None:
    """Features of an image of any size, of so many tokens (rows, columns), and the answer to a text behind it."""
    cfg, (rows, columns) = model.cfg, (side * model.cfg.vision.merge for side in cells)
    image = noise(rows * cfg.vision.patch_size, columns * cfg.vision.patch_size)
    found = llama_cpp(out, image=image, prompt=f"{MARKER}{text}", texts=[text])
    start, end = (json.loads((source / "config.json").read_text())[f"vision_{at}_token_id"] for at in ("start", "end"))
    row = np.array([[start, *[cfg.image_token_id] * (cells[0] * cells[1]), end, *found["ids"][0]]])
    grids = {"image_grid_thw": [[1, rows, columns]], "mm_token_type_ids": (row == cfg.image_token_id).astype(int)}
    pixels = prepared(source, image)
    logits, wanted = vp.forward(model, row, pixel_values=pixels, **grids, capture=("image_features",))
    features = np.asarray(wanted["image_features"])
    # llama.cpp's approximation of the GELU in the merger; features for other decoder layers stand beside these
    assert np.abs(found["features"][:, : features.shape[1]] - features).max() <= 2e-3 * np.abs(features).max()
    assert found["features"].shape == (len(features), features.shape[1] * (1 + cfg.deepstack))
    assert differences(logits[0, -1], found["answer"])[0] <= 0.1


def compare_limit(source: Path, model: vp.Model, folder: Path, fewest: int, most: int) -> None:
    """Files of llama.cpp have no limits of tokens per image; with the card's command it has the processor's."""
    out, image = folder / "out", noise(100, 150)
    vp.save(model, out, source_dir=source, format="gguf", dtype="float32", max_image_tokens=most)
    options = f"--image-min-tokens {fewest} " * (fewest > 0) + f"--image-max-tokens {most}"
    assert f"-f32.gguf {options}\n" in (out / "README.md").read_text()
    Image.fromarray(image).save(folder / "image.png")
    spec = DataSpec(aspect_ratio="square", cache_megabytes=0, max_image_tokens=most)
    (shape,) = load_image_processor(source, spec, slot_tokens=1).shapes([folder / "image.png"], "r")
    found = llama_cpp(out, image=image, prompt=MARKER, image_tokens=(fewest, most))
    assert len(found["features"]) == shape.tokens <= most


def make_qwen(tmp_path, name, **changes):
    """A Qwen-VL folder with random weights that llama.cpp computes, and its model; `changes` of its vision_config."""
    golden = FAMILIES / name / "ckpt"
    config = json.loads((golden / "config.json").read_text())
    for section, usual in USUAL[name].items():
        config[section] |= usual
    config["vision_config"] |= changes
    folder = make_folder(tmp_path / name, config)
    edit_weights(folder, lambda held: {key: value * _louder(key) for key, value in held.items()})
    for path in golden.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, folder)
    processor = json.loads((folder / "processor_config.json").read_text())
    names = ("patch_size", "temporal_patch_size")
    processor["image_processor"] |= {"size": LIMITS, **{key: config["vision_config"][key] for key in names}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder, vp.load(folder)


def _louder(key):
    """llama.cpp's cache is in F16, of which large weights make more than the tolerance; places must still count."""
    return np.float32(2 if "q_norm" in key else 1 if "norm" in key else 0.6)
