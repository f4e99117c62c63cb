"""config.json and the PyTorch file of exports whose layers have unequal widths."""

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
    """The config of a folder of unequal layers in this stock family, naming the class in the shipped file.

    Config classes check head counts that such a folder has no use for: Llama's that they divide `hidden_size`, Phi-3's
    that LongRoPE has a factor per frequency of hidden_size / heads. So the nominal ones, from which every layer is cut,
    are the next that pass.
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
    """The config as the stock class wants it: the inverse of `with_loader`; other configs are returned as they are."""
    module = LOADER_FILE.removesuffix(".py") + "."
    result = dict(config)
    kept = {k: v for k, v in (config.get("auto_map") or {}).items() if not str(v).startswith(module)}
    if kept:
        result["auto_map"] = kept
    elif len(kept) != len(config.get("auto_map") or {}):
        del result["auto_map"]
    if config.get("architectures"):
        result["architectures"] = [name.removeprefix(_PREFIX) for name in config["architectures"]]
    return result


def write_loader(folder: Path) -> None:
    """Put the PyTorch file beside the weights."""
    shutil.copyfile(_LOADER, folder / LOADER_FILE)


def loader_class(config: JsonDict) -> str | None:
    """The class of the shipped file that loads a folder with this config, or None where a stock class does."""
    module = LOADER_FILE.removesuffix(".py") + "."
    named = [str(v) for v in (config.get("auto_map") or {}).values() if str(v).startswith(module)]
    return named[0].removeprefix(module) if named else None
