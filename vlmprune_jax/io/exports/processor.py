"""Processor, chat template and generation config of an export in a transformers layout."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.io.checkpoints.read import read_fields
from vlmprune_jax.io.data.images import limited_files
from vlmprune_jax.io.exports.tokenizer import prefixes_only_the_start, token_id, write_tokenizer
from vlmprune_jax.io.exports.vocabulary import copy_without_weights
from vlmprune_jax.io.families import family_of, target_of, template_of
from vlmprune_jax.io.families.table import JsonDict
from vlmprune_jax.io.families.templates import Template


@contextlib.contextmanager
def limited_images(source: Path, most: int | None, cfg: ModelConfig) -> Iterator[Path]:
    """Context that yields a folder whose processor limits image tokens: `source`, or a changed copy without weights.

    `most`: maximum tokens per image (None = no change). Raises UserError if the model's images cannot be limited so.
    """
    if most is None:
        yield source
        return
    with error_context(f"export.max_image_tokens={most}"):
        if cfg.vision is None:
            raise UserError("this model takes no images: unset the limit")
        changed = limited_files(source, most, cfg.tokens_per_image)
    with tempfile.TemporaryDirectory(prefix="vlmprune-") as folder:
        copy_without_weights(source, Path(folder))
        for name, content in changed.items():
            (Path(folder) / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        yield Path(folder)


def write_processor(folder: Path, source: Path, cfg: ModelConfig, config: JsonDict, tokenizer: JsonDict) -> None:
    """Write tokenizer, image processor, chat template and generation config as transformers' processors expect them.

    `source`, `cfg` and `config`: folder, model config and config.json in the hub layout. `tokenizer`: content of
    tokenizer.json with the new image token.
    """
    family = family_of(cfg)
    target, conversion, template = target_of(family), family.conversion, template_of(family, config, None)
    make = None if target is None or target.stock is None else target.stock.processor
    assert make is not None
    assert conversion is not None
    processor = make(cfg, config, template, conversion.new_token)
    # The reference tokenises the text after an image separately, so it begins with a space mark.
    alone = template.image_tokens is None and prefixes_only_the_start(tokenizer)
    image = f"{processor.image}{' ' if alone else ''}\n"
    name = processor.files["processor_config.json"]["processor_class"]
    write_tokenizer(folder, source, tokenizer, processor.tokens, name)
    for file, value in processor.files.items():
        (folder / file).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    video = "" if template.video is None or conversion.marks_images else f"{conversion.new_token}\n"
    (folder / "chat_template.jinja").write_text(chat_template(template, image, video), encoding="utf-8")
    generation = _generation_config(source, cfg, template, tokenizer)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _generation_config(source: Path, cfg: ModelConfig, template: Template, tokenizer: JsonDict) -> JsonDict:
    """Return the source's generation config, with the end token of answers as its eos token."""
    path = source / "generation_config.json"
    config: dict[str, Any] = read_fields(path) if os.path.lexists(path) else {}
    end = token_id(tokenizer, template.assistant_end.strip())
    stated = config.get("eos_token_id")
    stated = cfg.eos_token_ids if stated is None else stated if isinstance(stated, list) else (stated,)
    ids = list(dict.fromkeys([*([] if end is None else [end]), *stated]))
    config |= {"eos_token_id": ids[0] if len(ids) == 1 else ids} if ids else {}
    for name, value in (("bos_token_id", cfg.bos_token_id), ("pad_token_id", cfg.pad_token_id)):
        if value is not None:
            config.setdefault(name, value)
    return config


def chat_template(template: Template, image: str, video: str = "") -> str:
    """Return the prompt format as a Jinja chat template; `image`, `video`: text that stands for one image or video.

    A message's content is a string or a list of image, video and text parts. The family's system prompt is used unless
    the first message is a system message.
    """

    def literal(text: str) -> str:
        return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"

    items = "message['content'] if message['content'] is not string else [{'type': 'text', 'text': message['content']}]"
    marks = ("{%- if part['type'] == '" + kind + "' -%}" for kind in ("image", "video"))
    marks = (mark + literal(text) + "{%- endif -%}" for mark, text in zip(marks, (image, video), strict=True) if text)
    images = "{%- for part in parts -%}" + "".join(marks) + "{%- endfor -%}"
    texts = "{%- for part in parts if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    stripped = "{%- set text -%}" + texts + "{%- endset -%}"
    # as the reference does: only beside an image
    trimmed = "{{ text | trim if parts | selectattr('type', 'equalto', 'image') | list else text }}"
    trimmed = trimmed if template.image_first else "{{ text }}"
    system = literal(template.system_start), literal(template.system_end)
    gap = template.gap
    start = literal(template.start) if template.start else ""
    default = system[0] + literal(template.system) + system[1] if template.system else ""
    return "".join([
        start, "{%- if not messages or messages[0]['role'] != 'system' -%}", default, "{%- endif -%}",
        "{%- for message in messages -%}", "{%- set parts = ", items, " -%}", stripped,
        "{%- if message['role'] == 'system' -%}", system[0], "{{ text }}", system[1],
        "{%- elif message['role'] == 'user' -%}", literal(template.user + gap), images, trimmed,
        literal(template.user_end),
        "{%- else -%}", literal(template.assistant + gap), "{{ text }}", literal(template.assistant_end),
        "{%- endif -%}", "{%- endfor -%}",
        "{%- if add_generation_prompt -%}", literal(template.assistant), "{%- endif -%}",
    ])  # fmt: skip
