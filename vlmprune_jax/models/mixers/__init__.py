"""Mixers by the part that describes them."""

from __future__ import annotations

from typing import Any

from vlmprune_jax.core.parts import Attention, Part
from vlmprune_jax.models.mixers import attention

MIXERS: dict[type[Part], Any] = {Attention: attention.Attention}
