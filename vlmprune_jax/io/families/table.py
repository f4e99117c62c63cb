"""Declaration of a model family: config, weight names, prompts, images and engines, as one dataclass."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmprune_jax.base.checks import Registry, check_returned
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.families.gguf import Architecture
from vlmprune_jax.io.families.gguf import in_layers as in_layers
from vlmprune_jax.io.families.shapes import JsonDict, layers_to_hf
from vlmprune_jax.io.families.templates import LLAVA_V1, Template
from vlmprune_jax.io.families.tiles import TilingConfig


@dataclass(frozen=True)
class Weight:
    """Entry of a weight table: a module or parameter of `params`, and its key in files.

    `{i}` in path and key is the layer number. The entry of a module stands for its weight and bias, whose names are
    appended to path and key. Entries that a model lacks (biases, other kinds of layers) are skipped.
    """

    path: str
    key: str
    layout: str | None = None
    """Axes of the tensor in files, in einops notation; None: axes that modules declare, such as "(q_heads head) embed",
    in which the channels of a head are joined with the heads.
    """

    def at(self, i: int) -> Weight:
        """Return the weight table entry with `{i}` replaced by layer number `i`."""
        return Weight(self.path.replace("{i}", str(i)), self.key.replace("{i}", str(i)), self.layout)


# {path of a module in `params["text"]`: its name in files} where both are the same, as in Llama, Phi and most decoders.
_LAYER = (
    *("input_layernorm", "post_attention_layernorm", "self_attn/q_norm", "self_attn/k_norm"),
    *(f"self_attn/{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "dense")),
    *(f"mlp/{name}" for name in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2")),
)
LLAMA_NAMES = {
    "embed_tokens": "embed_tokens",
    **in_layers({path: path.replace("/", ".") for path in _LAYER}),
    **{name: name for name in ("norm", "final_layernorm", "lm_head")},
}


def part_weights(
    part: str, prefix: str, names: Mapping[str, str], layouts: Mapping[str, str] | None = None
) -> list[Weight]:
    """Return the weight table of a part of the model: {path in the part: key after `prefix`}, and layouts by path."""
    return [Weight(f"{part}/{path}", prefix + key, (layouts or {}).get(path)) for path, key in names.items()]


@dataclass(frozen=True)
class Decoder:
    """Declaration of a decoder type (`model_type`), used alone or inside a vision-language model.

    `runs_in` and `vllm_tpu` are as in `Family`, for the decoder used alone.
    """

    model_type: str

    stock_class: str
    """Transformers class that loads the decoder alone."""

    from_hf: Callable[[Mapping[str, Any]], TextConfig]
    """(config with all `defaults`) -> TextConfig, whose `decoder` is the model type."""

    to_hf: Callable[[TextConfig, JsonDict], JsonDict] = layers_to_hf
    """(text, source) -> config with updated layer fields, perhaps of another model type that computes the same."""

    names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    """{path in `params["text"]`: key in files, after the prefix of the decoder}, as in `Weight`. Paths that share a key
    are rows of a fused tensor.
    """

    layouts: Mapping[str, str] = field(default_factory=dict)
    """{path: layout} of tensors that are stored in an unusual layout."""

    defaults: JsonDict = field(default_factory=dict)
    """Defaults of the config class in transformers."""

    heads_divide: bool = False
    """True if the config class requires hidden_size to be a multiple of the number of heads."""

    head_bias: bool = False
    """True if the output head has a bias when the decoder is used alone."""

    gguf: tuple[Architecture, ...] = ()
    """llama.cpp architectures that compute the decoder, in order of preference."""

    reads_quantised_experts: bool = False
    """True if transformers 5.24 decodes and merges quantised experts on loading (tried with w8a16)."""

    derives_head_dim: tuple[str, ...] = ()
    """Engines (of `core.limits.ENGINES`) that compute head_dim as hidden_size / heads, whatever config.json says."""

    runs_in: tuple[str, ...] = ("vllm", "mlx", "openvino")
    vllm_tpu: str = "torchax"

    problem: Callable[[TextConfig], str | None] = lambda text: None
    """Return why the transformers class does not support these layers, with advice; None if it does."""


@dataclass(frozen=True)
class ProcessorFiles:
    """Content of the files from which transformers loads a processor.

    `tokens`: special tokens that the processor reads from the tokenizer, by name. `image`: the token that stands for an
    image in a chat. `files`: JSON files by name; processor_config.json names the class.
    """

    tokens: dict[str, str]
    image: str
    files: dict[str, JsonDict]


@dataclass(frozen=True)
class Stock:
    """Stock transformers class that loads a checkpoint layout, and its Auto class.

    The fields from `image_token` on are for layouts to which models of other layouts are converted (`Conversion`).
    """

    name: str
    auto: str

    by_row: bool = False
    """True if pixel_values are [rows, images, channels, height, width], not a flat list of all rows' images."""

    miscomputes: tuple[str, ...] = ()
    """Prefixes of transformers versions that compute different float32 outputs."""

    image_start: tuple[str, int] | None = None
    """Config.json field, and its default, with the id of the token by which some versions find images."""

    image_token: str = ""
    """Config.json field with the id of the image token."""

    config: Callable[[ModelConfig, JsonDict], JsonDict] = lambda cfg, source: {}
    """(cfg, config.json of the other layout) -> additional config.json fields of this class."""

    lacks: Callable[[ModelConfig], str | None] = lambda cfg: None
    """Return a feature of the model that the class does not support; None if it supports all."""

    processor: Callable[[ModelConfig, JsonDict, Template, str], ProcessorFiles] | None = None
    """(cfg, source, template, new token) -> processor files for a model with this prompt template."""


