"""NNX module of each type of mixer (attention, delta net, convolution), by the config class that describes it."""

from __future__ import annotations

from typing import Any

from vlmprune_jax.core.mixers import Attention, DeltaNet, ShortConv
from vlmprune_jax.core.part import Part
from vlmprune_jax.models.mixers import attention, delta_net, short_conv

MIXERS: dict[type[Part], Any] = {
    Attention: attention.Attention,
    DeltaNet: delta_net.DeltaNet,
    ShortConv: short_conv.ShortConv,
}
