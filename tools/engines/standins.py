"""Stand-ins for the table of engines: small random models of every family, and their pruned exports.

Their attention heads have 64 channels. Configs, tokenizers and processors are those of the golden checkpoints
(tests/goldens) and of the demo's model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

import vlmprune_jax as vp
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune import (
    KeptLayer,
    PrunePlan,
    VocabularyConfig,
    apply_plan,
    fingerprint,
    keep_everything,
)
from vlmprune_jax.io.checkpoints.layout import make_slots
from vlmprune_jax.io.exports.token_sources import choose_vocabulary
from vlmprune_jax.io.families import detect

_ROOT = Path(__file__).parents[2]
_GOLDENS = _ROOT / "tests/goldens/families"
_TEXT = {
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "rms_norm_eps": 1e-6,
}  # fmt: skip
# Activations, norms and layer patterns equal the hub models', because engines assume some of them without reading the
# config.
_TOWER = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 4,
    "layer_norm_eps": 1e-6, "rms_norm_eps": 1e-6,
}  # fmt: skip
_PATCHES = {
    "hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "out_hidden_size": 256, "depth": 4, "patch_size": 4,
    "temporal_patch_size": 2, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
# Windows are longer than an image, as on the hub, and shorter than a prompt.
_GEMMA3 = {"num_hidden_layers": 12, "query_pre_attn_scalar": 64, "sliding_window_pattern": 6, "sliding_window": 270}
_GEMMA4 = {"num_hidden_layers": 6, "global_head_dim": 128}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_QWEN3_ROPE = {"mrope_interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default"}
_QWEN2_ROPE = {"type": "mrope", "mrope_section": [8, 12, 12]}
# Name -> (golden checkpoint, fields of the decoder, fields of the tower); None for the demo's LLaVA.
STANDINS: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {
    "LLaVA-1.5": (None, {**_TEXT, "num_key_value_heads": 4}, _TOWER),
    "InternVL3": ("internvl3", _TEXT, _TOWER),
    "Qwen3-VL": ("qwen3_vl", {**_TEXT, "rope_scaling": _QWEN3_ROPE, "attention_bias": False}, _PATCHES),
    "Qwen2.5-VL": (
        "qwen2_5_vl",
        {**_TEXT, "rope_scaling": _QWEN2_ROPE},
        {**_PATCHES, "hidden_act": "silu", "window_size": 24},
    ),
    "SmolVLM": ("smolvlm", {**_TEXT, "tie_word_embeddings": False}, {**_TOWER, "image_size": 32, "patch_size": 4}),
    "Gemma 3": ("gemma3", {**_TEXT, **_GEMMA3}, {**_TOWER, "image_size": 128, "patch_size": 4}),
    "Gemma 4 E": (
        "gemma4",
        {**_TEXT, **_GEMMA4, "num_kv_shared_layers": 2, "layer_types": [_SLIDING, _FULL] * 3},
        {**_TOWER, "head_dim": 64, "num_key_value_heads": 2},
    ),
    "Gemma 4 dense": (
        "gemma4_dense",
        {**_TEXT, **_GEMMA4, "sliding_window": 80},
        {**_TOWER, "head_dim": 64, "num_key_value_heads": 2},
    ),
    "SmolLM2": ("smolvlm", _TEXT, {}),
}
STORAGES = ("float32", "bfloat16", "w4a16", "w8a16", "w8a8")
PROMPTS = 8
_QUESTIONS = ("What is in the image?", "Which colour has the shape?", "Is there a circle?", "How many are there?")


def write_source(name: str, folder: Path) -> Path:
    """Write a stand-in's folder: random weights, tensor names and config as on the hub, and 8 prompts with images."""
    golden, text, tower = STANDINS[name]
    source = _GOLDENS / golden / "ckpt" if golden else _ROOT / "vlmprune_jax/demo/teacher"
    shutil.rmtree(folder, ignore_errors=True)
    unused = ("model*.safetensors", "README.md")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*unused, *(() if tower else ("*processor*",))))
    config = json.loads((_GOLDENS / golden / "config_hub_style.json" if golden else source / "config.json").read_text())
    section = config.get("text_config", config)
    section |= {key: value for key, value in text.items() if key != "head_dim" or config["model_type"] != "qwen2_5_vl"}
    if tower:
        config["vision_config"] |= tower
        if "audio_config" in config:
            config["audio_config"] = None
        if "mm_tokens_per_image" in config:
            config["mm_tokens_per_image"] = 256  # mlx-vlm supports no other number
            _edit(folder, image_seq_length=256, image_processor={"size": {"height": 128, "width": 128}})
        if "projector_hidden_act" in config:
            config["projector_hidden_act"] = "gelu"
        if "tie_word_embeddings" in text:
            config["tie_word_embeddings"] = False
            sizes = {"max_image_size": {"longest_edge": 32}, "size": {"longest_edge": 64}}
            _edit(folder, image_processor=sizes)
        if "pooling_kernel_size" in config["vision_config"]:
            config["vision_config"]["pooling_kernel_size"] = 3
            _edit(folder, image_processor={"pooling_kernel_size": 3})
        if golden and golden.startswith("qwen"):
            _set_patches(folder, config["vision_config"])
    else:
        config = {**section, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(_random_weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    _write_prompts(folder, config)
    return folder


def _set_patches(folder: Path, vision: dict[str, Any]) -> None:
    """Give the image processor the tower's patch sizes, and images of 16 to 64 merged patches."""
    pixels = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
    sizes = {name: vision[name] for name in ("patch_size", "temporal_patch_size")}
    sizes["size"] = {"longest_edge": 64 * pixels, "shortest_edge": 16 * pixels}
    _edit(folder, image_processor=sizes, video_processor=sizes)


def _edit(folder: Path, **changes: Any) -> None:
    """Change fields of processor_config.json, and of its sections."""
    path = folder / "processor_config.json"
    processor = json.loads(path.read_text())
    for name, value in changes.items():
        processor[name] = processor[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(processor, indent=2))


def _random_weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return random tensors with the names and shapes of the family's checkpoints on the hub."""
    family, draw = detect(config, "stand-in"), np.random.default_rng(0)
    whole = {**config, "vision_feature_layer": -1} if "vision_config" in config else config
    cfg = family.from_hf(whole, None)
    offset, tensors = cfg.text.block.norm_offset, dict[str, np.ndarray]()
    for slot in make_slots(cfg, family):
        if slot.start > 0:
            continue
        noise = draw.standard_normal(slot.hf_shape, np.float32)
        if "norm" in slot.key and slot.key.endswith("weight"):
            above = 0.0 if offset and not slot.path.startswith("vision/") else 1.0
            tensor = above + 0.2 * noise
        elif slot.key.endswith(("_min", "_max")):  # ranges of clipped projections
            tensor = np.asarray(-6.0 if slot.key.endswith("_min") else 6.0, np.float32)
        elif slot.key.endswith(("layer_scalar", "std_scale", "lambda_1", "lambda_2")):
            tensor = 1 + 0.2 * noise
        elif "position" in slot.key or len(slot.hf_shape) < 2 or max(slot.hf_shape[:-1]) == 1:
            tensor = 0.3 * noise
        else:
            tensor = noise * np.float32(1.5 / np.sqrt(np.prod(slot.hf_shape[1:])))
        tensors[slot.key] = np.asarray(tensor, np.float32)
    if config["model_type"] == "llava":  # a norm that the features do not use
        for part in ("weight", "bias"):
            key = f"vision_tower.vision_model.post_layernorm.{part}"
            tensors[key] = draw.standard_normal(config["vision_config"]["hidden_size"], np.float32)
    return tensors


def _write_prompts(folder: Path, config: dict[str, Any]) -> None:
    """Write `prompts/`: PNG images and texts by the chat template, with one placeholder per image."""
    from transformers import AutoTokenizer

    vision, out = config.get("vision_config"), folder / "prompts"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    out.mkdir()
    texts, draw = [], np.random.default_rng(1)
    for i in range(PROMPTS):
        question = _QUESTIONS[i % len(_QUESTIONS)] + " It is " * (i // len(_QUESTIONS) * 5)
        content: Any = question
        if vision:
            side = vision.get("image_size", 64)
            height, width = (32 + 8 * i, 96 - 8 * i) if isinstance(side, int) and side == 64 else (side, side)
            height, width = (height[0], height[0]) if isinstance(height, list) else (height, width)
            cells = draw.integers(0, 256, (6, 6, 3), np.uint8)
            Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC).save(out / f"{i}.png")
            content = [{"type": "image"}, {"type": "text", "text": question}]
        message = [{"role": "user", "content": content}]
        texts.append(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    (out / "texts.json").write_text(json.dumps(texts, indent=1))


# Cuts ------------------------------------------------------------------------------------------------------


def _plan(model: Model, **stacks: Sequence[KeptLayer]) -> PrunePlan:
    plan = keep_everything(model.cfg, fingerprint(model), vp.count_params(model.cfg))
    for name, layers in stacks.items():
        plan = plan.keeping(name, layers)
    return dataclasses.replace(plan, method="by hand")


def _layers(stack: str, *gone: int) -> Callable[[Model, Path], PrunePlan]:
    """Return a function that plans the removal of these layers (negative numbers count from the last layer)."""

    def cut(model: Model, folder: Path) -> PrunePlan:
        layers = model.cfg.stack(stack).layers
        removed = {i % len(layers) for i in gone}
        kept = [KeptLayer.whole(i, shape) for i, shape in enumerate(layers) if i not in removed]
        return _plan(model, **{stack: kept})

    return cut


def _width(stack: str, heads: bool, uneven: bool = False) -> Callable[[Model, Path], PrunePlan]:
    """Return a function that plans the removal of a quarter of the neurons and, with `heads`, the first head group."""

    def kept_layer(i: int, layer: Layer) -> KeptLayer:
        kv_heads, q_heads, neurons = (layer.sizes[axis] for axis in ("kv_heads", "q_heads", "mlp"))
        first = int(heads and kv_heads > 1 and not (uneven and i % 2))
        kept = {
            "kv_heads": range(first, kv_heads),
            "q_heads": range(first * layer.mixer.group, q_heads),
            "mlp": range(0, neurons - (32 if uneven and i % 2 else neurons // 4)),
        }
        return KeptLayer(i, {axis: tuple(units) for axis, units in kept.items()})

    return lambda model, folder: _plan(
        model, **{stack: [kept_layer(i, layer) for i, layer in enumerate(model.cfg.stack(stack).layers)]}
    )


def _vocabulary(model: Model, folder: Path) -> PrunePlan:
    size, sources = model.cfg.text.vocab_size - 8, (str(folder / "prompts/texts.json"),)
    config = VocabularyConfig(size=size, sources=sources, multiple=8, source_dir=str(folder))
    return _plan(model).trimming(choose_vocabulary(model.cfg, config))


CUTS: dict[str, Callable[[Model, Path], PrunePlan]] = {
    "depth": _layers("text", 1),
    "neurons": _width("text", heads=False),
    "heads": _width("text", heads=True),
    "uneven, padded": _width("text", heads=True, uneven=True),
    "tower neurons": _width("vision", heads=False),
    "tower layers": _layers("vision", -1),
    "tower heads, padded": _width("vision", heads=True, uneven=True),
    "vocabulary": _vocabulary,
}


def write_cells(name: str, work: Path, cuts: Sequence[str], storages: Sequence[str]) -> Iterator[Path | str]:
    """Write a stand-in's exports to `work`; yield their folders, or a line on why an export is not possible.

    All cuts are written in float32; the unpruned stand-in and the cut "heads" also in every other storage format.
    Existing exports are kept.
    """
    source = work / name / "source"
    if not _complete(source):
        write_source(name, source)
    load = functools.cache(lambda: vp.load(source))
    bare = "vision_config" not in json.loads((source / "config.json").read_text())
    for cut in ("unpruned", *cuts):
        if bare and cut.startswith("tower"):
            continue
        for storage in storages:
            if storage != "float32" and cut not in ("unpruned", "heads"):
                continue
            out = work / name / f"{cut}, {storage}"
            try:
                if not _complete(out):
                    plan = CUTS[cut](load(), source) if cut != "unpruned" else None
                    _write_cell(load(), plan, source, out, storage)
            except UserError as error:
                yield f"{out.parent.name}: {out.name}: not written: {error}"
                continue
            yield out


def _complete(folder: Path) -> bool:
    """Return True if a folder is complete: its prompts, which are written last, exist."""
    return (folder / "prompts/texts.json").exists()


def _write_cell(model: Model, plan: PrunePlan | None, source: Path, out: Path, storage: str) -> None:
    pruned = model if plan is None else apply_plan(model, plan)
    integers = storage.startswith("w")
    options: dict[str, Any] = {"dtype": "bfloat16" if integers else storage, "uneven": "pad", "overwrite": True}
    if integers:
        options |= {"format": "compressed-tensors", "quantize": storage}
    vp.save(pruned, out, source_dir=source, plan=plan, **options)
    shutil.copytree(source / "prompts", out / "prompts")
