"""Target of an exported folder: its layout, config.json, and the files that make it usable."""

from __future__ import annotations

import fnmatch
import json
import os
from dataclasses import dataclass
from pathlib import Path

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import copy_file, copy_folder
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.io.checkpoints.disk.storage import without_storage
from vlmprune_jax.io.checkpoints.read import read_fields
from vlmprune_jax.io.data.image_processor import processor_settings
from vlmprune_jax.io.data.token_budget import DEFAULT_BUDGET
from vlmprune_jax.io.exports.convert import rows_for, to_transformers
from vlmprune_jax.io.exports.huggingface import FolderOptions
from vlmprune_jax.io.exports.processor import write_processor
from vlmprune_jax.io.exports.tokenizer import add_token, read_tokenizer
from vlmprune_jax.io.exports.uneven import padded_stacks, with_head_dim, with_loader, without_loader, write_loader
from vlmprune_jax.io.families import Family, detect, family_of, target_of
from vlmprune_jax.io.families.table import JsonDict

# Files that make a folder usable, beside weights and config.json.
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
      ships_loader: True if PyTorch needs the per-layer loader file.
      tokenizer: content of tokenizer.json for a converted folder, if the source has a tokenizer.
    """

    family: Family
    cfg: ModelConfig
    config: JsonDict
    converts: bool
    ships_loader: bool
    tokenizer: JsonDict | None = None


def make_target(cfg: ModelConfig, source: Path, options: FolderOptions) -> Target:
    """Return the family and configs of the exported folder, for a model loaded from `source`.

    Raises:
      UserError: the source has another family, layers are unequal with uneven="refuse", heads cannot be padded to
        `head_dim` channels, or the layout cannot hold the model.
    """
    if options.uneven == "refuse":
        _check_uneven(cfg)
    family, config = family_of(cfg), without_storage(read_fields(source / "config.json"))
    if detect(config, str(source / "config.json")) is not family:
        raise UserError(
            f"{source}: is not the folder from which this {family.name} model ({family.layout} layout) was loaded"
        )
    rows = family.text_config(config).get("vocab_size", cfg.text.vocab_size)
    if rows != cfg.text.vocab_size:
        raise UserError(
            f"{source}: has a vocabulary of {rows:,} rows, but the model has {cfg.text.vocab_size:,}: pass the plan "
            "that "
            "trimmed the vocabulary (plan=), or the folder that this model was loaded from"
        )
    wide = with_head_dim(padded_stacks(cfg) if options.uneven == "pad" else cfg, options.head_dim)
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
            family = detect(written, "the new config.json")
            wide = family.from_hf(written, None)
    if family.budget_field and (settings := processor_settings(source)) is not None:
        budget = {family.budget_field: settings[0].get("max_soft_tokens") or DEFAULT_BUDGET}
        written = {**written, "vision_config": written["vision_config"] | budget}
    ships = family.layout == "transformers" and not wide.text.uniform
    written = _with_dtype(with_loader(written, cfg.text, family) if ships else written, options.dtype, family)
    return Target(family, wide, written, new_family is not None, ships, tokenizer)


def _check_uneven(cfg: ModelConfig) -> None:
    """Raise UserError if stock transformers cannot load layers of unequal width at their true size."""
    if not cfg.text.uniform:
        raise UserError(
            "the layers have unequal widths, which stock transformers cannot load: prune all layers alike (without "
            'attn_layers and mlp_layers), or export with uneven="pad" (same function, no savings) or "per_layer" '
            "(true sizes)"
        )
    tower = cfg.vision if cfg.tower else None
    if tower is not None and tower.uniform and not tower.whole_heads:
        raise UserError(
            "the vision tower has fewer heads than its width requires, which its PyTorch class cannot load: prune it "
            'with heads="keep", or export with uneven="pad" (same function, no savings) or "per_layer" (true sizes, '
            "for this package)"
        )


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


def write_files(target: Target, cfg: ModelConfig, source: Path, folder: Path) -> None:
    """Write all files of an exported folder except weights: config, tokenizer, processor, template, loader file."""
    (folder / "config.json").write_text(json.dumps(target.config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    code = ("*.py",) if "auto_map" in target.config else ()
    if not target.converts:
        _copy_files(source, folder, (*_SAME_LAYOUT, *code))
    if target.tokenizer is not None:
        write_processor(folder, source, cfg, read_fields(source / "config.json"), target.tokenizer)
    if target.ships_loader:
        write_loader(folder)


def copy_always(source: Path, folder: Path, plan: PrunePlan | None) -> None:
    """Copy licence files to an export, and write plan.json (from `plan`, otherwise a copy of the source's)."""
    _copy_files(source, folder, _ALWAYS)
    if plan is not None:
        plan.to_json(folder / "plan.json")


def _copy_files(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    for name in sorted(os.listdir(source)):  # a glob would skip broken links
        wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        if wanted and not name.endswith(".index.json") and not os.path.isdir(source / name):
            copy_file(source / name, folder / name, source)
    templates = source / "additional_chat_templates"
    if os.path.lexists(templates):
        copy_folder(templates, folder / templates.name, source)
