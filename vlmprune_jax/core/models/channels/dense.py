"""Multi-layer perceptron: the channel mixer of `Dense` layers."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx

from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.models.context import Context, Names, dropout_masks, lora_of
from vlmprune_jax.core.models.layers import Projection, activation, compute_once
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.core.stack import Stack

_PROJECTIONS = {True: ("gate_proj", "up_proj", "down_proj"), False: ("fc1", "fc2")}


class Mlp(nnx.Module):
    """MLP: down(act(gate(x)) * up(x)), or fc2(act(fc1(x)))."""

    def __init__(self, cfg: Stack, layer: Layer, sizes: Mapping[str, int], names: Names, lora: LoraConfig | None):
        axis, facts = names.axis, layer.channel
        assert isinstance(facts, Dense)
        self.names, self.activation = _PROJECTIONS[facts.gated], facts.activation
        for name in self.names:
            out, into = ((axis,), ("mlp",)) if name == self.names[-1] else (("mlp",), (axis,))
            adapter = lora_of(lora, name)
            setattr(self, name, Projection(sizes, out, into, bias=facts.bias, lora=adapter, clips=cfg.block.clips))

    @property
    def writer(self) -> str:
        """Name of the projection that writes to the residual stream."""
        return self.names[-1]

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array]:
        """Run the MLP; return (output, input of the writer)."""
        projections = [getattr(self, name) for name in self.names]
        first, *up, down = zip(projections, dropout_masks(ctx.dropout_key, x, projections), strict=True)
        hidden = activation(self.activation)(first[0](x, first[1]))
        for projection, mask in up:
            hidden = hidden * projection(x, mask)
        hidden = compute_once(hidden)
        return down[0](hidden, down[1]), hidden
