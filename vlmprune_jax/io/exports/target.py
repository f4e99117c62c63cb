"""Target of an exported folder: its layout and config.json, the processor of another layout, and files to copy."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.core.limits import first_unmet, why_no_class
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.io.checkpoints.disk.checkpoint import without_storage
from vlmprune_jax.io.checkpoints.read import read_fields
from vlmprune_jax.io.data.patching import DEFAULT_BUDGET
from vlmprune_jax.io.data.processor_files import processor_settings
from vlmprune_jax.io.exports.card import LOADER_FILE, LOADER_MODULE, LOADER_PREFIX, TEMPLATES, loader_class
from vlmprune_jax.io.exports.formats import FolderOptions
from vlmprune_jax.io.exports.vocabulary import (
    add_token,
    copy_files,
    prefixes_only_the_start,
    read_tokenizer,
    token_ids,
    write_tokenizer,
)
from vlmprune_jax.io.exports.weights import padded_stacks, with_head_dim
from vlmprune_jax.io.families import Family, detect, family_of, target_of, template_of
from vlmprune_jax.io.families.decoders import decoder_of
from vlmprune_jax.io.families.limits import limits_of
from vlmprune_jax.io.families.table import JsonDict
from vlmprune_jax.io.families.templates import Template
from vlmprune_jax.io.families.towers import projector_of, stock_tower, vision_of

# Files that make a folder usable, beside weights and config.json.
_INDEX = ("*.index.json",)
_ALWAYS = ("LICENSE*", "NOTICE*", "USE_POLICY*", "plan.json")
_SAME_LAYOUT = (
    "*token*.json", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "special_tokens_map.json",
    "generation_config.json", "*processor_config.json", "chat_template*", "*.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Target of an export: family, model config and config.json of the folder to write.

    Attributes:
      cfg: the model with padded layers and new vocabulary rows.
      converts: True if the layout differs from the source folder's.
      tokenizer: content of tokenizer.json for a converted folder, if the source has a tokenizer.
    """

    family: Family
    cfg: ModelConfig
    config: JsonDict
    converts: bool
    tokenizer: JsonDict | None = None


def make_target(cfg: ModelConfig, source: Path, options: FolderOptions) -> Target:
    """Return the family and configs of the exported folder, for a model loaded from `source`.

    Raises UserError if the source has another family, or the options do not fit the model.
    """
    if options.uneven == "refuse":
        widths = (limit for limit in limits_of(cfg, "transformers") if limit.equal or limit.component == "vision")
        if (problem := first_unmet(widths, cfg)) is not None:
            raise UserError(f'uneven="refuse": transformers could not load the export: {problem}')
    family, config = family_of(cfg), without_storage(read_fields(source / "config.json"))
    if detect(config, str(source / "config.json")) is not family:
        raise UserError(
            f"{source}: is not the folder from which this {family.name} model ({family.layout} layout) was loaded"
        )
    rows = family.text_config(config).get("vocab_size", cfg.text.vocab_size)
    if rows != cfg.text.vocab_size:
        raise UserError(
            f"{source}: has a vocabulary of {rows:,} rows, but the model has {cfg.text.vocab_size:,}: pass the plan "
            "that trimmed the vocabulary (plan=), or the folder that this model was loaded from"
        )
    wide = with_head_dim(padded_stacks(cfg) if options.uneven == "pad" else cfg, options.head_dim)
    one_shape = wide.text.uniform and wide.text.attentions
    if not one_shape and (problem := why_no_class(wide)) is not None:
        raise UserError(f"transformers could not load the export: {problem}")
    new_family, conversion = target_of(family) if options.layout == "transformers" else None, family.conversion
    tokenizer = None
    if new_family is not None and conversion is not None:
        family, tokenizer = new_family, read_tokenizer(source)
        ids = {"image": cfg.text.vocab_size} if tokenizer is None and conversion.marks_images else {}
        if tokenizer is not None:
            tokenizer, ids["new"] = add_token(tokenizer, conversion.new_token)
        image = next(iter(ids.values())) if conversion.marks_images else cfg.image_token_id
        assert image is not None
        written = to_transformers(wide, config, image, rows_for(cfg, ids))
        wide = family.from_hf(written, None)
    else:
        written = family.to_hf(wide, without_loader(config))
        if not family.separate_vision:  # else config.json does not describe the tower
            family = detect(written, "the new config.json")  # perhaps of another decoder, which holds these layers
            wide = family.from_hf(written, None)
    if family.budget_field and (settings := processor_settings(source)) is not None:
        budget = {family.budget_field: settings[0].get("max_soft_tokens") or DEFAULT_BUDGET}
        written = {**written, "vision_config": written["vision_config"] | budget}
    if family.layout == "transformers" and not wide.text.uniform:
        written = with_loader(written, cfg.text, family)
    return Target(family, wide, _with_dtype(written, options.dtype, family), new_family is not None, tokenizer)


