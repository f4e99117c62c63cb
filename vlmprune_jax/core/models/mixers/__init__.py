"""NNX module of each type of mixer (attention, delta net, convolution), by the config class that describes it."""

from __future__ import annotations

from typing import Any

from flax import nnx

from vlmprune_jax.base.checks import ModuleRegistry
from vlmprune_jax.core.mixers import Attention, DeltaNet, Mixer, ShortConv
from vlmprune_jax.core.models.mixers import attention, delta_net, short_conv

MIXERS: ModuleRegistry[Any] = ModuleRegistry(
    "mixers",
    Mixer,
    nnx.Module,
    {Attention: attention.Attention, DeltaNet: delta_net.DeltaNet, ShortConv: short_conv.ShortConv},
)
