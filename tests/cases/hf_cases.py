"""Small Hugging Face folders, pruned models and golden inputs that the reading, writing and parity tests share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prune_cases import hand_plan, kept_units
from safetensors.numpy import load_file, save_file
from vlm_cases import TEXTS, TOWERS, llava_config

from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune import KeptLayer, PrunePlan, apply_plan, fingerprint
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.layout import make_slots
from vlmprune_jax.io.families import detect

LLAMA = {
    **{**TEXTS["llama"], "vocab_size": 97, "num_hidden_layers": 4, "attention_bias": False, "mlp_bias": False},
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "float32",
    "a_field_of_the_future": {"kept": True},
}
LLAVA = {
    **llava_config("llama", "clip"),
    "image_seq_length": 9,
    "text_config": {k: v for k, v in LLAMA.items() if k not in ("torch_dtype", "a_field_of_the_future")},
    "vision_config": {**TOWERS["clip"], "image_size": 12},
}

LFM2_VL = {
    "architectures": ["Lfm2VlForConditionalGeneration"],
    "model_type": "lfm2_vl",
    "image_token_id": 190,
    "downsample_factor": 2,
    "projector_hidden_size": 36,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "text_config": {
        "model_type": "lfm2",
        "vocab_size": 199,
        "hidden_size": 48,
        "block_ff_dim": 100,  # 72 neurons: two thirds of it, in whole multiples of 8
        "block_multiple_of": 8,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "full_attn_idxs": [1, 4],
        "conv_L_cache": 3,
        "norm_eps": 2e-5,
        "rope_theta": 500.0,
        "max_position_embeddings": 256,
        "eos_token_id": 7,
    },
    "vision_config": {
        "model_type": "siglip2_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "num_patches": 25,
        "patch_size": 4,
        "vision_use_head": False,
    },
}


def make_folder(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A folder with random weights for a config, in the names of transformers 4 and 5's files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(seed)
    tensors = {}
    family = detect(config, str(folder))
    # all blocks of the tower, also those above the feature layer
    whole = {**config, "vision_feature_layer": -1, "select_layer": -1} if "vision_config" in config else config
    for slot in make_slots(family.from_hf(whole, None), family):
        if slot.start > 0:
            continue  # a tensor that several parameters share is drawn once
        noise = draw.standard_normal(slot.hf_shape, np.float32)
        key = slot.key
        tensors[key] = np.asarray(1 + 0.2 * noise if "norm" in key and key.endswith("weight") else 0.25 * noise)
    if family.name == "llava":
        width = config["vision_config"]["hidden_size"]
        for part in ("weight", "bias"):
            tensors[f"vision_tower.vision_model.post_layernorm.{part}"] = draw.standard_normal(width, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_vlm_folder(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A folder with random weights, with the tensors that a tower has beside what is computed."""
    make_folder(folder, config, seed)
    draw, width, wide = (
        np.random.default_rng(seed + 1),
        TOWERS["clip"]["hidden_size"],
        TOWERS["clip"]["intermediate_size"],
    )
    if config["vision_config"]["model_type"] == "siglip_vision_model":
        shapes = {
            "probe": (1, 1, width),
            "attention.in_proj_weight": (3 * width, width), "attention.in_proj_bias": (3 * width,),
            "attention.out_proj.weight": (width, width), "attention.out_proj.bias": (width,),
            "layernorm.weight": (width,), "layernorm.bias": (width,),
            "mlp.fc1.weight": (wide, width), "mlp.fc1.bias": (wide,),
            "mlp.fc2.weight": (width, wide), "mlp.fc2.bias": (width,),
        }  # fmt: skip
        head = {f"vision_tower.vision_model.head.{k}": draw.standard_normal(s, np.float32) for k, s in shapes.items()}
        edit_weights(folder, lambda tensors: {**tensors, **head})
    return folder


def copy_golden(goldens: Path, name: str, to: Path) -> Path:
    """A writable copy of a golden checkpoint."""
    shutil.copytree(goldens / "ckpt" / name, to)
    return to


def copy_llava(goldens: Path, to: Path) -> Path:
    """The golden LLaVA with its tokenizer and image processor: a folder that the commands take."""
    shutil.copytree(goldens / "tokenizers/llava", copy_golden(goldens, "llava_hf", to), dirs_exist_ok=True)
    shutil.copy(goldens / "ckpt/clip_tower/preprocessor_config.json", to)
    return to


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of a config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder: Path, edit: Any, name: str = "model.safetensors") -> None:
    """Rewrite one safetensors file after `edit(dict)`."""
    tensors = load_file(folder / name)
    tensors = edit(tensors) or tensors
    tensors = {key: np.array(value, order="C") for key, value in tensors.items()}
    save_file(tensors, folder / name, metadata={"format": "pt"})


def assert_same_tensors(first: Path, second: Path) -> None:
    """Both folders hold the same keys with the same dtypes, shapes and bytes."""
    a, b = Checkpoint(first), Checkpoint(second)
    assert set(a) == set(b)
    for key in a:
        assert (a.entries[key].dtype, a.entries[key].shape) == (b.entries[key].dtype, b.entries[key].shape), key
        assert a.entries[key].array().tobytes() == b.entries[key].array().tobytes(), key