def _with_dtype(config: JsonDict, dtype: str, family: Family) -> JsonDict:
    """Return config.json with another weight data type in its field `torch_dtype` or `dtype`."""
    if dtype == "source":
        return config
    result = dict(config)
    for name in (family.text_section, "vision_config"):
        if name is not None and isinstance(result.get(name), dict):
            result[name] = {k: dtype if k in ("dtype", "torch_dtype") else v for k, v in result[name].items()}
    names = [name for name in ("dtype", "torch_dtype") if name in result] or ["torch_dtype"]
    return result | dict.fromkeys(names, dtype)


def with_loader(config: JsonDict, text: TextConfig, family: Family) -> JsonDict:
    """Return config.json for a model with unequal layers: per-layer widths, and the model's class in the loader file.

    Config classes validate nominal head counts: Llama's must divide `hidden_size`, and Phi-3's LongRoPE needs one
    factor per frequency of hidden_size / heads. The nominal counts, to which no layer is wider, are therefore the next
    valid numbers.
    """
    assert family.stock is not None
    inner = family.text_config(config)
    if decoder_of(inner["model_type"]).heads_divide:
        fits = [n for n in range(inner["num_attention_heads"], text.hidden_size + 1) if text.hidden_size % n == 0]
        whole = text.hidden_size // text.attention.head_dim
        inner["num_attention_heads"] = heads = whole if whole in fits else fits[0]
        if heads % inner["num_key_value_heads"]:
            inner["num_key_value_heads"] = heads
    config = dict(inner) if family.text_section is None else {**config, family.text_section: inner}
    auto, stock = family.stock.auto, LOADER_PREFIX + family.stock.name
    others = {name: value for name, value in (config.get("auto_map") or {}).items() if name != auto}
    auto_map = others | {auto: f"{LOADER_MODULE}{stock}"}
    return {**config, "architectures": [stock], "auto_map": auto_map}


def without_loader(config: JsonDict) -> JsonDict:
    """Return config.json for the stock class (undoes `with_loader`)."""
    result, auto_map = dict(config), config.get("auto_map") or {}
    remaining = {name: value for name, value in auto_map.items() if not str(value).startswith(LOADER_MODULE)}
    if remaining:
        result["auto_map"] = remaining
    elif auto_map:
        del result["auto_map"]
    if config.get("architectures"):
        result["architectures"] = [name.removeprefix(LOADER_PREFIX) for name in config["architectures"]]
    return result


