"""Qwen-VL folders whose decoder and tower llama.cpp computes, made of the golden checkpoints' configs."""

import json
import shutil
from pathlib import Path

import numpy as np
from hf_cases import edit_weights, make_folder

from vlmprune_jax.io.checkpoints.read import load

FAMILIES = Path(__file__).parents[1] / "goldens/families"
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


def make_qwen(tmp_path, name, **changes):
    """A folder of the family with random weights, and its model; `changes` of its vision_config."""
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
    return folder, load(folder)


def _louder(key):
    """llama.cpp's cache is in F16, of which large weights make more than the tolerance; places must still count."""
    return np.float32(2 if "q_norm" in key else 1 if "norm" in key else 0.6)
