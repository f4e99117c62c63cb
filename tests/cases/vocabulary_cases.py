"""Tiny models with tokenizers that have something to trim."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

from decoder_cases import PHI
from hf_cases import LFM2_VL, LLAMA, make_folder, make_vlm_folder
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from vlm_cases import gemma3_config, internvl_chat_config, llava_config, qwen_vl_config, smolvlm_config

from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune import PrunePlan, VocabularyConfig, fingerprint, keep_everything
from vlmprune_jax.io.checkpoints.read import open_model
from vlmprune_jax.io.exports.token_sources import choose_vocabulary

TOPICS = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
SPECIAL = {
    "llama": ("<s>", "</s>", "<pad>"),
    "phi": ("<s>", "</s>", "<pad>"),
    "llava": ("<s>", "</s>", "<pad>", "<image>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>",
                *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))),
    "qwen3_vl": ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"),
    "qwen2_5_vl": ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>",
                   "<|video_pad|>"),
    "lfm2_vl": ("<|im_start|>", "<|im_end|>", "<pad>", "<image>", "<|image_start|>", "<|image_end|>",
                "<|img_thumbnail|>"),
    "gemma3": ("<bos>", "<end_of_turn>", "<start_of_turn>", "<image_soft_token>", "<start_of_image>", "<end_of_image>"),
    "internvl_chat": ("<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<img>", "</img>", "<IMG_CONTEXT>"),
}  # fmt: skip
FAMILIES = tuple(SPECIAL)

LEARNT, ROWS = 600, 640  # learnt tokens and rows of the embedding: the special tokens follow, then padding


@functools.cache
def _learnt() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=LEARNT, show_progress=False)
    tokenizer.train_from_iterator(TOPICS, trainer)
    return tokenizer.to_str()


def _config(name: str) -> dict[str, Any]:
    own = {"llama": LLAMA, "phi": PHI, "lfm2_vl": LFM2_VL, "llava": llava_config("llama", "clip")}
    own |= {
        "gemma3": gemma3_config(),
        "smolvlm": smolvlm_config("llama"),
        "internvl_chat": internvl_chat_config("qwen2"),
    }
    return copy.deepcopy(own[name] if name in own else qwen_vl_config(name))


def tokenized_folder(folder: Path, name: str) -> Path:
    """A folder with random weights and a tokenizer of 600 learnt tokens and the family's special ones."""
    tokenizer = Tokenizer.from_str(_learnt())
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL[name]])
    ids = {text: tokenizer.token_to_id(text) for text in SPECIAL[name]}
    config, image = _config(name), next((i for text, i in ids.items() if "image" in text or "CONTEXT" in text), None)
    image = ids.get("<image>", ids.get("<|image_pad|>", image))
    special = [*ids.values()]
    fields = {"vocab_size": ROWS, "bos_token_id": special[0], "eos_token_id": special[1], "pad_token_id": special[2]}
    for section in (config.get("text_config"), config.get("llm_config"), config):
        if isinstance(section, dict) and ("vocab_size" in section or section is not config):
            section |= fields
    if name != "internvl_chat" and "vision_config" in config:
        config["image_token_index" if name == "llava" else "image_token_id"] = image
    if name.startswith("qwen"):
        config |= {f"{what}_token_id": ids[f"<|{what}|>"] for what in ("vision_start", "vision_end")}
        config["video_token_id"] = ids["<|video_pad|>"]
    (make_vlm_folder if "vision_config" in config else make_folder)(folder, config)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[name][0], "eos_token": SPECIAL[name][1], "pad_token": SPECIAL[name][2]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    generation = {"eos_token_id": special[:2], "pad_token_id": special[2], "suppress_tokens": [599, special[0]]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def vocabulary_plan(folder: Path, sources: Path, size: int, multiple: int = 8) -> PrunePlan:
    """A plan that trims the vocabulary of a folder and nothing else."""
    model = open_model(folder)
    config = VocabularyConfig(size=size, sources=(str(sources),), multiple=multiple, source_dir=str(folder))
    plan = keep_everything(model.cfg, fingerprint(model), count_params(model.cfg))
    plan = plan.trimming(choose_vocabulary(model.cfg, config))
    return dataclasses.replace(plan, parameters_after=count_params(plan.apply_to(model.cfg)))


def texts_file(path: Path, texts: list[str]) -> Path:
    """A JSON list of texts."""
    path.write_text(json.dumps(texts))
    return path