def write_files(target: Target, cfg: ModelConfig, source: Path, folder: Path) -> None:
    """Write all files of an exported folder except weights: config, tokenizer, processor, template, loader file."""
    (folder / "config.json").write_text(json.dumps(target.config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    code = ("*.py",) if "auto_map" in target.config else ()
    if not target.converts:
        copy_files(source, folder, (*_SAME_LAYOUT, *code), _INDEX)
    if target.tokenizer is not None:
        write_processor(folder, source, cfg, read_fields(source / "config.json"), target.tokenizer)
    if loader_class(target.config) is not None:
        shutil.copyfile(Path(__file__).parent / "remote" / LOADER_FILE, folder / LOADER_FILE)


def copy_always(source: Path, folder: Path, plan: PrunePlan | None) -> None:
    """Copy licence files to an export, and write plan.json (from `plan`, otherwise a copy of the source's)."""
    copy_files(source, folder, _ALWAYS, _INDEX)
    if plan is not None:
        plan.to_json(folder / "plan.json")


# New vocabularies are padded to a multiple, as llava-hf does (32,002 words in 32,064 rows).
VOCAB_MULTIPLE = 64
# Fields of hub configs that a text_config does not have.
_NOT_TEXT = re.compile(
    r"(mm|tune|freeze|unfreeze|image|tokenizer|use_mm|use_im|use_s2)_.*|.*_projector.*|_.*|architectures|auto_map|"
    r"model_type|attn_implementation|transformers_version|(torch_)?dtype|max_length|pretraining_tp|s2_.*|continuous_.*|"
    r"vision_config|per_layer_shapes|vocab_size|tie_word_embeddings"
)


def rows_for(cfg: ModelConfig, ids: Mapping[str, int]) -> int:
    """Return the number of vocabulary rows that an export needs, including those of new special tokens."""
    needed = max((cfg.text.vocab_size, *(token + 1 for token in ids.values())))
    if needed > 2 * cfg.text.vocab_size + VOCAB_MULTIPLE:
        raise UserError(
            f"the tokenizer has token id {needed - 2:,}, but the model has {cfg.text.vocab_size:,} tokens: use "
            "the tokenizer of this model"
        )
    return cfg.text.vocab_size if needed == cfg.text.vocab_size else -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def to_transformers(cfg: ModelConfig, source: JsonDict, image_token_id: int, vocab_size: int) -> JsonDict:
    """Return the transformers config.json for a model whose original hub config is `source`.

    The vision tower in the result ends at the last computed block, whose output is the image feature.
    """
    family = target_of(family_of(cfg))
    assert family is not None
    stock, section = family.stock, family.text_section
    assert stock is not None
    assert section is not None
    vision, missing = vision_of(cfg), stock.lacks(cfg)
    size = 0 if vision.positions is None else vision.positions.image_size
    if missing is None and size not in (0, vision.image_size):
        missing = f"images of another size ({vision.image_size}) than its tower's positions ({size})"
    elif missing is None and cfg.text.head_bias:
        missing = "a bias in its output head (none)"
    if missing is not None:
        raise UserError(
            f'layout "transformers": transformers\' {cfg.family} class does not support {missing}: use layout "source"'
        )
    text = family_of(cfg).text_config(source)
    text = {name: value for name, value in text.items() if not _NOT_TEXT.fullmatch(name)}
    text |= {
        "model_type": cfg.text.decoder,
        "vocab_size": vocab_size,
        "tie_word_embeddings": cfg.text.tie_embeddings,
    }
    if cfg.text.rope.kind == "longrope":
        # "su" is the hub's older name; transformers 4 wants these three fields and no more
        scaling = text["rope_scaling"]
        text["rope_scaling"] = {name: scaling[name] for name in ("short_factor", "long_factor")} | {"type": "longrope"}
    projector = projector_of(cfg)
    config: JsonDict = {
        "architectures": [stock.name],
        "model_type": family.model_types[0],
        stock.image_token: image_token_id,
        "image_seq_length": cfg.tokens_per_image,
        "projector_hidden_act": projector.activation,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if cfg.feature_select == "patch" else "full",
        "tie_word_embeddings": cfg.text.tie_embeddings,
        "torch_dtype": source.get("torch_dtype", source.get("dtype", "float32")),
        section: text,
        "vision_config": stock_tower(vision),
    }
    eos: Any = list(cfg.eos_token_ids) if len(cfg.eos_token_ids) > 1 else next(iter(cfg.eos_token_ids), None)
    ids = {"bos_token_id": cfg.bos_token_id, "eos_token_id": eos, "pad_token_id": cfg.pad_token_id}
    config |= {name: value for name, value in ids.items() if value is not None}
    config |= stock.config(cfg, source)
    wide = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, vocab_size=vocab_size))
    return family.to_hf(wide, config)


def write_processor(folder: Path, source: Path, cfg: ModelConfig, config: JsonDict, tokenizer: JsonDict) -> None:
    """Write tokenizer, image processor, chat template and generation config as transformers' processors expect them.

    `config`: config.json in the hub layout. `tokenizer`: content of tokenizer.json with the new image token.
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
    end = token_ids(tokenizer).get(template.assistant_end.strip())
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
    blocks, variables = ("<%", "%>"), ("<<", ">>")  # since "{%" and "{{" are those of the result
    jinja = TEMPLATES.overlay(*blocks, *variables)
    jinja.filters["literal"] = lambda text: "{{ " + json.dumps(text, ensure_ascii=False) + " }}"
    text = jinja.get_template("chat_template.jinja").render(template=template, image=image, video=video)
    return text.replace("\n", "")
