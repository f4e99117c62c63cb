"""What a model family must say about itself: config both ways, and one line per weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.config import ModelConfig

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
class Family:
    """A model family in one checkpoint layout.

    `renames` are ordered (regex, replacement) pairs that turn every accepted spelling of a key into the table's
    spelling. Keys that match `ignored` are neither loaded nor refused; they are carried over on export. `token_names`
    are (field, token) pairs: fields that `from_hf` looks for beside those of config.json, each with the id of a token
    of the folder's tokenizer (absent where there is none). `modules` are pairs that turn the table's spelling into the
    names that modules have in memory in stock transformers.
    """

    name: str
    layout: str
    matches: Callable[[Mapping[str, Any]], bool]
    from_hf: Callable[[Mapping[str, Any], Mapping[str, Any] | None], ModelConfig]
    to_hf: Callable[[ModelConfig, JsonDict], JsonDict]
    weights: Callable[[ModelConfig], list[Weight]]
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    separate_vision: bool = False
    modules: tuple[tuple[str, str], ...] = ()
    token_names: tuple[tuple[str, str], ...] = ()

    def canonical(self, key: str) -> str:
        """The table's spelling of a checkpoint key."""
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key

    def is_ignored(self, key: str) -> bool:
        """Whether a (canonical) key is known and not part of the computed model."""
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)
