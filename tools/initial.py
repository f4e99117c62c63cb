"""Initial model folders of pretraining: random weights, a language model joined with a tower, or upcycled experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, processors
from vocabulary import SMOLVLM_CHAT, make_qwen_tokenizer, make_tokenizer

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import read_json
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.params import flatten, init_params
from vlmprune_jax.io.checkpoints.layout import by_key, make_slots
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import IMAGE_TOKEN
from vlmprune_jax.io.data.tokenizer_files import TOKENIZER
from vlmprune_jax.io.exports.weights import Weights
from vlmprune_jax.io.families import detect, family_of
from vlmprune_jax.io.families.smolvlm import SMOLVLM

_ROWS = 64  # the vocabulary is padded to a multiple of this, as by `resize_token_embeddings` in LLaVA's conversion
_JOINED = 2  # patches per side of an image token
_TOKENS = ("<fake_token_around_image>", "<global-img>", IMAGE_TOKEN)


def write_random(folder: Path, architecture: Mapping[str, Any], records: Sequence[Path], *, seed: int) -> None:
    """Write a model folder with random weights and a tokenizer of the words in these files of records.

    The model is a LLaVA (`llava-hf`, all tower blocks), or a Qwen3-VL with the tower of the LLaVA in the folder
    `architecture["tower"]`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    vision, entries = architecture["vision_config"], [entry for path in records for entry in read_json(path, list[Any])]
    if architecture["model_type"] == "llava":
        size = make_tokenizer(entries, folder, image_size=vision["image_size"], patch_size=vision["patch_size"])
        ids, images = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}, {"image_token_index": 4}
    else:
        size, tokens = make_qwen_tokenizer(entries, folder, vision, **architecture["pixels"])
        ids = {f"{name}_token_id": tokens.pop(name) for name in ("eos", "pad")}
        images = {f"{name}_token_id": token for name, token in tokens.items()}
    text = {**architecture["text_config"], **ids, "vocab_size": size}
    config = {**architecture, **ids, **images, "text_config": text}
    config = {name: value for name, value in config.items() if name not in ("pixels", "tower")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({**ids, "do_sample": False}, indent=2) + "\n")
    last = {"vision_feature_layer": vision["num_hidden_layers"]} if architecture["model_type"] == "llava" else {}
    whole = detect(config, str(folder)).from_hf({**config, **last}, None)
    flat = flatten(init_params(whole, jax.random.key(seed), jnp.float32))
    if "tower" in architecture:
        flat |= _tower_in_frames(Path(architecture["tower"]), vision["temporal_patch_size"])
    tensors = _hf_tensors(whole, flat)
    if architecture["model_type"] == "llava":
        for part, value in (("weight", 1.0), ("bias", 0.0)):
            key = f"vision_tower.vision_model.post_layernorm.{part}"
            tensors[key] = np.full(vision["hidden_size"], value, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_joined(folder: Path, language: Path, tower: Path, *, seed: int) -> None:
    """Write a SmolVLM folder from a pretrained language model and the tower of a LLaVA; the projector is random.

    SmolVLM's tower has neither the class token of LLaVA's CLIP nor its first norm: see `_without_first_norm`. Images
    are not split, and 2 x 2 of their patches are one token.

    Args:
      folder: output folder; replaced.
      language: folder of a Llama. The special tokens of SmolVLM are added to its vocabulary; their embeddings are the
        mean embedding, except that of the end token, which is copied from the language model's end token.
      tower: a LLaVA folder with a CLIP tower.
      seed: random seed of the projector.

    Raises:
      UserError: see `load`; `language` is not a language model, or `tower` has no CLIP tower.
    """
    decoder, seeing = load(language), load(tower)
    if decoder.cfg.vision is not None:
        raise UserError(f"{language}: has a vision tower of its own; give a language model")
    vision = seeing.cfg.vision
    if vision is None or vision.kind != "clip":
        raise UserError(f"{tower}: has no CLIP tower; give a LLaVA folder such as the demo's teacher")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ids = _write_tokenizer(language, folder, words=decoder.cfg.text.vocab_size)
    rows = -(-max(*(index + 1 for index in ids.values()), decoder.cfg.text.vocab_size) // _ROWS) * _ROWS
    normalize = _write_processor(tower, folder, side=vision.image_size, patches=vision.image_size // vision.patch_size)
    image, ends = ids.pop("image_token_id"), {key: ids[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tied = decoder.cfg.text.tie_embeddings
    config = {
        "model_type": "smolvlm",
        "architectures": ["SmolVLMForConditionalGeneration"],
        **ends,
        "image_token_id": image,
        "scale_factor": _JOINED,
        "tie_word_embeddings": tied,
        "text_config": {**read_json(language / "config.json"), **ends, "vocab_size": rows},
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.layers[0].sizes["mlp"],
            "num_hidden_layers": len(vision.layers),
            "num_attention_heads": vision.layers[0].mixer.q_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": vision.channel.activation,
            "layer_norm_eps": vision.block.norm_eps,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({**ends, "do_sample": False}, indent=2) + "\n")
    cfg = SMOLVLM.from_hf(config, None)
    small = init_params(cfg.with_layers(cfg.text.layers[:1]), jax.random.key(seed), jnp.float32)
    flat = {
        **flatten({"text": decoder.params["text"], "projector": small["projector"]}),
        **_without_first_norm(flatten({"vision": seeing.params["vision"]}), normalize),
    }
    for path in ("text/embed_tokens/weight", "text/lm_head/weight"):
        if path in flat:
            new = jnp.broadcast_to(flat[path].mean(0, keepdims=True), (rows - len(flat[path]), flat[path].shape[1]))
            flat[path] = jnp.concatenate([flat[path], new])
            if decoder.cfg.eos_token_ids:
                flat[path] = flat[path].at[ends["eos_token_id"]].set(flat[path][decoder.cfg.eos_token_ids[0]])
    save_file(_hf_tensors(cfg, flat), folder / "model.safetensors", metadata={"format": "pt"})


def write_upcycled(folder: Path, dense: Path, *, experts: int, top_k: int, noise: float, seed: int) -> None:
    """Write a LLaVA with experts from a LLaVA of Llama layers: every MLP becomes `experts` noisy copies.

    Routers are random. Queries and keys get norms (Qwen3's) of the size that they have for normal inputs.

    Args:
      folder: output folder; replaced.
      dense: folder of the dense model.
      noise: standard deviation of the noise on the copies, relative to that of each matrix.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(dense, folder)
    config = read_json(dense / "config.json")
    text = config["text_config"] | {"model_type": "qwen3_moe", "norm_topk_prob": True}
    config["text_config"] = text | {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": text["intermediate_size"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    cfg = detect(config, str(folder)).from_hf(config, None)
    old, flat = flatten(load(dense).params), flatten(init_params(cfg, jax.random.key(seed), jnp.float32))
    for number, path in enumerate(sorted(flat)):
        source = path.replace("/experts", "")
        if path in old:
            flat[path] = old[path]
        elif source in old:
            copies = jnp.repeat(old[source][:, None], experts, axis=1)
            drawn = jax.random.normal(jax.random.key(seed * len(flat) + number), copies.shape)
            flat[path] = copies + noise * jnp.std(old[source], axis=(1, 2), keepdims=True)[:, None] * drawn
        elif path.endswith("_norm/weight"):
            layer = path.split("/self_attn/")[0]
            into = old[path.replace("_norm", "_proj")] * old[f"{layer}/input_layernorm/weight"][:, None, None]
            scale = jnp.sqrt(jnp.mean(jnp.sum(into**2, -1), axis=(1, 2)))
            flat[path] = jnp.broadcast_to(scale[:, None], flat[path].shape)
    save_file(_hf_tensors(cfg, flat), folder / "model.safetensors", metadata={"format": "pt"})


def _without_first_norm(clip: Mapping[str, Any], normalize: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a flat CLIP tower to a SigLIP tower by folding its first norm into the patch embedding.

    LN(u) = g (u - mean u) / std u + b is linear except for std u, which is replaced by that of a white patch. For the
    demo's teacher, 95 % of the variance of the features remain (decision 89); training recovers the rest.
    """
    gain, shift = clip["vision/pre_layrnorm/weight"], clip["vision/pre_layrnorm/bias"]
    kernel, places = clip["vision/patch_embedding/weight"], clip["vision/position_embedding/weight"][1:]
    white = (1 - jnp.asarray(normalize["image_mean"])) / jnp.asarray(normalize["image_std"])
    scale = jnp.std(jnp.einsum("dchw,c->d", kernel, white))
    gone = ("class_embedding", "pre_layrnorm", "patch_embedding", "position_embedding")
    return {
        **{path: leaf for path, leaf in clip.items() if path.split("/")[1] not in gone},
        "vision/patch_embedding/weight": gain[:, None, None, None] * (kernel - kernel.mean(0, keepdims=True)) / scale,
        "vision/patch_embedding/bias": shift,
        "vision/position_embedding/weight": gain[None] * (places - places.mean(1, keepdims=True)) / scale,
        "vision/post_layernorm/weight": jnp.ones_like(gain),
        "vision/post_layernorm/bias": jnp.zeros_like(gain),
    }


def _tower_in_frames(llava: Path, frames: int) -> dict[str, Any]:
    """Return a LLaVA's CLIP tower as flat parameters of a Qwen3-VL tower, whose patches have `frames` equal frames."""
    normalize = read_json(llava / "preprocessor_config.json")
    flat = _without_first_norm(flatten({"vision": load(llava).params["vision"]}), normalize)
    flat = {path: leaf for path, leaf in flat.items() if path.split("/")[1] != "post_layernorm"}
    kernel = flat["vision/patch_embedding/weight"]
    return flat | {"vision/patch_embedding/weight": jnp.stack([kernel / frames] * frames, axis=2)}


def _write_processor(tower: Path, folder: Path, *, side: int, patches: int) -> dict[str, Any]:
    """Write a SmolVLM processor for unsplit images of one size; return LLaVA's normalisation, which it uses."""
    normalize = {key: read_json(tower / "preprocessor_config.json")[key] for key in ("image_mean", "image_std")}
    image = {
        "image_processor_type": "SmolVLMImageProcessor",
        "do_convert_rgb": True,
        "do_image_splitting": False,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        **normalize,
        "max_image_size": {"longest_edge": side},
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": side},
        "processor_class": "SmolVLMProcessor",
    }
    whole = {"processor_class": "SmolVLMProcessor", "image_seq_len": (patches // _JOINED) ** 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    (folder / "processor_config.json").write_text(json.dumps(whole, indent=2) + "\n")
    return normalize


def _write_tokenizer(language: Path, folder: Path, *, words: int) -> dict[str, int]:
    """Write a language model's tokenizer with SmolVLM's tokens from id `words` on; return token ids for config.json."""
    source = load_tokenizer(language)
    tokenizer: Tokenizer = source.backend_tokenizer
    start, end = SMOLVLM.templates[0].special
    # ids that the embeddings have and the tokenizer does not
    while tokenizer.get_vocab_size() < words:
        tokenizer.add_tokens([f"<unused{tokenizer.get_vocab_size()}>"])
    new = [start, *_TOKENS, end]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in new])
    # A prompt starts with the template's start token, not with the language model's own begin token.
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.save(str(folder / TOKENIZER))
    names = {"bos_token": start, "eos_token": end, "pad_token": source.pad_token or source.eos_token}
    marks = ("fake_image_token", "global_image_token", "image_token")
    tokens = {"end_of_utterance_token": end, **dict(zip(marks, _TOKENS, strict=True))}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "unk_token": source.unk_token,
        **tokens,
        "extra_special_tokens": tokens,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # version 4 adds token_type_ids, which no decoder takes
        "processor_class": "SmolVLMProcessor",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(SMOLVLM_CHAT, encoding="utf-8")
    everything = tokenizer.get_vocab()
    return {f"{name}_id": everything[token] for name, token in {**names, "image_token": IMAGE_TOKEN}.items()}


def _hf_tensors(cfg: ModelConfig, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return parameters as checkpoint tensors, with names that every transformers release can load."""
    slots = [slot for slot in make_slots(cfg, family_of(cfg)) if slot.path in flat]
    parameters = Weights(cfg, cfg, flat, {slot.name: slot for slot in slots})
    tensors = [parameters.tensor(key, group, "F32") for key, group in by_key(slots).items()]
    return {tensor.key: tensor.fetch().view(np.float32).reshape(tensor.shape) for tensor in tensors}
