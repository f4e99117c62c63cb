"""What a model family says about itself: one description, from which everything else is derived."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.families.gguf import Architecture
from vlmprune_jax.families.templates import LLAVA_V1, Template
from vlmprune_jax.families.tiles import TilingConfig

JsonDict = dict[str, Any]


@dataclass(frozen=True)
class Weight:
    """One tensor: its path in `params`, its Hugging Face key and its Hugging Face layout as an einops side.

    `{i}` in path and key is the layer number. The layout uses the named axes that the module declares, e.g.
    `"(q_heads head) embed"`.
    """

    path: str
    key: str
    layout: str

    def at(self, i: int) -> Weight:
        """The line of layer `i`."""
        return Weight(self.path.replace("{i}", str(i)), self.key.replace("{i}", str(i)), self.layout)


@dataclass(frozen=True)
class Decoder:
    """A decoder by its `model_type`, which stands alone or inside a vision-language model.

    `stock_class` of transformers loads it alone. `from_hf(config)` makes a TextConfig whose `decoder` is the model
    type; `to_hf(text, source)` rewrites what depends on the layers, and may turn to another model type that holds the
    same computation. `weights(text, prefix, head)`: `prefix` precedes `embed_tokens` and `layers`, `head` is the key of
    the output head. `heads_divide`: the config class refuses numbers of heads that do not divide hidden_size.
    `head_bias`: alone its output head has a bias. `gguf`: architectures of llama.cpp that compute it, in the order in
    which they are tried. `derives_head_dim`: engines whose class takes hidden_size / heads for the size of a head,
    whatever config.json says (of `export.loads.TARGETS`).
    """

    model_type: str
    stock_class: str
    from_hf: Callable[[Mapping[str, Any]], TextConfig]
    to_hf: Callable[[TextConfig, JsonDict], JsonDict]
    weights: Callable[[TextConfig, str, str], list[Weight]]
    heads_divide: bool = False
    head_bias: bool = False
    gguf: tuple[Architecture, ...] = ()
    derives_head_dim: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProcessorFiles:
    """What a processor of transformers reads.

    `tokens`: special tokens that it asks the tokenizer for, by name. `image`: the token that stands for one image in a
    chat. `files`: JSON files by name; processor_config.json names the class.
    """

    tokens: dict[str, str]
    image: str
    files: dict[str, JsonDict]


@dataclass(frozen=True)
class Stock:
    """The class of transformers that loads a layout, and the Auto class that finds it.

    `by_row`: it takes pixel_values [rows, images, channels, height, width], not the images of all rows as one list.
    `miscomputes`: beginnings of the versions of transformers in which it is known to compute something else in float32.
    `image_start`: field of config.json, and its default, with the id of the token by which some versions find images.

    The rest is for layouts that models of other layouts are converted to (`Conversion`). `image_token` is the field of
    config.json with that token's id. `config(cfg, source)`: fields that this class alone has, `source` being the
    config.json of the other layout. `lacks(cfg)`: what of a model the class has no place for, or None.
    `processor(cfg, source, template, new_token)`: of a model with this prompt format.
    """

    name: str
    auto: str
    by_row: bool = False
    miscomputes: tuple[str, ...] = ()
    image_start: tuple[str, int] | None = None
    image_token: str = ""
    config: Callable[[ModelConfig, JsonDict], JsonDict] = lambda cfg, source: {}
    lacks: Callable[[ModelConfig], str | None] = lambda cfg: None
    processor: Callable[[ModelConfig, JsonDict, Template, str], ProcessorFiles] | None = None


@dataclass(frozen=True)
class Conversion:
    """How a hub's layout becomes one of transformers: `to` is the key of that family.

    Its processor needs `new_token` beside the source's own; with `marks_images` that is the token that stands for
    images, for which the source has none.
    """

    to: str
    new_token: str
    marks_images: bool


@dataclass(frozen=True, eq=False)
class Family:
    """A model family in one checkpoint layout: "transformers", or a hub's own ("original").

    Its folders have one of the `model_types` in config.json, and `matches` where layouts share one. `from_hf(config,
    vision)` reads a config.json (and that of a tower in its own folder), `to_hf(cfg, source)` is its inverse: `source`
    with what depends on the layers rewritten. `text_section` of config.json describes the decoder (None: all of it).

    Weights: one line per tensor. `renames` are ordered (regex, replacement) pairs that turn every accepted spelling of
    a key into the table's spelling. Keys that match `ignored` are neither loaded nor refused; they are carried over on
    export. `modules` are pairs that turn the table's spelling into the names that modules have in memory in stock
    transformers. With `separate_vision` the tower may be a folder of its own; without `holds_tower` it always is.

    Tokens and prompt: `token_names` are (field, token) pairs: fields that `from_hf` looks for beside those of
    config.json, each with the id of a token of the folder's tokenizer (absent where there is none). The first of
    `templates` is what a model was trained with, unless `template_field` of its config.json names another.

    Images: `image_processors` are the classes of transformers (without their suffix) that a folder may name and that
    `data/images.py` can run; `images` says that they keep an image "whole", cut it into "tiles" of the grid that fits
    best, "splits" it at its own size, or leave it that size, in "patches". `tiling(config, where)` is for a config.json
    that says how, `pixels(size)` the processor's settings where no file has them.

    `recipe`: the reference's recovery, a partial experiment. `decoder` makes a family without a tower usable inside
    others; `stock` is the class that loads the layout, `conversion` what becomes of one that has none.
    """

    name: str
    layout: str
    model_types: tuple[str, ...]
    from_hf: Callable[[Mapping[str, Any], Mapping[str, Any] | None], ModelConfig]
    to_hf: Callable[[ModelConfig, JsonDict], JsonDict]
    weights: Callable[[ModelConfig], list[Weight]]
    matches: Callable[[Mapping[str, Any]], bool] = lambda config: True
    text_section: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()
    separate_vision: bool = False
    holds_tower: bool = True
    token_names: tuple[tuple[str, str], ...] = ()
    templates: tuple[Template, ...] = (LLAVA_V1,)
    template_field: str | None = None
    image_processors: tuple[str, ...] = ()
    images: str = "whole"
    tiling: Callable[[Mapping[str, Any], str], TilingConfig] | None = None
    pixels: Callable[[int], JsonDict] | None = None
    recipe: Mapping[str, Any] | None = None
    decoder: Decoder | None = None
    stock: Stock | None = None
    conversion: Conversion | None = None

    def canonical(self, key: str) -> str:
        """The table's spelling of a checkpoint key."""
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key

    def is_ignored(self, key: str) -> bool:
        """Whether a (canonical) key is known and not part of the computed model."""
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)

    def text_config(self, config: Mapping[str, Any]) -> JsonDict:
        """The part of a config.json that describes the decoder; {} where it is not there."""
        part = config if self.text_section is None else config.get(self.text_section)
        return dict(part) if isinstance(part, Mapping) else {}


# Every family that can be read, pruned and written: "llava", and "llava-original" for its hub's layout. A user's file
# adds one by assignment (`vlmprune_jax.families["mine"] = Family(...)`); of two that take one folder, the later does.
FAMILIES: dict[str, Family] = {}
