"""Description of a model family, from which everything else about it is derived."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmprune_jax.core.checks import Registry
from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.families.gguf import Architecture
from vlmprune_jax.families.templates import LLAVA_V1, Template
from vlmprune_jax.families.tiles import TilingConfig

JsonDict = dict[str, Any]


@dataclass(frozen=True)
class Weight:
    """Entry of a weight table: path in `params`, Hugging Face key, and stored layout in einops notation.

    `{i}` in path and key is the layer number. Layouts use the named axes that modules declare, for example `"(q_heads
    head) embed"`.
    """

    path: str
    key: str
    layout: str

    def at(self, i: int) -> Weight:
        """Return the weight table entry for layer `i`."""
        return Weight(self.path.replace("{i}", str(i)), self.key.replace("{i}", str(i)), self.layout)


@dataclass(frozen=True)
class Decoder:
    """Declaration of a decoder type (`model_type`), used alone or inside a vision-language model.

    `stock_class` is the transformers class that loads it alone. `from_hf(config)` returns a TextConfig whose `decoder`
    is the model type. `to_hf(text, source)` rewrites the fields that depend on the layers, and may change to another
    model type with the same computation. In `weights(text, prefix, head)`, `prefix` precedes `embed_tokens` and
    `layers`, and `head` is the key of the output head. `heads_divide`: the config class requires hidden_size to be a
    multiple of the heads. `head_bias`: alone, its output head has a bias. `gguf`: llama.cpp architectures that compute
    it, tried in order. `problem(text)`: why its class holds no such layers and what to do, or None.
    `derives_head_dim`: engines (of `export.loads.TARGETS`) that compute head_dim as hidden_size / heads and ignore
    config.json's. `runs_in`, `tried`, `vllm_tpu`: as in `Family`, alone.
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
    runs_in: tuple[str, ...] = ("vllm", "mlx", "openvino")
    tried: Mapping[str, str] = field(default_factory=dict)
    vllm_tpu: str = "torchax"
    problem: Callable[[TextConfig], str | None] = lambda text: None


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

    `by_row`: pixel_values are [rows, images, channels, height, width], not a flat list of the images of all rows.
    `miscomputes`: prefixes of transformers versions that compute different float32 outputs. `image_start`: field of
    config.json, and its default, with the id of the token by which some versions find images.

    The other fields are for layouts that models of other layouts are converted to (`Conversion`). `image_token`: field
    of config.json with that token's id. `config(cfg, source)`: additional fields of this class, where `source` is the
    config.json of the other layout. `lacks(cfg)`: feature of a model that the class does not support, or None.
    `processor(cfg, source, template, new_token)`: processor files for a model with this prompt template.
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
    """Rules for converting a hub checkpoint layout to transformers' layout (family `to`).

    The target's processor needs the additional token `new_token`; with `marks_images` that token stands for images,
    since the source has none.
    """

    to: str
    new_token: str
    marks_images: bool


@dataclass(frozen=True, eq=False)
class Family:
    """Model family in one checkpoint layout: "transformers", or "original" (the hub's own).

    Config: a folder belongs to the family if its config.json has one of the `model_types` and `matches`.
    `from_hf(config, vision)` reads a config.json (and that of a tower in its own folder). `to_hf(cfg, source)` is the
    inverse: `source` with the fields that depend on the layers rewritten. `text_section` of config.json describes the
    decoder (None: all of it).

    Weights: `weights(cfg)` has one line per tensor. `renames` are ordered (regex, replacement) pairs that turn every
    accepted spelling of a key into the table's. Keys that match `ignored` are neither loaded nor refused, and are
    copied on export, unless they match `dropped`. `modules` are pairs that turn the table's spelling into names of
    modules in memory in transformers. With `respells` exports have the table's spelling, whatever their source's
    (some versions ignore others). `mtp`: prefix of the keys of a head for several tokens (MTP), which is not computed,
    and the field of the decoder's section with the number of its layers. With `separate_vision` the tower may be a
    folder of its own; without `holds_tower` it always is.

    Tokens and prompt: `token_names` are pairs (field, token): config fields of `from_hf` that get the id of a token of
    the folder's tokenizer, if it has that token. Models were trained with the first of `templates`, unless
    `template_field` of config.json names another.

    Images: `image_processors` are transformers classes (without suffix) that `data/images.py` can run. `images` is
    "whole", "tiles" (best-fitting grid), "splits" (pieces at the image's own size), "crops" (pan and scan), "budget"
    (any size, of about as many tokens), "patches" (any size) or "naflex" (any size, large ones as tiles too).
    `tiling(config, where)` reads the tiling from config.json, and `tile_limit` is its field with the maximum number of
    tiles. `budget_field` of vision_config has the processor's token budget, for engines that read it there.
    `pixels(size)` returns processor settings if the folder has no file. `video` has the values of the video processor's
    class, which those of a folder replace; None if the family takes no videos.

    `recipe` is the reference's recovery, a partial experiment. `decoder` makes a family without a tower usable inside
    others. `stock` is the transformers class that loads the layout, `conversion` the way to a layout that has one.
    `vllm_tpu`: what runs it in vLLM on TPUs: a class of its own ("jax"), vLLM's PyTorch class ("torchax") or nothing.
    `runs_in`: other engines that have a class for it. `tried`: those that were run (tools/engines/table.py), and how
    their outputs differ from transformers', unpruned as well ("" if they do not), or which cuts alone were run.
    `derives_head_dim`: as in `Decoder`, inside this family. `engine_problem(engine, cfg)`: why an engine's class cannot
    compute a pruned model, beyond limits of transformers' class, or None.
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
    dropped: tuple[str, ...] = ()
    mtp: tuple[str, str] = ("", "")
    modules: tuple[tuple[str, str], ...] = ()
    respells: bool = False
    separate_vision: bool = False
    holds_tower: bool = True
    token_names: tuple[tuple[str, str], ...] = ()
    templates: tuple[Template, ...] = (LLAVA_V1,)
    template_field: str | None = None
    image_processors: tuple[str, ...] = ()
    images: str = "whole"
    tiling: Callable[[Mapping[str, Any], str], TilingConfig] | None = None
    tile_limit: str = ""
    budget_field: str = ""
    pixels: Callable[[int], JsonDict] | None = None
    video: VideoConfig | None = None
    recipe: Mapping[str, Any] | None = None
    decoder: Decoder | None = None
    stock: Stock | None = None
    vllm_tpu: str = ""
    runs_in: tuple[str, ...] = ("vllm",)
    tried: Mapping[str, str] = field(default_factory=dict)
    derives_head_dim: tuple[str, ...] = ()
    engine_problem: Callable[[str, ModelConfig], str | None] = lambda engine, cfg: None
    conversion: Conversion | None = None

    def canonical(self, key: str) -> str:
        """Return a checkpoint key in the spelling of the family's weight table."""
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


# All families by name, for example "llava", and "llava-original" for its hub layout. Users add families by assignment
# (`vlmprune_jax.families["mine"] = Family(...)`); if several match a folder, the last one added is used.
FAMILIES = Registry("families", Family, {})
