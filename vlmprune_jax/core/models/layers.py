"""Layers of towers and decoders: norms, projections with LoRA or fake quantisation, activations, rotary embedding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mixers import RopeConfig
from vlmprune_jax.core.sections import FakeQuant, LoraConfig

Axes = tuple[str, ...]
Product = Callable[[jax.Array, jax.Array, int], jax.Array]
SAVEABLE = "saveable"
BOUNDS = ("input_min", "input_max", "output_min", "output_max")  # of projections that clip (Gemma 4)


def declare(sizes: Mapping[str, int], axes: Axes) -> nnx.Param:
    """Declare a parameter with named axes; if `sizes` has "layer", it gets a leading layer axis for scans.

    Its value is abstract until a `params` dict fills it.
    """
    if "layer" in sizes:
        axes = ("layer", *axes)
    return nnx.Param(jnp.zeros(tuple(sizes[axis] for axis in axes), jnp.float32), axes=axes)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Return the activation function for a Hugging Face name such as "silu"."""
    return ACTIVATIONS[one_of("activation", name, ACTIVATIONS)]


def widen(x: jax.Array) -> jax.Array:
    """Return x in float32, or unchanged in a wider type."""
    return x.astype(np.promote_types(x.dtype, np.float32))


class Norm(nnx.Module):
    """RMS norm (`kind` "rms") or layer norm ("layer"), with statistics in float32 or wider.

    The result is cast back and then multiplied by the weight. With an `offset`, it is multiplied by weight
    + offset and then cast back, as in Gemma. A layer norm also has a bias.
    """

    def __init__(self, sizes: Mapping[str, int], axis: str, *, kind: str, eps: float, offset: float = 0.0):
        self.weight = declare(sizes, (axis,))
        self.bias = declare(sizes, (axis,)) if kind == "layer" else None
        self.eps, self.offset = eps, offset

    def __call__(self, x: jax.Array, statistics: jax.Array | None = None) -> jax.Array:
        """Return x normalised, by its own statistics or by those passed in `statistics`."""
        full = widen(x)
        if statistics is not None:
            full = (full - statistics[..., :1]) * statistics[..., 1:]
        else:
            full = full if self.bias is None else full - jnp.mean(full, axis=-1, keepdims=True)
            full = full * _rate(full, self.eps)
        gain = broadcast(self.gain, x.ndim)
        y = (full * gain).astype(x.dtype) if self.offset else full.astype(x.dtype) * gain
        return y if self.bias is None else y + broadcast(self.bias.get_value(), x.ndim)

    @property
    def gain(self) -> jax.Array:
        """Factors by which the norm scales each channel (`1 + weight` in Gemma)."""
        weight = self.weight.get_value()
        return widen(weight) + self.offset if self.offset else weight

    def statistics(self, x: jax.Array) -> jax.Array:
        """Return float32[..., 2] for each position: the mean that the norm subtracts from x, and its factor on x."""
        full = widen(x)
        centre = jnp.zeros_like(full[..., :1]) if self.bias is None else jnp.mean(full, axis=-1, keepdims=True)
        return jnp.concatenate([centre, _rate(full - centre, self.eps)], axis=-1)


def _rate(full: jax.Array, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(full * full, axis=-1, keepdims=True) + eps)


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """Divide x by its root mean square over the last axis, computed in float32 or wider."""
    full = widen(x)
    return (full * _rate(full, eps)).astype(x.dtype)


class Leaf(nnx.Module):
    """Module with a single parameter `weight`, such as position embeddings or a convolution kernel."""

    def __init__(self, sizes: Mapping[str, int], axes: Axes):
        self.weight = declare(sizes, axes)


