"""Config and PyTorch loader file of exports whose layers have unequal widths."""

from __future__ import annotations

import shutil
from pathlib import Path

from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.families import Family
from vlmprune_jax.families.decoders import decoder_of
from vlmprune_jax.families.table import JsonDict

LOADER_FILE = "modeling_per_layer.py"
_LOADER = Path(__file__).parent / "remote" / LOADER_FILE
_PREFIX = "PerLayer"


def with_loader(config: JsonDict, text: TextConfig, family: Family) -> JsonDict:
    """Return the config of a stock family with unequal layers, which names the class in the loader file.

    Config classes validate nominal head counts: Llama's must divide `hidden_size`, and Phi-3's LongRoPE needs one
    factor per frequency of hidden_size / heads. The nominal counts, from which each layer is cut, are the next valid
    ones.
    """
    assert family.stock is not None
    inner = family.text_config(config)
    if decoder_of(inner["model_type"]).heads_divide:
        fits = [n for n in range(inner["num_attention_heads"], text.hidden_size + 1) if text.hidden_size % n == 0]
        whole = text.hidden_size // text.head_dim
        inner["num_attention_heads"] = heads = whole if whole in fits else fits[0]
        if heads % inner["num_key_value_heads"]:
            inner["num_key_value_heads"] = heads
    config = dict(inner) if family.text_section is None else {**config, family.text_section: inner}
    auto, stock = family.stock.auto, _PREFIX + family.stock.name
    others = {name: value for name, value in (config.get("auto_map") or {}).items() if name != auto}
    auto_map = others | {auto: f"{LOADER_FILE.removesuffix('.py')}.{stock}"}
    return {**config, "architectures": [stock], "auto_map": auto_map}


def without_loader(config: JsonDict) -> JsonDict:
    """Return the config for the stock class: the inverse of `with_loader`, or the config itself."""
    module = LOADER_FILE.removesuffix(".py") + "."
    result = dict(config)
    remaining = {k: v for k, v in (config.get("auto_map") or {}).items() if not str(v).startswith(module)}
    if remaining:
        result["auto_map"] = remaining
    elif len(remaining) != len(config.get("auto_map") or {}):
        del result["auto_map"]
    if config.get("architectures"):
        result["architectures"] = [name.removeprefix(_PREFIX) for name in config["architectures"]]
    return result


def write_loader(folder: Path) -> None:
    """Copy the loader file into the folder."""
    shutil.copyfile(_LOADER, folder / LOADER_FILE)


def loader_class(config: JsonDict) -> str | None:
    """Return the class in the loader file that loads a folder with this config, or None for a stock class."""
    module = LOADER_FILE.removesuffix(".py") + "."
    classes = [str(v) for v in (config.get("auto_map") or {}).values() if str(v).startswith(module)]
    return classes[0].removeprefix(module) if classes else None