def prune(model: Model, layers: Sequence[KeptLayer], stack: str = "text") -> tuple[Model, PrunePlan]:
    """The model with these layers of a stack, and the plan that says so."""
    plan = hand_plan(model.cfg, fingerprint(model), "hybrid", "by hand", **{stack: layers})
    return apply_plan(model, plan), plan


def keep_layers(model: Model, numbers: Sequence[int]) -> tuple[Model, PrunePlan]:
    """A depth-pruned model."""
    return prune(model, [KeptLayer.whole(i, model.cfg.text.layers[i]) for i in numbers])


def keep_width(
    model: Model,
    kv_heads: Sequence[int],
    neurons: Sequence[int],
    only: Sequence[int] | None = None,
    of_each_group: int | None = None,
):
    """A width-pruned model, in all layers or `only` some: whole groups of heads, or the first query heads of each."""
    layers = []
    for i, shape in enumerate(model.cfg.text.layers):
        per_group = shape.mixer.q_heads // shape.mixer.kv_heads
        q_heads = tuple(g * per_group + r for g in kv_heads for r in range(of_each_group or per_group))
        cut = only is None or i in only
        layers.append(kept_units(i, q_heads, tuple(kv_heads), tuple(neurons)) if cut else KeptLayer.whole(i, shape))
    return prune(model, layers)


def unequal(model: Model) -> Model:
    """No layer is whole, no two neighbours are alike, and groups of several query heads become smaller in layer 1."""
    first = model.cfg.text.layers[0]
    heads, per_group = first.mixer.kv_heads, first.mixer.q_heads // first.mixer.kv_heads
    for i in range(len(model.cfg.text.layers)):
        kv_heads, neurons = range(max(1, heads - 1 - i % 2)), range(i, i + 38 + 6 * (i % 2))
        model, _ = keep_width(model, kv_heads, neurons, [i], max(1, per_group - 1) if i == 1 else None)
    return model


def random_ids(model: Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Two rows of 20 random ids, with an image each if the model has a tower.

    Where images are of any size, one is of 2 x 5 merged cells and one of 3 x 2, each behind token 91.
    """
    draw, cfg = np.random.default_rng(seed), model.cfg
    ids = draw.integers(6, 90, (2, 20))
    if cfg.vision is None:
        return {"input_ids": ids}
    if cfg.dynamic_resolution:
        cells = np.array([[1, 2, 5], [1, 3, 2]])
        ids = draw.integers(6, 90, (2, 30))
        for row, tokens in zip(ids, cells.prod(axis=1), strict=True):
            row[3], row[4 : 4 + tokens] = 91, cfg.image_token_id
        grids = cells * [1, cfg.vision.merge, cfg.vision.merge]
        pixels = draw.standard_normal((grids.prod(axis=1).sum(), cfg.vision.patch_values), np.float32)
        types = (ids == cfg.image_token_id).astype(np.int64)
        # without a mask and a cache, version 4.57 takes the repeated positions of an image for many short rows
        rows = {"input_ids": ids, "attention_mask": np.ones_like(ids), "mm_token_type_ids": types}
        return {**rows, "pixel_values": pixels, "image_grid_thw": grids}
    image = np.full((2, cfg.tokens_per_image), cfg.image_token_id)
    size = cfg.vision.image_size
    pixels = draw.standard_normal((2, 3, size, size), np.float32)
    return {"input_ids": np.concatenate([ids[:, :3], image, ids[:, 3:]], axis=1), "pixel_values": pixels}


def expanded_batch(golden: Any, image_token: int, n_patches: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids and mask of all rows of a golden forward, with `n_patches` image tokens for every -200."""
    mask = golden["merged_attention_mask"]
    ids = np.zeros(mask.shape, np.int32)
    for row, seen, tokens, real in zip(ids, mask, golden["input_ids"], golden["attention_mask"], strict=True):
        times = np.where(tokens == -200, n_patches, 1) * (real == 1)
        row[: times.sum()] = np.repeat(np.where(tokens == -200, image_token, tokens), times)
        np.testing.assert_array_equal(seen, np.arange(len(row)) < times.sum())
    return ids, mask


def mean_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross entropy of position t against label t + 1, over labels that are not -100."""
    logits, labels = np.asarray(logits, np.float64)[:, :-1], np.asarray(labels)[:, 1:]
    top = logits.max(axis=-1, keepdims=True)
    norm = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    picked = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    used = labels != -100
    return float((norm - picked)[used].mean())


def assert_equal(first, second):
    a, b = flatten(first.params), flatten(second.params)
    assert set(a) == set(b)
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


def saved_by_5(key):
    """Names in the files of transformers 5.24: LLaVA's tower, and Gemma 3's, without the vision_model segment."""
    return key.replace("vision_tower.vision_model.", "vision_tower.")


def transformers_4_52(key):
    """In-memory names of transformers >= 4.52."""
    return "lm_head.weight" if "lm_head" in key else "model." + key.replace("language_model.model.", "language_model.")


def transformers_5(key):
    """In-memory names of transformers 5."""
    return transformers_4_52(saved_by_5(key))
