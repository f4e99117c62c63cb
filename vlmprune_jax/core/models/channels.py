"""Channel mixers of transformer blocks: dense MLP, mixture of experts, and combinations of both.

Only the chosen experts are computed. Tokens are sorted by expert; on TPUs `lax.ragged_dot` multiplies each expert's
rows by its weights. On CPUs it would multiply all rows by all experts, so there a scan multiplies blocks of rows, each
of one expert: tokens x experts per token rows, and at most one block of padding per expert.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.mesh.mesh import row_ways
from vlmprune_jax.core.mesh.rules import spec
from vlmprune_jax.core.models.context import Builder, Context, Routed, dropout_masks
from vlmprune_jax.core.models.kernels import for_tpu
from vlmprune_jax.core.models.layers import Leaf, activation, broadcast, compute_once, declare, unit_rms, widen
from vlmprune_jax.core.sections import LoraConfig

_SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 128  # rows of a block
# Gate and up [experts, neurons, embed], down [experts, embed, neurons].
Weights = tuple[jax.Array, ...]


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


class ExpertProjection(Leaf):
    """One matrix per expert, each with an optional LoRA adapter (without dropout)."""

    def __init__(self, sizes: Mapping[str, int], out: str, into: str, lora: LoraConfig | None):
        super().__init__(sizes, ("experts", out, into))
        self.lora = lora
        if lora is not None:
            ranked = {**sizes, "rank": lora.rank}
            self.lora_a = declare(ranked, ("experts", "rank", into))
            self.lora_b = declare(ranked, ("experts", out, "rank"))

    @property
    def array(self) -> jax.Array:
        """The experts' matrices with their adapters added, [experts, out, into]."""
        weight = self.weight.get_value()
        if self.lora is None:
            return weight
        change = jnp.einsum("eor,eri->eoi", self.lora_b.get_value(), self.lora_a.get_value())
        return weight + change.astype(weight.dtype) * (self.lora.alpha / self.lora.rank)


class Moe(nnx.Module):
    """Sum over a token's chosen experts of gate * down(act(gate_proj(x)) * up(x))."""

    writer = "experts/down_proj"

    def __init__(self, build: Builder):
        self.part = build.part
        self.router = Leaf(build.sizes, ("experts", build.names.axis))
        each, into = {**build.sizes, "expert_mlp": self.part.neurons}, ("expert_mlp", build.names.axis)
        axes = {"gate_proj": into, "up_proj": into, "down_proj": into[::-1]}
        self.experts = nnx.Dict({name: ExpertProjection(each, *axes[name], build.lora_of(name)) for name in axes})

    def choose(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Route every token: return the numbers and gates of its chosen experts, [batch, seq, top_k] each."""
        logits = jnp.einsum("bsh,eh->bse", x, self.router.weight.get_value())
        gates, experts = jax.lax.top_k(jax.nn.softmax(widen(logits), axis=-1), self.part.top_k)
        if self.part.renormalise:
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        return experts, gates

    def compute(self, x: jax.Array, experts: jax.Array, gates: jax.Array) -> tuple[jax.Array, Routed]:
        """Return the gated sum of the chosen experts' outputs, and the routing (`Routed`)."""
        weights = tuple(self.experts[name].array for name in ("gate_proj", "up_proj", "down_proj"))
        out, norms = run_experts(x, experts, gates, weights, self.part.activation)
        return out, Routed(experts, gates, norms, x)

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, Routed]:
        """Run router and experts; return (output, routing)."""
        del ctx
        experts, gates = self.choose(x)
        return self.compute(x, experts, gates.astype(x.dtype))


class MoeAndShared(Moe):
    """Mixture of experts with a shared expert: experts(x) + sigmoid(gate(x)) * shared expert(x)."""

    def __init__(self, build: Builder):
        super().__init__(build)
        self.dense = Mlp(build._replace(part=Dense(self.part.mlp, activation=self.part.activation)))
        self.dense_gate = Leaf({**build.sizes, "unit": 1}, ("unit", build.names.axis))

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, Routed]:
        """Run shared expert, router and experts; return (output, routing)."""
        out, routed = super().__call__(x, ctx)
        gate = jax.nn.sigmoid(jnp.einsum("bsh,uh->bsu", x, self.dense_gate.weight.get_value()))
        dense, hidden = self.dense(x, ctx)
        return out + gate * dense, routed._replace(shared=gate * hidden)