@dataclass(frozen=True)
class Conversion:
    """Rules for converting a hub checkpoint layout to transformers' layout (family `to`).

    The target's processor needs the additional token `new_token`; with `marks_images` that token stands for images,
    since the source has none.
    """

    to: str
    new_token: str
    marks_images: bool


@dataclass(frozen=True, eq=False)
class Family:
    """Model family in one checkpoint layout: "transformers", or "original" (the hub's own)."""

    name: str
    layout: str

    # Config

    model_types: tuple[str, ...]
    """Values of config.json's `model_type` (one of them, and `matches`, must hold for a folder of this family)."""

    from_hf: Callable[[Mapping[str, Any], Mapping[str, Any] | None], ModelConfig]
    """(config.json, vision tower's config.json if it has its own folder) -> ModelConfig."""

    to_hf: Callable[[ModelConfig, JsonDict], JsonDict]
    """(cfg, source) -> config.json: `source` with the fields rewritten that depend on the layers."""

    weights: Callable[[ModelConfig], list[Weight]]
    """Return the weight table, one entry per tensor."""

    matches: Callable[[Mapping[str, Any]], bool] = lambda config: True
    """Additional condition on config.json."""

    text_section: str | None = None
    """Section of config.json that describes the decoder; None: the whole file."""

    # Weights

    renames: tuple[tuple[str, str], ...] = ()
    """(regex, replacement) pairs, applied in order, that turn every accepted key into the weight table's spelling."""

    ignored: tuple[str, ...] = ()
    """Regexes of keys that are neither loaded nor refused; exports copy them, except those that match `dropped`."""

    dropped: tuple[str, ...] = ()
    """Regexes of keys that exports leave out."""

    mtp: tuple[str, str, Mapping[str, tuple[int, ...]]] = ("", "", {})
    """Multi-token prediction module (not computed): key prefix, decoder field with its layer count, and the shapes of
    tensors outside its layers in multiples of hidden_size.
    """

    modules: tuple[tuple[str, str], ...] = ()
    """(regex, replacement) pairs that turn the weight table's keys into names of modules in transformers."""

    respells: bool = False
    """True if exports use the weight table's keys, whatever the source's (some versions ignore other keys)."""

    separate_vision: bool = False
    """True if the vision tower may have its own folder."""

    holds_tower: bool = True
    """False if the vision tower always has its own folder."""

    # Tokens and prompt

    token_names: tuple[tuple[str, str], ...] = ()
    """(config field of `from_hf`, token): the field gets the token's id if the folder's tokenizer has the token."""

    templates: tuple[Template, ...] = (LLAVA_V1,)
    """Prompt templates; models were trained with the first one, unless `template_field` names another."""

    template_field: str | None = None
    """Field of config.json with the name of the prompt template."""

    # Images

    image_processors: tuple[str, ...] = ()
    """Transformers image processor classes (without suffix) that `io/data/images.py` can run."""

    images: str = "whole"
    """One of "whole", "tiles" (best-fitting grid), "splits" (pieces at the image's own size), "crops" (pan and scan),
    "budget" (any size, about equally many tokens), "patches" (any size) or "naflex" (any size, and large images as
    tiles too).
    """

    tiling: Callable[[Mapping[str, Any], str], TilingConfig] | None = None
    """(config.json, its path for messages) -> tiling settings."""

    tile_limit: str = ""
    """Field of config.json with the maximum number of tiles."""

    budget_field: str = ""
    """Field of `vision_config` with the image processor's token budget, for engines that read it there."""

    pixels: Callable[[int], JsonDict] | None = None
    """(image size) -> image processor settings, for folders without a processor file."""

    video: VideoConfig | None = None
    """Defaults of the video processor's class, which a folder's settings replace; None if videos are unsupported."""

    # Recovery, parts and engines

    recipe: Mapping[str, Any] | None = None
    """Recovery settings of the reference implementation, a partial experiment."""

    decoder: Decoder | None = None
    """Decoder that other families can contain; None for families with a vision tower."""

    stock: Stock | None = None
    """Transformers class that loads this layout; None if none does."""

    vllm_tpu: str = ""
    """Class of vLLM that runs the family on TPUs: "jax" (its own), "torchax" (vLLM's PyTorch class) or "" (none)."""

    runs_in: tuple[str, ...] = ("vllm",)
    """Other engines that have a class for the family."""

    derives_head_dim: tuple[str, ...] = ()
    """Engines that compute head_dim as hidden_size / heads for the decoder inside this family."""

    engine_problem: Callable[[str, ModelConfig], str | None] = lambda engine, cfg: None
    """(engine, cfg) -> why the engine, but not transformers, cannot compute this pruned model; None if it can."""

    conversion: Conversion | None = None
    """Rules for exporting in transformers' layout; None if this layout cannot be converted."""

    def canonical(self, key: str) -> str:
        """Rename a checkpoint key to the spelling of the family's weight table."""
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key

    def is_ignored(self, key: str) -> bool:
        """Return True if no forward pass uses the tensor with this checkpoint key."""
        return self.is_dropped(key) or any(re.fullmatch(pattern, key) for pattern in self.ignored)

    def is_dropped(self, key: str) -> bool:
        """Return True if exports omit the tensor with this checkpoint key."""
        return any(re.fullmatch(pattern, key) for pattern in self.dropped)

    def text_config(self, config: Mapping[str, Any]) -> JsonDict:
        """Return the section of config.json that describes the decoder; {} if there is none."""
        part = config if self.text_section is None else config.get(self.text_section)
        return dict(part) if isinstance(part, Mapping) else {}


