"""NNX module of each type of channel mixer (dense MLP, experts), by the config class that describes the mixer."""

from __future__ import annotations

from typing import Any

from vlmprune_jax.core.channels import Dense, Experts, ExpertsAndShared, ExpertsBesideDense
from vlmprune_jax.core.part import Part
from vlmprune_jax.models.channels import dense, moe

CHANNELS: dict[type[Part], Any] = {
    Dense: dense.Mlp,
    Experts: moe.Moe,
    ExpertsBesideDense: moe.MoeBesideDense,
    ExpertsAndShared: moe.MoeAndShared,
}
