"""The demo teacher's tokenizer and processor files: every word of the data set is one token, anything else is bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.families.templates import LLAVA_V1

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")  # ids 0..4
MAX_VOCABULARY = 512
_MODEL_MAX_LENGTH = 2048

# LLaVA v1 without its system prompt. Unlike the template on the hub, an answer ends with </s> and the next round
# follows at once: that is how rounds look in training, so a second question meets the context the model knows.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('this template has no system prompt') }}{% endif %}"
    "{{ 'ASSISTANT: ' if message['role'] == 'assistant' else 'USER: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# SmolVLM's template: one start token, then role names, and images before a turn's text without white space.
SMOLVLM_CHAT = (
    "<|im_start|>"
    "{% for message in messages %}"
    "{% set parts = message['content'] %}"
    "{{ message['role'] | capitalize }}"
    "{{ ':' if parts is not string and parts[0]['type'] == 'image' else ': ' }}"
    "{% if parts is string %}{{ parts }}{% else %}"
    "{% for part in parts %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<end_of_utterance>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


# Qwen3-VL's template, for texts, images and videos.
QWEN_CHAT = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' }}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN_TOKENS = {
    "pad": "<|endoftext|>",
    "eos": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}


def make_tokenizer(records: Iterable[Mapping[str, Any]], out_dir: Path, *, image_size: int, patch_size: int) -> int:
    """Write tokenizer and LLaVA processor files for `records` (LLaVA JSON records) and return the vocabulary size.

    Byte-level BPE without merges: a word that occurs in the records or in LLaVA's template is one token (its leading
    space belongs to it), any other text falls back to its bytes, and `<s>` is put in front. Words get ids by
    falling frequency, so that equal records give equal ids.

    Raises:
      UserError: there are more than MAX_VOCABULARY tokens.
    """
    texts = Counter([LLAVA_V1.system + " USER:", "USER:", " ASSISTANT:", " Describe", " image."])
    for record in records:
        for turn in record["conversations"]:
            text = turn["value"]
            texts[text.removeprefix("<image>") if text.startswith("<image>") else f" {text}"] += 1
            if turn["from"] == "human":  # a question may come without its image, or as a later turn
                texts[" " + text.removeprefix("<image>\n")] += 1
    # split text where the tokenizer will: after a role's colon, after `<image>` and a newline, after `</s>`
    size = _write_words(texts, SPECIAL_TOKENS, out_dir, begin="<s>", unknown="<unk>")
    for name, content in _side_files(image_size, patch_size).items():
        (out_dir / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out_dir / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return size


def make_qwen_tokenizer(
    records: Iterable[Mapping[str, Any]],
    out_dir: Path,
    vision: Mapping[str, Any],
    *,
    least: int,
    most: int,
    clip: int = 0,
) -> tuple[int, dict[str, int]]:
    """Write tokenizer and processor files of a Qwen3-VL for images of `least` to `most` pixels.

    `clip`: maximum pixels of all frames of a video, of which 4 per second are sampled (0: no video processor). Words
    are tokens as in `make_tokenizer`. Returns the vocabulary size and the ids of the special tokens, by the names that
    config.json has for them.
    """
    texts = Counter(["user\n", "assistant\n", " Describe the image.", *[" seconds"] * bool(clip)])
    for record in records:
        for turn in record["conversations"]:
            text = turn["value"].removeprefix("<image>\n").removeprefix("<video>\n")
            texts.update([text, f" {text}"])
    special = ("<|im_start|>", *_QWEN_TOKENS.values())
    size = _write_words(texts, special, out_dir, begin=None, unknown=None)
    for name, content in _qwen_side_files(vision, least, most, clip).items():
        (out_dir / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out_dir / "chat_template.jinja").write_text(QWEN_CHAT, encoding="utf-8")
    return size, {name: special.index(token) for name, token in _QWEN_TOKENS.items()}


def _write_words(
    texts: Counter[str], special: Sequence[str], out_dir: Path, *, begin: str | None, unknown: str | None
) -> int:
    """Write tokenizer.json with a token per special token, byte and word of `texts`; return the vocabulary size."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    counts: Counter[str] = Counter()
    for text, number in texts.items():
        for word, _ in pre_tokenizer.pre_tokenize_str(text):
            counts[word] += number
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if len(word) > 1]
    tokens = [*special, *alphabet, *words]
    if len(tokens) > MAX_VOCABULARY:
        raise UserError(f"make_tokenizer: {len(tokens)} tokens, limit {MAX_VOCABULARY}: use records of fewer words")
    # ignore_merges looks a whole word up before any merge: one entry per word, no intermediate pieces.
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token=unknown, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, special.index(begin))]
        )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    return len(tokens)


def _side_files(image_size: int, patch_size: int) -> dict[str, dict[str, Any]]:
    """Return the files beside `tokenizer.json` from which transformers 4.57 and 5.x build a LlavaProcessor."""
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    added = {
        str(index): {"content": token, "lstrip": False, "rstrip": False, "normalized": False, "special": True,
                     "single_word": False}
        for index, token in enumerate(SPECIAL_TOKENS)
    }  # fmt: skip
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": added,
            "extra_special_tokens": {"image_token": "<image>"},
            "image_token": "<image>",
            **names,
            "model_max_length": _MODEL_MAX_LENGTH,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "processor_class": "LlavaProcessor",
        },
        "special_tokens_map.json": names,
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": image_size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": image_size, "width": image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": patch_size,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": "<image>",
        },
    }


def _qwen_side_files(vision: Mapping[str, Any], least: int, most: int, clip: int) -> dict[str, dict[str, Any]]:
    """Return the files beside `tokenizer.json` from which transformers 4.57 and 5.x build a Qwen3VLProcessor."""
    steps = {
        "patch_size": vision["patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    images = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor"}
    videos = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"shortest_edge": least, "longest_edge": clip},
        "fps": 4,
        "min_frames": 2,
        "max_frames": 32,
    }
    files = {"video_preprocessor_config.json": {**videos, **steps}} if clip else {}
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": _QWEN_TOKENS["eos"],
            "pad_token": _QWEN_TOKENS["pad"],
            "extra_special_tokens": {f"{name}_token": _QWEN_TOKENS[name] for name in ("image", "video")},
            "model_max_length": _MODEL_MAX_LENGTH,
            "clean_up_tokenization_spaces": False,
            "processor_class": "Qwen3VLProcessor",
        },
        "preprocessor_config.json": {**images, "min_pixels": least, "max_pixels": most, **steps},
        **files,
    }
