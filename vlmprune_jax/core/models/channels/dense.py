"""Multi-layer perceptron: the channel mixer of `Dense` layers."""

from __future__ import annotations

import jax
from flax import nnx

from vlmprune_jax.core.models.context import Builder, Context, dropout_masks
from vlmprune_jax.core.models.layers import activation, compute_once


class Mlp(nnx.Module):
    """MLP: down(act(gate(x)) * up(x)), or fc2(act(fc1(x)))."""

    def __init__(self, build: Builder):
        self.names = ("gate_proj", "up_proj", "down_proj") if build.part.gated else ("fc1", "fc2")
        self.activation, self.writer = build.part.activation, self.names[-1]
        for name in self.names:
            axes = (build.names.axis,), ("mlp",)
            out, into = axes if name == self.writer else axes[::-1]
            setattr(self, name, build.projection(name, out, into, build.part.bias))

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array]:
        """Run the MLP; return (output, input of the writer)."""
        projections = [getattr(self, name) for name in self.names]
        first, *up, down = zip(projections, dropout_masks(ctx.dropout_key, x, projections), strict=True)
        hidden = activation(self.activation)(first[0](x, first[1]))
        for projection, mask in up:
            hidden = hidden * projection(x, mask)
        hidden = compute_once(hidden)
        return down[0](hidden, down[1]), hidden
