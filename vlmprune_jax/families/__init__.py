"""The families that can be read, pruned and written, each with every fact of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.families.bunny import BUNNY
from vlmprune_jax.families.internvl import INTERNVL_HF, INTERNVL_ORIGINAL
from vlmprune_jax.families.llama import LLAMA
from vlmprune_jax.families.llava import LLAVA_HF, LLAVA_ORIGINAL
from vlmprune_jax.families.mistral import MISTRAL
from vlmprune_jax.families.phi import PHI
from vlmprune_jax.families.phi3 import PHI3
from vlmprune_jax.families.qwen2 import QWEN2
from vlmprune_jax.families.qwen2_5_vl import QWEN2_5_VL
from vlmprune_jax.families.qwen3 import QWEN3
from vlmprune_jax.families.qwen3_vl import QWEN3_VL
from vlmprune_jax.families.smolvlm import SMOLVLM
from vlmprune_jax.families.table import FAMILIES, Family, Weight
from vlmprune_jax.families.templates import Template

FAMILIES.update(
    {
        "llava": LLAVA_HF,
        "llava-original": LLAVA_ORIGINAL,
        "bunny": BUNNY,
        "internvl": INTERNVL_HF,
        "internvl-original": INTERNVL_ORIGINAL,
        "smolvlm": SMOLVLM,
        "qwen3_vl": QWEN3_VL,
        "qwen2_5_vl": QWEN2_5_VL,
        **{one.name: one for one in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI, PHI3)},
    }
)

__all__ = ["FAMILIES", "Family", "Weight", "detect", "family_of", "find", "target_of", "template_of", "templates"]


def find(config: Mapping[str, Any]) -> Family | None:
    """The family whose layout a config.json describes, the one that was added last, or None."""
    fits = (f for f in FAMILIES.values() if config.get("model_type") in f.model_types and f.matches(config))
    return next(reversed([*fits]), None)


def detect(config: Mapping[str, Any], where: str) -> Family:
    """The family whose layout a config.json describes.

    Raises:
      UserError: no family matches; the message lists what is known.
    """
    family = find(config)
    if family is not None:
        return family
    own = " and is loaded by the repository's own code (auto_map), which is never run here" * ("auto_map" in config)
    layouts: dict[str, list[str]] = {}
    for one in FAMILIES.values():
        for model_type in one.model_types:
            layouts.setdefault(model_type, []).append(one.layout)
    known = [f"{name} ({' and '.join(found)} layouts)" if len(found) > 1 else name for name, found in layouts.items()]
    raise UserError(
        f"{where}: model_type {config.get('model_type')!r} (architectures {config.get('architectures')}) is not "
        f"supported{own}; known: {', '.join(known)}"
    )


def family_of(cfg: ModelConfig) -> Family:
    """The family that a ModelConfig came from.

    Raises:
      UserError: it is not there: the file that adds it was not imported.
    """
    for family in reversed(FAMILIES.values()):
        if (family.name, family.layout) == (cfg.family, cfg.layout):
            return family
    raise UserError(
        f"there is no family {cfg.family!r} in {cfg.layout} layout (there is {', '.join(FAMILIES)}): import the file "
        "that adds it"
    )


def target_of(family: Family) -> Family | None:
    """The family of transformers that a hub layout is converted to, or None where it has none.

    Raises:
      UserError: it is not there, or takes no models of other layouts.
    """
    if family.conversion is None:
        return None
    found = FAMILIES.get(family.conversion.to)
    if found is None or found.stock is None or found.stock.processor is None:
        takers = [key for key, one in FAMILIES.items() if one.stock is not None and one.stock.processor is not None]
        raise UserError(
            f"family {family.name} is converted to {family.conversion.to!r}, which takes no models of other layouts "
            f"(these do: {', '.join(takers)})"
        )
    return found


def templates() -> dict[str, Template]:
    """The prompt formats of all families by name."""
    return {template.name: template for family in FAMILIES.values() for template in family.templates}


def template_of(family: Family, config: Mapping[str, Any], text_end: str | None) -> Template:
    """The prompt format that a model was trained with.

    `config`: its config.json, which names one in some families. `text_end`: the token that ends its texts, which tells
    whose a model is that was converted from a hub's layout (an exported Bunny is a LLaVA).

    Raises:
      UserError: the config names one that is not known.
    """
    named = None if family.template_field is None else config.get(family.template_field)
    if named is None:
        converted = [other for other in FAMILIES.values() if target_of(other) is family]
        own = [one.templates[0] for one in (family, *converted)]
        return next((template for template in own if template.assistant_end.rstrip() == text_end), own[0])
    known = templates()
    if named not in known:
        raise UserError(f"config.json: prompt template {named!r} is not supported (supported: {', '.join(known)})")
    return known[named]
