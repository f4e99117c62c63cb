"""NNX module of each kind of mixer and channel mixer, by the config class that describes it."""

from __future__ import annotations

from typing import Any

from flax import nnx

from vlmprune_jax.base.checks import ModuleRegistry
from vlmprune_jax.core.channels import Dense, Experts, ExpertsAndShared, ExpertsBesideDense
from vlmprune_jax.core.mixers import Attention, DeltaNet, ShortConv
from vlmprune_jax.core.models.channels import dense, moe
from vlmprune_jax.core.models.mixers import attention, delta_net, short_conv
from vlmprune_jax.core.part import Part

PARTS: ModuleRegistry[Any] = ModuleRegistry(
    "parts",
    Part,
    nnx.Module,
    {
        Attention: attention.Attention,
        DeltaNet: delta_net.DeltaNet,
        ShortConv: short_conv.ShortConv,
        Dense: dense.Mlp,
        Experts: moe.Moe,
        ExpertsBesideDense: moe.MoeBesideDense,
        ExpertsAndShared: moe.MoeAndShared,
    },
)
