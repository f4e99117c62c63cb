"""The reference's recovery of each family, by the family's name: what a config may start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.checks import suggest
from vlmprune_jax.errors import UserError
from vlmprune_jax.families import FAMILIES


def recipes() -> dict[str, Mapping[str, Any]]:
    """The recipes of all families that have one, each a partial experiment."""
    return {family.name: family.recipe for family in FAMILIES.values() if family.recipe is not None}


def recipe(name: str) -> Mapping[str, Any]:
    """The settings of a recipe, to start a config or a variant from.

    Raises:
      UserError: an unknown name, with the nearest that exists.
    """
    known = recipes()
    if name not in known:
        raise UserError(f"no recipe {name!r}{suggest(name, known)}")
    return known[name]