def checked_table(function: Callable[..., list[Weight]], table: Any) -> list[Weight]:
    """Return the weight table that a family's `weights` returned; raise UserError for anything else."""
    fits = isinstance(table, list | tuple) and all(isinstance(line, Weight) for line in table)
    check_returned(function, table, fits, "a list of families.table.Weight")
    return [*table]


# All families by name, for example "llava", and "llava-original" for its hub layout. Users add families by assignment
# (`vlmprune_jax.io.families["mine"] = Family(...)`); if several match a folder, the last one added is used.
FAMILIES: Registry[Family] = Registry("families", Family, {})


def family_of(cfg: ModelConfig) -> Family:
    """Return the model family of a `ModelConfig`.

    Raises UserError if the family is unknown, since the file that adds it was not imported.
    """
    for family in reversed(FAMILIES.values()):
        if (family.name, family.layout) == (cfg.family, cfg.layout):
            return family
    raise UserError(
        f"unknown family {cfg.family!r} in {cfg.layout} layout (known: {', '.join(FAMILIES)}): import the file that "
        "registers this family"
    )


def target_of(family: Family) -> Family | None:
    """Return the family (transformers layout) to which a hub-layout family is converted; None if it has no conversion.

    Raises UserError if that family is unknown, or accepts no models of other layouts.
    """
    if family.conversion is None:
        return None
    targets = {name: f for name, f in FAMILIES.items() if f.stock is not None and f.stock.processor is not None}
    if family.conversion.to not in targets:
        raise UserError(
            f"family {family.name}: conversion.to={family.conversion.to!r} names a layout to which no model can be "
            "converted: "
            f"use one of {', '.join(targets)}"
        )
    return targets[family.conversion.to]
