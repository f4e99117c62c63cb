"""The folders that pretraining starts from: all at random, or a language model and a tower that never met."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer

from vlmprune_jax.checked_files import copy_file, read_json
from vlmprune_jax.config import ModelConfig
from vlmprune_jax.data.prompts import load_tokenizer
from vlmprune_jax.data.records import IMAGE_TOKEN
from vlmprune_jax.data.tokenizer_files import TOKENIZER
from vlmprune_jax.demo.vocabulary import CHAT_TEMPLATE, make_tokenizer
from vlmprune_jax.errors import UserError
from vlmprune_jax.families import family_of, templates
from vlmprune_jax.families.llava import LLAVA_HF
from vlmprune_jax.hf.disk.checkpoint import Checkpoint
from vlmprune_jax.hf.read import load
from vlmprune_jax.models.params import flatten, init_params, locate, param_axes

_ROWS = 64  # the vocabulary grows to a multiple of so many, as `resize_token_embeddings` of LLaVA's conversion has it
_ENDS = ("llava_v1", "bunny")  # templates without marks but the one that ends an answer: `</s>`, `<|endoftext|>`
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")


def write_random(folder: Path, architecture: Mapping[str, Any], records: Path, *, seed: int) -> None:
    """Write a whole `llava-hf` folder with random weights (and the blocks that stock models have above the feature)."""
    shutil.rmtree(folder, ignore_errors=True)
    vision = architecture["vision_config"]
    size = make_tokenizer(
        read_json(records, list[Any]), folder, image_size=vision["image_size"], patch_size=vision["patch_size"]
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    text = {**architecture["text_config"], **ids, "vocab_size": size}
    config = {**architecture, **ids, "image_token_index": 4, "text_config": text}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({**ids, "do_sample": False}, indent=2) + "\n")
    whole = LLAVA_HF.from_hf({**config, "vision_feature_layer": vision["num_hidden_layers"]}, None)
    tensors = _hf_tensors(whole, flatten(init_params(whole, jax.random.key(seed), jnp.float32)))
    for part, value in (("weight", 1.0), ("bias", 0.0)):
        tensors[f"vision_tower.vision_model.post_layernorm.{part}"] = np.full(vision["hidden_size"], value, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_joined(folder: Path, language: Path, tower: Path, *, seed: int) -> None:
    """Write a `llava-hf` folder of a pretrained language model behind a LLaVA's tower; the projector is at random.

    Args:
      folder: replaced.
      language: a decoder's folder. Its vocabulary gains the image's token; new rows of the embeddings are their mean.
      tower: a LLaVA folder, for its tower (all blocks) and its image processor.
      seed: of the projector.

    Raises:
      UserError: see `load`; `language` is no decoder, or its tokenizer has no token that a template ends answers with.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    decoder = load(language)
    if decoder.cfg.vision is not None:
        raise UserError(f"{language}: has a vision tower of its own; give a language model")
    ids = _write_tokenizer(language, folder, words=decoder.cfg.text.vocab_size)
    source, own = read_json(tower / "config.json"), read_json(language / "config.json")
    image = ids.pop("image_token_id")
    rows = -(-(max(image, decoder.cfg.text.vocab_size - 1) + 1) // _ROWS) * _ROWS
    text = {**own, **ids, "vocab_size": rows}
    config = {
        **source,
        **ids,
        "image_token_index": image,
        "text_config": text,
        "tie_word_embeddings": decoder.cfg.text.tie_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({**ids, "do_sample": False}, indent=2) + "\n")
    for name in _PROCESSOR:
        copy_file(tower / name, folder / name, tower)
    tensors = {**_text_and_projector(decoder.params, config, seed), **_tower(tower)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _text_and_projector(params: Mapping[str, Any], config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    cfg = LLAVA_HF.from_hf(config, None)
    small = init_params(cfg.with_layers(cfg.text.layers[:1]), jax.random.key(seed), jnp.float32)
    flat = flatten({"text": params["text"], "projector": small["projector"]})
    for path in ("text/embed_tokens/weight", "text/lm_head/weight"):
        if path in flat:
            rows = flat[path]
            new = jnp.broadcast_to(rows.mean(0, keepdims=True), (cfg.text.vocab_size - len(rows), rows.shape[1]))
            flat[path] = jnp.concatenate([rows, new])
    return _hf_tensors(cfg, flat)


def _tower(folder: Path) -> dict[str, np.ndarray]:
    source = Checkpoint(folder)
    return {key: np.ascontiguousarray(source[key]) for key in source if key.startswith("vision_tower.")}


def _write_tokenizer(language: Path, folder: Path, *, words: int) -> dict[str, int]:
    """Write a language model's tokenizer with the image's token, behind `words` others; returns ids as in configs."""
    source = load_tokenizer(language)
    tokenizer: Tokenizer = source.backend_tokenizer
    known = source.get_vocab()
    ends = [templates()[name].assistant_end for name in _ENDS]
    end = next((end for end in ends if end in known), None)
    if end is None:
        raise UserError(f"{language}: its tokenizer has none of {', '.join(ends)}, which end an answer")
    # ids that the embeddings have and the tokenizer does not
    while IMAGE_TOKEN not in known and tokenizer.get_vocab_size() < words:
        tokenizer.add_tokens([f"<unused{tokenizer.get_vocab_size()}>"])
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    tokenizer.save(str(folder / TOKENIZER))
    names = {"bos_token": source.bos_token or end, "eos_token": end, "pad_token": source.pad_token or end}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "image_token": IMAGE_TOKEN,
        **names,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "processor_class": "LlavaProcessor",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("</s>", end), encoding="utf-8")
    everything = tokenizer.get_vocab()
    return {f"{name}_id": everything[token] for name, token in {**names, "image_token": IMAGE_TOKEN}.items()}


def _hf_tensors(cfg: ModelConfig, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Checkpoint tensors of these params of a model, under the names that every transformers release reads."""
    axes, tensors = param_axes(cfg), {}
    for weight in family_of(cfg).weights(cfg):
        for i, path, index in locate(cfg, weight.path):
            if path not in flat:
                continue
            line = weight if i is None else weight.at(i)
            array = np.asarray(flat[path] if index is None else flat[path][index])
            names = axes[path] if index is None else axes[path][1:]
            key = line.key.replace("vision_tower.", "vision_tower.vision_model.")
            tensors[key] = np.ascontiguousarray(einops.rearrange(array, f"{' '.join(names)} -> {line.layout}"))
    return tensors