class MoeBesideDense(Moe):
    """Experts beside a dense MLP: norm(MLP(x)) + norm(experts(norm(stream))); the router reads the residual stream."""

    def __init__(self, build: Builder):
        super().__init__(build)
        self.dense = Mlp(build._replace(part=Dense(self.part.mlp, activation=self.part.activation)))
        self.eps = build.cfg.block.norm_eps
        norms = (build.norm(build.names.axis) for _ in range(3))
        self.dense_output_norm, self.experts_norm, self.experts_output_norm = norms
        self.router_scale = Leaf(build.sizes, (build.names.axis,))
        self.expert_scale = Leaf(build.sizes, ("experts",))

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, Routed]:
        """Run dense MLP, router and experts; return (output, routing)."""
        stream = ctx.stream
        assert stream is not None
        scale = broadcast(self.router_scale.weight.get_value(), 3) * jnp.asarray(x.shape[-1] ** -0.5, x.dtype)
        experts, gates = self.choose(unit_rms(stream, self.eps) * scale)
        gates = gates * self.expert_scale.weight.get_value().astype(gates.dtype)[experts]
        out, routed = self.compute(self.experts_norm(stream), experts, gates)
        return self.dense_output_norm(self.dense(x, ctx)[0]) + self.experts_output_norm(out), routed


