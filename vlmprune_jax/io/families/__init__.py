"""Model families that can be read, pruned and written, with all facts about each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.families import limits  # its engines are added to core.limits.ENGINES
from vlmprune_jax.io.families.experts import QWEN3_MOE
from vlmprune_jax.io.families.gemma3 import GEMMA3
from vlmprune_jax.io.families.gemma4 import GEMMA4
from vlmprune_jax.io.families.internvl import INTERNVL_HF, INTERNVL_ORIGINAL
from vlmprune_jax.io.families.lfm2_vl import LFM2, LFM2_VL
from vlmprune_jax.io.families.llama_like import LLAMA, MISTRAL, QWEN2, QWEN3
from vlmprune_jax.io.families.llava import BUNNY, LLAVA_HF, LLAVA_ORIGINAL
from vlmprune_jax.io.families.phi import PHI, PHI3
from vlmprune_jax.io.families.qwen2_5_vl import QWEN2_5_VL
from vlmprune_jax.io.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from vlmprune_jax.io.families.qwen3_vl import QWEN3_VL, QWEN3_VL_MOE
from vlmprune_jax.io.families.smolvlm import SMOLVLM
from vlmprune_jax.io.families.table import FAMILIES, Family, Weight, family_of, target_of
from vlmprune_jax.io.families.templates import Template

FAMILIES.update(
    {
        "llava": LLAVA_HF,
        "llava-original": LLAVA_ORIGINAL,
        "bunny": BUNNY,
        "internvl": INTERNVL_HF,
        "internvl-original": INTERNVL_ORIGINAL,
        **{
            family.name: family
            for family in (
                *(SMOLVLM, QWEN3_VL, QWEN3_VL_MOE, QWEN3_5, QWEN3_5_MOE, QWEN2_5_VL, GEMMA3, GEMMA4, LFM2_VL),
                *(LLAMA, MISTRAL, QWEN2, QWEN3, PHI, PHI3, QWEN3_MOE, LFM2),
            )
        },
    }
)

__all__ = [
    "FAMILIES",
    "Family",
    "Weight",
    "detect",
    "family_of",
    "find",
    "limits",
    "target_of",
    "template_of",
    "templates",
]


def find(config: Mapping[str, Any]) -> Family | None:
    """Return the family whose checkpoint layout a config.json has; None if unknown, the latest added if several."""
    fits = (f for f in FAMILIES.values() if config.get("model_type") in f.model_types and f.matches(config))
    return next(reversed([*fits]), None)


def detect(config: Mapping[str, Any], location: str) -> Family:
    """Return the family whose checkpoint layout a config.json has; raise UserError if unknown."""
    family = find(config)
    if family is not None:
        return family
    code_note = " and needs the repository's own code (auto_map), which is never run here" * ("auto_map" in config)
    known = dict.fromkeys(model_type for family in FAMILIES.values() for model_type in family.model_types)
    raise UserError(
        f"{location}: model_type {config.get('model_type')!r} (architectures {config.get('architectures')}) is not "
        f"supported{code_note}; known: {', '.join(known)}"
    )


def templates() -> dict[str, Template]:
    """Return {name: prompt template} of all model families."""
    return {template.name: template for family in FAMILIES.values() for template in family.templates}


def template_of(family: Family, config: Mapping[str, Any], text_end: str | None) -> Template:
    """Return the prompt template with which the model was trained.

    Args:
      family: family of the checkpoint.
      config: its config.json, which names the template in some families.
      text_end: the tokenizer's end token, which identifies the original family of a converted checkpoint (an exported
        Bunny is a LLaVA).

    Raises UserError if the config names an unknown template.
    """
    named = None if family.template_field is None else config.get(family.template_field)
    if named is None:
        converted = [other for other in FAMILIES.values() if target_of(other) is family]
        candidates = [candidate.templates[0] for candidate in (family, *converted)]
        return next((template for template in candidates if template.assistant_end.rstrip() == text_end), candidates[0])
    known = templates()
    if named not in known:
        raise UserError(f"config.json: prompt template {named!r} is not supported (supported: {', '.join(known)})")
    return known[named]