def broadcast(x: jax.Array, ndim: int) -> jax.Array:
    """Add leading axes of size 1 to x until it has `ndim` axes."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


class Projection(nnx.Module):
    """Linear layer between named axes, with weights in Hugging Face's (out, in) order and an optional LoRA adapter.

    The adapter is added to the output and never merged into the weight: a merged weight would make the backward pass
    build the full weight gradient. `product` multiplies inputs and weight: `contract`, or a similar function with a
    custom gradient (for scoring). With `clips`, learned bounds limit inputs and outputs.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        out: Axes,
        into: Axes,
        *,
        bias: bool,
        lora: LoraConfig | None = None,
        clips: bool = False,
    ):
        self.weight = declare(sizes, out + into)
        self.clips = clips
        for name in BOUNDS if clips else ():
            setattr(self, name, declare({**sizes, "unit": 1}, ("unit",)))
        self.inputs = tuple(sizes[axis] for axis in into)
        self.bias = declare(sizes, out) if bias else None
        self.lora = lora
        self.product: Product = contract
        if lora is not None:
            ranked = {**sizes, "rank": lora.rank}
            self.lora_a, self.lora_b = declare(ranked, ("rank", *into)), declare(ranked, (*out, "rank"))

    @property
    def dropout(self) -> float:
        """Probability with which training sets an input of the LoRA adapter to zero."""
        return 0.0 if self.lora is None else self.lora.dropout

    def __call__(self, x: jax.Array, dropout_mask: jax.Array | None = None) -> jax.Array:
        """Apply the linear layer; `dropout_mask` is True for adapter inputs that are kept (None = all)."""
        y = self.product(self._bounded(x, "input"), self.weight.get_value(), len(self.inputs))
        if self.bias is not None:
            y = y + broadcast(self.bias.get_value(), y.ndim)
        if self.lora is not None:
            # Scaled where it is narrow: scaling `x` or `y` is a pass over the widest arrays, here and in the gradient.
            scale = self.lora.alpha / self.lora.rank
            if dropout_mask is not None:
                x, scale = jnp.where(dropout_mask, x, jnp.zeros_like(x)), scale / (1 - self.lora.dropout)
            low = saveable(contract(x, self.lora_a.get_value(), len(self.inputs)) * scale)
            y = y + _expand(low, self.lora_b.get_value())
        return saveable(_compute_gradient_once(self._bounded(y, "output")))

    def _bounded(self, x: jax.Array, side: str) -> jax.Array:
        if not self.clips:
            return x
        low, high = (getattr(self, f"{side}_{end}").get_value().reshape(()).astype(x.dtype) for end in ("min", "max"))
        return jnp.clip(x, low, high)


def compute_once(x: jax.Array) -> jax.Array:
    """Keep XLA from computing `x` or its gradient more than once, by optimisation barriers.

    XLA otherwise copies the norm, activation or sum that computes `x` into each of its consumers. Compiling a layer of
    a 7B model with adapters for a v5e took 63 CPU seconds with copies, and 51 without (decision 50).
    """
    return jax.lax.optimization_barrier(x)


@jax.custom_vjp
def _compute_gradient_once(x: jax.Array) -> jax.Array:
    """Keep XLA from computing the gradient of `x` more than once; the forward computation may still be fused."""
    return x


_compute_gradient_once.defvjp(lambda x: (x, None), lambda _, grad: (compute_once(grad),))


def saveable(x: jax.Array) -> jax.Array:
    """Mark `x` as a value to store under rematerialisation policy "dots" (costly, or random as dropout masks)."""
    return checkpoint_name(x, SAVEABLE)


