"""NNX module of each type of channel mixer (dense MLP, experts), by the config class that describes the mixer."""

from __future__ import annotations

from typing import Any

from flax import nnx

from vlmprune_jax.base.checks import ModuleRegistry
from vlmprune_jax.core.channels import ChannelMixer, Dense, Experts, ExpertsAndShared, ExpertsBesideDense
from vlmprune_jax.core.models.channels import dense, moe

CHANNELS: ModuleRegistry[Any] = ModuleRegistry(
    "channels",
    ChannelMixer,
    nnx.Module,
    {
        Dense: dense.Mlp,
        Experts: moe.Moe,
        ExpertsBesideDense: moe.MoeBesideDense,
        ExpertsAndShared: moe.MoeAndShared,
    },
)
