"""The decoders by `model_type`, alone and inside vision-language models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.config import ModelConfig, TextConfig
from vlmprune_jax.errors import UserError
from vlmprune_jax.families import llama, phi, phi3
from vlmprune_jax.families.shapes import token_ids
from vlmprune_jax.families.table import Family, JsonDict, Weight


@dataclass(frozen=True)
class DecoderKind:
    """Config both ways and weight lines of one kind of decoder; `name` is `TextConfig.decoder`."""

    name: str
    text_from_hf: Callable[..., TextConfig]
    text_to_hf: Callable[[TextConfig, JsonDict], JsonDict]
    text_weights: Callable[[TextConfig, str, str], list[Weight]]


_LLAMA = DecoderKind("llama", llama.text_from_hf, llama.text_to_hf, llama.text_weights)
_PHI = DecoderKind("phi", phi.text_from_hf, phi.text_to_hf, phi.text_weights)
_PHI3 = DecoderKind("phi3", phi3.text_from_hf, phi3.text_to_hf, phi3.text_weights)
_MODULES = ((llama, _LLAMA), (phi, _PHI), (phi3, _PHI3))
DECODERS: dict[str, DecoderKind] = {name: kind for module, kind in _MODULES for name in module.MODEL_TYPES}
_BY_NAME = {kind.name: kind for kind in DECODERS.values()}


def decoder_kind(config: Mapping[str, Any]) -> DecoderKind:
    """The kind of a text config by its `model_type` (absent: llama).

    Raises:
      UserError: no such decoder; the message lists what is known.
    """
    model_type = config.get("model_type", "llama")
    if model_type not in DECODERS:
        raise UserError(f"a {model_type!r} decoder is not supported (supported: {', '.join(DECODERS)})")
    return DECODERS[model_type]


def text_from_hf(config: Mapping[str, Any], tie_default: bool = False) -> TextConfig:
    """TextConfig of a text config dictionary; absent fields take the defaults of its class in transformers."""
    return decoder_kind(config).text_from_hf(config, tie_default)


def text_to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    """`source` with every field that depends on the layers rewritten; the model type may change (see each kind)."""
    return _BY_NAME[text.decoder].text_to_hf(text, source)


def text_weights(text: TextConfig, prefix: str, head: str) -> list[Weight]:
    """Weight lines of the decoder; `prefix` precedes `embed_tokens` and `layers`, and `head` is lm_head's key."""
    return _BY_NAME[text.decoder].text_weights(text, prefix, head)


def _plain(kind: DecoderKind, model_types: tuple[str, ...], head_bias: bool) -> Family:
    """The family of a decoder without a vision tower."""

    def from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
        del vision
        text = dataclasses.replace(kind.text_from_hf(config), head_bias=head_bias)
        return ModelConfig(family=kind.name, layout="transformers", text=text, **token_ids(config))

    return Family(
        name=kind.name,
        layout="transformers",
        matches=lambda config: config.get("model_type") in model_types,
        from_hf=from_hf,
        to_hf=lambda cfg, source: kind.text_to_hf(cfg.text, source),
        weights=lambda cfg: kind.text_weights(cfg.text, "model.", "lm_head.weight"),
        # a tied head that was written out all the same is not read
        ignored=(r".*\.rotary_emb\.inv_freq", r"lm_head\.weight"),
    )


LLAMA = _plain(_LLAMA, llama.MODEL_TYPES, head_bias=False)
PHI = _plain(_PHI, phi.MODEL_TYPES, head_bias=True)
PHI3 = _plain(_PHI3, phi3.MODEL_TYPES, head_bias=False)
