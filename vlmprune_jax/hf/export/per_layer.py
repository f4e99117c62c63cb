"""config.json and the PyTorch file of exports whose layers have unequal widths."""

from __future__ import annotations

import shutil
from pathlib import Path

from vlmprune_jax.config import TextConfig
from vlmprune_jax.families.table import JsonDict

LOADER_FILE = "modeling_per_layer.py"
_LOADER = Path(__file__).parents[1] / "remote" / LOADER_FILE
_PREFIX = "PerLayer"
# Stock class by model_type of config.json, and the Auto classes that find the shipped one.
_CAUSAL, _IMAGES = ("AutoModelForCausalLM",), ("AutoModelForImageTextToText",)
_CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("LlamaForCausalLM", _CAUSAL),
    "mistral": ("MistralForCausalLM", _CAUSAL),
    "qwen2": ("Qwen2ForCausalLM", _CAUSAL),
    "qwen3": ("Qwen3ForCausalLM", _CAUSAL),
    "phi": ("PhiForCausalLM", _CAUSAL),
    "phi3": ("Phi3ForCausalLM", _CAUSAL),
    "llava": ("LlavaForConditionalGeneration", _IMAGES),
    "internvl": ("InternVLForConditionalGeneration", _IMAGES),
}


def stock_class(model_type: str) -> str:
    """Name of the transformers class that loads a config.json of this `model_type`."""
    return _CLASSES[model_type][0]


def with_loader(config: JsonDict, text: TextConfig) -> JsonDict:
    """The config of a native folder of unequal layers, naming the class in the shipped file.

    Config classes check head counts that such a folder has no use for: Llama's that they divide `hidden_size`, Phi-3's
    that LongRoPE has a factor per frequency of hidden_size / heads. So the nominal ones, from which every layer is cut,
    are the next that pass.
    """
    config = dict(config)
    inner = dict(config["text_config"]) if "text_config" in config else config
    if inner["model_type"] in ("llama", "phi3"):
        fits = [n for n in range(inner["num_attention_heads"], text.hidden_size + 1) if text.hidden_size % n == 0]
        whole = text.hidden_size // text.head_dim
        inner["num_attention_heads"] = heads = whole if whole in fits else fits[0]
        if heads % inner["num_key_value_heads"]:
            inner["num_key_value_heads"] = heads
    if "text_config" in config:
        config["text_config"] = inner
    stock, autos = _CLASSES[config["model_type"]]
    others = {name: value for name, value in (config.get("auto_map") or {}).items() if name not in autos}
    auto_map = others | {auto: f"{LOADER_FILE.removesuffix('.py')}.{_PREFIX}{stock}" for auto in autos}
    return {**config, "architectures": [_PREFIX + stock], "auto_map": auto_map}


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