def run_experts(
    x: jax.Array, experts: jax.Array, gates: jax.Array, weights: Weights, act: str
) -> tuple[jax.Array, jax.Array]:
    """Return each token's gated sum over experts, float[batch, seq, embed], and the output norms of its k experts.

    On a mesh, every device computes its own rows of the batch. The weights of all experts are gathered over `fsdp`, and
    the experts' neurons are split over `tensor`.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def on_device(x: jax.Array, experts: jax.Array, gates: jax.Array, weights: Weights) -> tuple[jax.Array, jax.Array]:
        k, tokens = experts.shape[-1], x.reshape(-1, x.shape[-1])
        out, outputs = _gated_sum(act, tokens, experts.reshape(-1, k), gates.reshape(-1, k), weights)
        outputs = jax.lax.stop_gradient(outputs).astype(jnp.float32)
        if not mesh.empty and mesh.shape["tensor"] > 1:  # which shards the experts' neurons
            out, outputs = jax.lax.psum((out, outputs), "tensor")
        return out.reshape(x.shape), jnp.linalg.norm(outputs, axis=-1).reshape(experts.shape)

    run: Any = on_device
    if not mesh.empty:
        rows = spec(("batch" if x.shape[0] % row_ways(mesh) == 0 else None, None, None))
        into, down = PartitionSpec(None, "tensor", None), PartitionSpec(None, None, "tensor")
        specs = (rows, rows, rows, (into, into, down))
        run = jax.shard_map(on_device, in_specs=specs, out_specs=(rows, rows), check_vma=False)
    result: tuple[jax.Array, jax.Array] = run(x, experts, gates, weights)
    return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_sum(
    act: str, x: jax.Array, experts: jax.Array, gates: jax.Array, weights: Weights
) -> tuple[jax.Array, jax.Array]:
    """Return each token's gated sum over its chosen experts, float[tokens, embed], and the experts' outputs.

    The backward pass computes the experts again instead of storing their activations. The experts' outputs
    [tokens, k, embed] get no gradient.
    """
    outputs = _ragged(act, x, experts, weights) if for_tpu() else _scanned(act, x, experts, weights)
    return _weighted(gates, outputs, x.dtype), outputs


def _weighted(gates: jax.Array, outputs: jax.Array, dtype: np.dtype) -> jax.Array:
    return jnp.einsum("tke,tk->te", widen(outputs), widen(gates)).astype(dtype)


def _forward(act: str, *arguments: Any) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    return _gated_sum(act, *arguments), arguments


def _backward(act: str, saved: tuple[Any, ...], grads: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    x, experts, gates, weights = saved
    if for_tpu():
        _, pull = jax.vjp(
            lambda x, gates, weights: _weighted(gates, _ragged(act, x, experts, weights), x.dtype), x, gates, weights
        )
        grad_x, grad_gates, grad_weights = pull(grads[0])
    else:
        grad_x, grad_gates, grad_weights = _scanned_backward(act, x, experts, gates, weights, grads[0])
    return grad_x, None, grad_gates, grad_weights


_gated_sum.defvjp(_forward, _backward)


def _ragged(act: str, x: jax.Array, experts: jax.Array, weights: Weights) -> jax.Array:
    """Return the experts' outputs [tokens, k, embed] by ragged products of rows sorted by expert."""
    k, order = experts.shape[-1], jnp.argsort(experts.reshape(-1), stable=True)
    counts = jnp.bincount(experts.reshape(-1), length=len(weights[0])).astype(jnp.int32)
    rows = x[order // k]
    gate, up, down = (weight.swapaxes(1, 2) for weight in weights)
    hidden = activation(act)(jax.lax.ragged_dot(rows, gate, counts)) * jax.lax.ragged_dot(rows, up, counts)
    return jax.lax.ragged_dot(hidden, down, counts)[jnp.argsort(order)].reshape(*experts.shape, -1)


class _Blocks(NamedTuple):
    """Assignments of tokens to experts, sorted into blocks of rows that use the same expert."""

    rows: jax.Array
    """int32[blocks, rows of a block], number of each row: token * k + choice; tokens * k for padding."""

    experts: jax.Array
    """int32[blocks], expert of a block."""

    positions: jax.Array
    """int32[tokens, k], position of each row in the flattened `rows`."""


def blocks_of(experts: jax.Array, n_experts: int) -> _Blocks:
    """Sort the assignments of tokens to experts into blocks of one expert each; `experts`: int[tokens, k]."""
    n = experts.size
    block = min(max(1 << (n // n_experts - 1).bit_length(), _SMALLEST_BLOCK), _LARGEST_BLOCK)
    n_blocks = n // block + min(n_experts, n)  # enough for any distribution of the rows over experts
    chosen = experts.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    counts = jnp.bincount(chosen, length=n_experts)
    stops = jnp.cumsum(-(-counts // block))
    rank = jnp.arange(n) - (jnp.cumsum(counts) - counts)[chosen[order]]  # among the rows of its expert
    positions = (stops - -(-counts // block))[chosen[order]] * block + rank
    rows = jnp.full(n_blocks * block, n).at[positions].set(order)
    of_block = jnp.minimum(jnp.searchsorted(stops, jnp.arange(n_blocks), side="right"), n_experts - 1)
    by_token = jnp.zeros(n, positions.dtype).at[order].set(positions).reshape(experts.shape)
    return _Blocks(rows.reshape(n_blocks, block), of_block, by_token)


def hidden_of(act: str, x: jax.Array, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return the activations act(gate(x)) * up(x) of one expert, the input of its down projection."""
    return activation(act)(x @ gate.T) * (x @ up.T)


def _scanned(act: str, x: jax.Array, experts: jax.Array, weights: Weights) -> jax.Array:
    """Return the experts' outputs [tokens, k, embed] by a scan over blocks of rows."""
    blocks, k = blocks_of(experts, len(weights[0])), experts.shape[-1]

    def body(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        rows, expert = block
        x_rows, (gate, up, down) = x.at[rows // k].get(mode="fill", fill_value=0), (w[expert] for w in weights)
        return None, hidden_of(act, x_rows, gate, up) @ down.T

    _, outputs = jax.lax.scan(body, None, (blocks.rows, blocks.experts))
    return outputs.reshape(-1, outputs.shape[-1])[blocks.positions]


def _scanned_backward(
    act: str, x: jax.Array, experts: jax.Array, gates: jax.Array, weights: Weights, grad: jax.Array
) -> tuple[jax.Array, jax.Array, Weights]:
    """Return the gradients of `_gated_sum`, by a scan over blocks; each block adds to the gradient of one expert."""
    blocks, k = blocks_of(experts, len(weights[0])), experts.shape[-1]

    def product(x: jax.Array, gates: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return (widen(hidden_of(act, x, gate, up) @ down.T) * widen(gates)[:, None]).astype(x.dtype)

    def body(sums: Weights, block: tuple[jax.Array, jax.Array]) -> tuple[Weights, tuple[jax.Array, jax.Array]]:
        rows, expert = block
        x_rows, grad_rows = (array.at[rows // k].get(mode="fill", fill_value=0) for array in (x, grad))
        gates_rows = gates.reshape(-1).at[rows].get(mode="fill", fill_value=0)
        _, pull = jax.vjp(product, x_rows, gates_rows, *(w[expert] for w in weights))
        grad_x, grad_gates, *grad_weights = pull(grad_rows)
        added = (s.at[expert].add(widen(g)) for s, g in zip(sums, grad_weights, strict=True))
        return tuple(added), (grad_x, grad_gates)

    zeros = tuple(jnp.zeros(w.shape, widen(w[:1, :1, :1]).dtype) for w in weights)
    sums, (grad_x, grad_gates) = jax.lax.scan(body, zeros, (blocks.rows, blocks.experts))
    total = jnp.sum(widen(grad_x.reshape(-1, x.shape[-1])[blocks.positions]), axis=1).astype(x.dtype)
    grad_weights = tuple(s.astype(w.dtype) for s, w in zip(sums, weights, strict=True))
    return total, grad_gates.reshape(-1)[blocks.positions], grad_weights
