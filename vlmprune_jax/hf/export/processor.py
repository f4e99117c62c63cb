"""Processor, chat template and generation config of an export in a transformers layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmprune_jax.config import ModelConfig
from vlmprune_jax.data.templates import Template, template_of
from vlmprune_jax.data.tiling import tiling_from_chat_config
from vlmprune_jax.errors import UserError
from vlmprune_jax.families.table import JsonDict
from vlmprune_jax.families.towers import vision_of
from vlmprune_jax.hf.export.tokenizer import prefixes_only_the_start, token_id, write_tokenizer
from vlmprune_jax.readers import read_json

# The token that each hub family's transformers processor needs beside the source's own.
NEW_TOKENS = {"llava": "<image>", "bunny": "<image>", "internvl": "<video>"}
# Mean and deviation of each tower's training images (openai/clip, google/siglip, ImageNet).
_PIXELS = {
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "internvit": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}
_BICUBIC = 3


def write_processor(folder: Path, source: Path, cfg: ModelConfig, config: JsonDict, tokenizer: JsonDict) -> None:
    """Everything between a chat and the model's inputs, for the processor class of a transformers layout.

    Args:
      folder: where the files go.
      source: the hub folder, for what its tokenizer's config says.
      cfg: the model in its hub layout.
      config: the hub's config.json.
      tokenizer: the content of tokenizer.json, with the new token.
    """
    template = template_of(cfg.family, config)
    if cfg.family == "internvl":
        start, context, end = template.image_tokens or ("", "", "")
        named = {"start_image_token": start, "end_image_token": end, "context_image_token": context}
        named["video_token"] = NEW_TOKENS[cfg.family]
        processor: JsonDict = {"processor_class": "InternVLProcessor", "image_seq_length": cfg.tokens_per_image}
        files = {
            "preprocessor_config.json": _tiles(cfg, config),
            "video_preprocessor_config.json": _frames(cfg),
        }
        image = f"{context}\n"
    else:
        named = {"image_token": NEW_TOKENS[cfg.family]}
        vision = vision_of(cfg)
        processor = {
            "processor_class": "LlavaProcessor",
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": int(vision.class_token),
            "vision_feature_select_strategy": "default" if cfg.feature_select == "patch" else "full",
            "image_token": named["image_token"],
        }
        files = {"preprocessor_config.json": _squares(cfg, config)}
        # The reference tokenises the text behind an image on its own, so it begins with a space mark.
        gap = " " if prefixes_only_the_start(tokenizer) else ""
        image = f"{named['image_token']}{gap}\n"
    write_tokenizer(folder, source, tokenizer, named, processor["processor_class"])
    for name, value in (files | {"processor_config.json": processor}).items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template(template, image), encoding="utf-8")
    generation = _generation_config(source, cfg, template, tokenizer)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _squares(cfg: ModelConfig, config: Mapping[str, Any]) -> JsonDict:
    """LLaVA's and Bunny's images: padded to a square of the mean colour where the config says so, then resized."""
    vision = vision_of(cfg)
    mean, std = _PIXELS[vision.kind]
    side = {"height": vision.image_size, "width": vision.image_size}
    crops = vision.kind == "clip"
    return {
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_pad": config.get("image_aspect_ratio") == "pad",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": vision.image_size} if crops else side,
        "resample": _BICUBIC,
        "do_center_crop": crops,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def _tiles(cfg: ModelConfig, config: Mapping[str, Any]) -> JsonDict:
    """InternVL's images: cut into tiles of the grid that fits best, and the whole image as one more.

    Raises:
      UserError: what the config asks for is nothing that transformers' image processor does.
    """
    tiling = tiling_from_chat_config(config, "config.json")
    for field, lost in (("use_thumbnail", tiling.max_tiles > 1 and not tiling.thumbnail), ("pad2square", tiling.pad)):
        if lost:
            raise UserError(
                f"config.json: {field} {json.dumps(config.get(field))} is nothing that transformers' InternVLProcessor "
                'can do: export with layout="source"'
            )
    return {
        **_frames(cfg),
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": tiling.max_tiles > 1,
        "min_patches": tiling.min_tiles,
        "max_patches": tiling.max_tiles,
    }


def _frames(cfg: ModelConfig) -> JsonDict:
    vision = vision_of(cfg)
    mean, std = _PIXELS[vision.kind]
    return {
        "video_processor_type": "InternVLVideoProcessor",
        "processor_class": "InternVLProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def _generation_config(source: Path, cfg: ModelConfig, template: Template, tokenizer: JsonDict) -> JsonDict:
    """The source's, with the mark that ends the family's answers among the ids that end a text."""
    path = source / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    end = token_id(tokenizer, template.assistant_end.strip())
    stated = config.get("eos_token_id")
    stated = cfg.eos_token_ids if stated is None else stated if isinstance(stated, list) else (stated,)
    ids = list(dict.fromkeys([*([] if end is None else [end]), *stated]))
    config |= {"eos_token_id": ids[0] if len(ids) == 1 else ids} if ids else {}
    for name, value in (("bos_token_id", cfg.bos_token_id), ("pad_token_id", cfg.pad_token_id)):
        if value is not None:
            config.setdefault(name, value)
    return config


def chat_template(template: Template, image: str) -> str:
    """The family's prompt (data/prompts.py `render`) as a Jinja template; `image` is what stands for one image.

    A message's content is a string or a list of image and text parts. The family's system text is used unless the
    first message is a system message.
    """

    def literal(text: str) -> str:
        return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"

    parts = "message['content'] if message['content'] is not string else [{'type': 'text', 'text': message['content']}]"
    images = "{%- for part in parts if part['type'] == 'image' -%}" + literal(image) + "{%- endfor -%}"
    texts = "{%- for part in parts if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    stripped = "{%- set text -%}" + texts + "{%- endset -%}"
    # as the reference does: only beside an image
    trimmed = "{{ text | trim if parts | selectattr('type', 'equalto', 'image') | list else text }}"
    trimmed = trimmed if template.image_first else "{{ text }}"
    system = literal(template.system_start), literal(template.system_end)
    gap = template.gap
    return "".join([
        "{%- if not messages or messages[0]['role'] != 'system' -%}",
        system[0], literal(template.system), system[1], "{%- endif -%}",
        "{%- for message in messages -%}", "{%- set parts = ", parts, " -%}", stripped,
        "{%- if message['role'] == 'system' -%}", system[0], "{{ text }}", system[1],
        "{%- elif message['role'] == 'user' -%}", literal(template.user + gap), images, trimmed,
        literal(template.user_end),
        "{%- else -%}", literal(template.assistant + gap), "{{ text }}", literal(template.assistant_end),
        "{%- endif -%}", "{%- endfor -%}",
        "{%- if add_generation_prompt -%}", literal(template.assistant), "{%- endif -%}",
    ])  # fmt: skip
