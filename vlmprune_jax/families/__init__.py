"""The families that can be read, pruned and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.config import ModelConfig
from vlmprune_jax.errors import UserError
from vlmprune_jax.families.bunny import BUNNY
from vlmprune_jax.families.decoders import DECODERS, LLAMA, PHI, PHI3
from vlmprune_jax.families.internvl import INTERNVL_HF, INTERNVL_ORIGINAL
from vlmprune_jax.families.llava import LLAVA_HF, LLAVA_ORIGINAL
from vlmprune_jax.families.table import Family, Weight

FAMILIES: tuple[Family, ...] = (
    LLAVA_HF,
    LLAVA_ORIGINAL,
    BUNNY,
    INTERNVL_ORIGINAL,
    INTERNVL_HF,
    LLAMA,
    PHI,
    PHI3,
)

__all__ = ["FAMILIES", "Family", "Weight", "detect", "family_of"]


def detect(config: Mapping[str, Any], where: str) -> Family:
    """The family whose layout a config.json describes.

    Raises:
      UserError: no family matches; the message lists what is known.
    """
    for family in FAMILIES:
        if family.matches(config):
            return family
    own = " and is loaded by the repository's own code (auto_map), which is never run here" * ("auto_map" in config)
    raise UserError(
        f"{where}: model_type {config.get('model_type')!r} (architectures {config.get('architectures')}) is not "
        f"supported{own}; known: llava (llava-hf and original LLaVA-1.5 layouts), bunny-phi, internvl_chat, internvl, "
        f"{', '.join(DECODERS)}"
    )


def family_of(cfg: ModelConfig) -> Family:
    """The family that a ModelConfig came from."""
    return next(f for f in FAMILIES if (f.name, f.layout) == (cfg.family, cfg.layout))