@functools.partial(jax.jit, inline=True)
def at_layer(stacked: Any, index: Any) -> Any:
    """Return entry `index` of every array in a pytree."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stacked)


def contract(x: jax.Array, weight: jax.Array, n: int) -> jax.Array:
    """Multiply by a weight over its last `n` axes: `[..., in] x [out, in] -> [..., out]`."""
    left = tuple(range(x.ndim - n, x.ndim))
    right = tuple(range(weight.ndim - n, weight.ndim))
    return jax.lax.dot_general(x, weight, ((left, right), ((), ())))


# Rounding in training by the names of integer formats; the packages that know such formats add theirs.
FAKE_QUANTS: dict[str, Callable[[ModelConfig], FakeQuant]] = {}


def fake_quant_product(fake_quant: FakeQuant) -> Product:
    """Return a matrix product that rounds inputs and weight to integers (quantisation-aware training).

    Gradients pass the rounding unchanged (the straight-through estimator of Bengio et al., arXiv 1308.3432), including
    the gradients of the values that determine a scale.
    """

    def product(x: jax.Array, weight: jax.Array, n: int) -> jax.Array:
        columns = math.prod(weight.shape[weight.ndim - n :])
        if columns % (fake_quant.group or 1):
            return contract(x, weight, n)
        if fake_quant.activations:
            x = _replace(x, _nearest(x, columns, 8))
        return contract(x, _replace(weight, _nearest(weight, fake_quant.group or columns, fake_quant.bits)), n)

    return product


def _nearest(values: jax.Array, group: int, bits: int) -> jax.Array:
    """Quantise values to the nearest integer codes with one scale per `group` values, and dequantise them again.

    The scale and its rounding are those of `CompressedTensors.grid` without zero points.
    """
    groups = values.reshape(-1, group).astype(jnp.float32)
    steps = 2**bits - 1
    scale = _divide(jnp.max(jnp.abs(groups), axis=1, keepdims=True), jnp.float32(steps / 2))
    scale = scale.astype(values.dtype).astype(jnp.float32)
    scale = jnp.where(scale == 0, 1.0, scale)
    codes = jnp.clip(jnp.rint(_divide(groups, scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scale).astype(values.dtype).reshape(values.shape)


def _divide(x: jax.Array, by: jax.Array) -> jax.Array:
    """Return x / by correctly rounded (XLA would multiply by the reciprocal instead)."""
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(by, x.shape))


@jax.custom_vjp
def _replace(x: jax.Array, by: jax.Array) -> jax.Array:
    """Return `by` in the forward pass, with gradients passed to `x` (straight-through estimator)."""
    return by


_replace.defvjp(lambda x, by: (by, None), lambda _, grad: (grad, None))


@jax.custom_vjp
def _expand(low: jax.Array, b: jax.Array) -> jax.Array:
    """Apply the second LoRA matrix: `[..., rank] x [out, rank] -> [..., out]`.

    Its gradient is jax's own but for the order of operands: XLA:CPU transposes the first, which in jax's is the wide
    gradient of the output and here the narrow `low` (8 % of a step of SmolLM2-135M). TPUs are indifferent.
    """
    return contract(low, b, 1)


def _expand_forward(low: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _expand(low, b), (low, b)


def _expand_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, b = saved
    tokens = tuple(range(low.ndim - 1))
    grad_b = jnp.tensordot(low, grad, (tokens, tokens))
    return jnp.tensordot(grad, b, b.ndim - 1), jnp.moveaxis(grad_b, 0, -1)


_expand.defvjp(_expand_forward, _expand_backward)


def inverse_frequencies(rope: RopeConfig, rotary_dim: int, long: bool = False) -> np.ndarray:
    """Return the rotary frequencies, float32[rotary_dim/2], as transformers' `modeling_rope_utils` does.

    `long`: use LongRoPE's long factors.
    """
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    base = 1.0 / rope.theta**exponent
    if rope.kind == "longrope":
        factors = np.asarray(rope.long_factors if long else rope.short_factors, np.float32)
        # operations in the order of transformers, so that rounding is equal
        return (1.0 / (factors * (rope.theta**exponent).astype(np.float32))).astype(np.float32)
    if rope.kind == "linear":
        base = base / rope.factor
    elif rope.kind == "llama3":
        wavelength, old = 2 * math.pi / base, rope.original_max_positions
        smooth = (old / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        mixed = (1 - smooth) * base / rope.factor + smooth * base
        base = np.where(wavelength > old / rope.low_freq_factor, base / rope.factor, base)
        middle = (wavelength <= old / rope.low_freq_factor) & (wavelength >= old / rope.high_freq_factor)
        base = np.where(middle, mixed, base)
    elif rope.kind == "yarn":

        def dimension(rotations: float) -> float:
            turns = rope.original_max_positions / (rotations * 2 * math.pi)
            return rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

        low, high = (
            max(math.floor(dimension(rope.beta_fast)), 0),
            min(math.ceil(dimension(rope.beta_slow)), rotary_dim - 1),
        )
        ramp = np.clip((np.arange(rotary_dim // 2) - low) / max(high - low, 0.001), 0, 1)
        base = base / rope.factor * ramp + base * (1 - ramp)
    elif rope.kind == "proportional":
        base = np.where(np.arange(len(base)) < int(rope.rotated * rotary_dim // 2), base / rope.factor, 0.0)
    return base.astype(np.float32)


def rope_tables(rope: RopeConfig, rotary_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the rotary cosines and sines, float32[batch, seq, rotary_dim/2] each.

    `positions`: int[batch, seq], or int[batch, 3, seq] with frame, row and column; `rope.sections` assigns one of these
    three to each frequency.
    """
    frequencies = jnp.asarray(inverse_frequencies(rope, rotary_dim))
    if rope.kind == "longrope":
        is_long = jnp.max(positions) >= rope.original_max_positions
        frequencies = jnp.where(is_long, jnp.asarray(inverse_frequencies(rope, rotary_dim, long=True)), frequencies)
    turned = positions.astype(jnp.float32)
    turned = turned[..., None] if turned.ndim == 2 else jnp.swapaxes(turned, 1, 2)[..., section_axes(rope)]
    angles = turned * frequencies[None, None, :]
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def section_axes(rope: RopeConfig) -> np.ndarray:
    """Return which M-RoPE position (0: frame, 1: row, 2: column) each frequency uses, int[rotary_dim/2]."""
    blocks = np.repeat(np.arange(3), rope.sections)
    if not rope.interleaved:
        return blocks
    axes = np.zeros_like(blocks)
    for axis in (1, 2):
        axes[axis : 3 * rope.sections[axis] : 3] = axis
    return axes


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, parts: int = 1) -> jax.Array:
    """Apply rotary embedding (half-split form) to the first channels of `[batch, seq, heads, head]`.

    Twice as many channels as `cos` has are rotated; with `parts`, each part of the head independently.
    """
    if parts > 1:
        cut = [jnp.split(array, parts, axis=-1) for array in (x, cos, sin)]
        return jnp.concatenate([rotate(*piece) for piece in zip(*cut, strict=True)], axis=-1)
    rotary_dim = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = jnp.split(turned, 2, axis=-1)
    cos, sin = cos[:, :, None, :].astype(x.dtype), sin[:, :, None, :].astype(x.dtype)
    turned_parts = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned_parts + ([rest] if rest.shape[-1] else []), axis=-1)
