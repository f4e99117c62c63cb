"""Vision towers (CLIP, SigLIP, InternViT, SmolVLM's, Qwen's; their computed part)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmprune_jax.core.config import LayerShape, VisionConfig, runs
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.models.attention import for_tpu, splash_attention, xla_attention
from vlmprune_jax.models.decoder import Block, Tap
from vlmprune_jax.models.layers import LayerNorm, Projection, RMSNorm, activation, declare, rotate
from vlmprune_jax.models.patches import Places, axial_angles, places_of, resampled, windows_of

# Weights that write to the residual stream -> the scale of what they write, in towers that have one (InternViT).
SCALES = {"self_attn/out_proj/weight": "layer_scale1/weight", "mlp/fc2/weight": "layer_scale2/weight"}
# Keys' cubic kernel as torch has it (jax.image.resize uses -0.5).
_CUBIC = -0.75


class VisionContext(NamedTuple):
    """What every block of a tower shares in one forward pass.

    `segments`: per window (0 = none) int32[images, positions], a position looks at those of its own number; of padding
    -1. None: at all. `cos`, `sin`: float32[images, positions, head / 2], where rows and columns turn queries and keys.
    """

    segments: dict[int, jax.Array] | None = None
    cos: jax.Array | None = None
    sin: jax.Array | None = None


NORMS = {"layer": LayerNorm, "rms": RMSNorm}
NOWHERE = VisionContext()  # of whole images of one size


class Leaf(nnx.Module):
    """A parameter that is not part of a projection or norm."""

    def __init__(self, sizes: Mapping[str, int], axes: tuple[str, ...]):
        self.weight = declare(sizes, axes)


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel: one linear map per patch; a rest beyond the last patch is not read."""

    def __init__(self, cfg: VisionConfig, sizes: Mapping[str, int]):
        frames = ("temporal",) if cfg.any_size else ()
        self.weight = declare(sizes, ("vision", "channel", *frames, "patch_row", "patch_column"))
        self.bias = declare(sizes, ("vision",)) if cfg.patch_bias else None

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """float[images, rows * columns, vision] of float[images, channel, height, width].

        Patches, [images, patches, channel * temporal * row * column], are taken as they come.
        """
        weight = self.weight.get_value()
        if pixels.ndim == 3:
            x = pixels @ weight.reshape(len(weight), -1).T
            return x if self.bias is None else x + self.bias.get_value()[None, None]
        width, channels, patch = weight.shape[:3]
        n, rows, columns = pixels.shape[0], pixels.shape[2] // patch, pixels.shape[3] // patch
        pixels = pixels[:, :, : rows * patch, : columns * patch]
        patches = pixels.reshape(n, channels, rows, patch, columns, patch).transpose(0, 2, 4, 1, 3, 5)
        x = patches.reshape(n, rows * columns, -1) @ weight.reshape(width, -1).T
        return x if self.bias is None else x + self.bias.get_value()[None, None]


class VisionAttention(nnx.Module):
    """Bidirectional attention, over the positions that bool[images, positions] `real` names (None: all), or over those
    of the same segment.
    """

    def __init__(self, cfg: VisionConfig, sizes: Mapping[str, int], window: int):
        into = ("vision",)
        self.window = window
        self.q_proj = Projection(sizes, ("q_heads", "head"), into, bias=cfg.qkv_bias)
        self.k_proj = Projection(sizes, ("kv_heads", "head"), into, bias=cfg.qkv_bias)
        self.v_proj = Projection(sizes, ("kv_heads", "head"), into, bias=cfg.qkv_bias)
        self.out_proj = Projection(sizes, into, ("q_heads", "head"), bias=True)

    def __call__(
        self, x: jax.Array, real: jax.Array | None, context: VisionContext = NOWHERE
    ) -> tuple[jax.Array, jax.Array]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if context.cos is not None and context.sin is not None:
            q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        segments = None if context.segments is None else context.segments[self.window]
        if for_tpu():
            mixed = splash_attention(q, k, v, real, causal=False, segments=segments)
        elif segments is not None:
            mixed = xla_attention(q, k, v, (segments[:, :, None] == segments[:, None])[:, None])
        else:
            mixed = xla_attention(q, k, v, None if real is None else real[:, None, None])
        return self.out_proj(mixed), mixed


class VisionMlp(nnx.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, cfg: VisionConfig, sizes: Mapping[str, int]):
        self.fc1 = Projection(sizes, ("mlp",), ("vision",), bias=True)
        self.fc2 = Projection(sizes, ("vision",), ("mlp",), bias=True)
        self.activation = cfg.activation

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = activation(self.activation)(self.fc1(x))
        return self.fc2(hidden), hidden


class VisionGatedMlp(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, cfg: VisionConfig, sizes: Mapping[str, int]):
        self.gate_proj = Projection(sizes, ("mlp",), ("vision",), bias=True)
        self.up_proj = Projection(sizes, ("mlp",), ("vision",), bias=True)
        self.down_proj = Projection(sizes, ("vision",), ("mlp",), bias=True)
        self.activation = cfg.activation

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = activation(self.activation)(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(hidden), hidden


class VisionLayer(nnx.Module):
    """One pre-norm block, stacked for a scan over equal ones; InternViT scales each branch channel by channel."""

    def __init__(self, cfg: VisionConfig, shape: LayerShape, length: int):
        sizes = {
            "layer": length,
            "vision": cfg.hidden_size,
            "head": cfg.head_dim,
            "q_heads": shape.q_heads,
            "kv_heads": shape.kv_heads,
            "mlp": shape.mlp,
        }
        self.layer_norm1 = NORMS[cfg.norm](sizes, "vision", eps=cfg.norm_eps)
        self.self_attn = VisionAttention(cfg, sizes, shape.window or 0)
        self.layer_norm2 = NORMS[cfg.norm](sizes, "vision", eps=cfg.norm_eps)
        self.mlp = (VisionGatedMlp if cfg.mlp_kind == "gated" else VisionMlp)(cfg, sizes)
        self.layer_scale1 = Leaf(sizes, ("vision",)) if cfg.layer_scale else None
        self.layer_scale2 = Leaf(sizes, ("vision",)) if cfg.layer_scale else None

    def __call__(
        self,
        x: jax.Array,
        tap_inputs: tuple[str, ...] = (),
        real: jax.Array | None = None,
        context: VisionContext = NOWHERE,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(output, what out_proj and fc2 read, as far as `tap_inputs` ask for it by the decoder's names)."""
        attended, mixed = self.self_attn(self.layer_norm1(x), real, context)
        x = x + _scaled(attended, self.layer_scale1)
        out, hidden = self.mlp(self.layer_norm2(x))
        read = {"o_proj": mixed, "down_proj": hidden}
        return x + _scaled(out, self.layer_scale2), {name: read[name] for name in tap_inputs}


def _scaled(branch: jax.Array, scale: Leaf | None) -> jax.Array:
    return branch if scale is None else branch * scale.weight.get_value()[None, None]


class VisionTower(nnx.Module):
    """A tower up to the feature layer; blocks above it are neither loaded nor run."""

    def __init__(self, cfg: VisionConfig):
        self.cfg = cfg
        sizes = {
            "vision": cfg.hidden_size,
            "channel": cfg.channels,
            "temporal": cfg.temporal,
            "patch_row": cfg.patch_size,
            "patch_column": cfg.patch_size,
            "position": cfg.position_grid**2 + cfg.class_token,
        }
        self.class_embedding = Leaf(sizes, ("vision",)) if cfg.class_token else None
        self.patch_embedding = PatchEmbedding(cfg, sizes)
        self.position_embedding = Leaf(sizes, ("position", "vision")) if cfg.table else None
        self.pre_layrnorm = LayerNorm(sizes, "vision", eps=cfg.norm_eps) if cfg.pre_norm else None
        self.layers = nnx.Dict(
            {str(r): VisionLayer(cfg, shape, length) for r, (_, length, shape) in enumerate(runs(cfg.layers))}
        )
        self.post_layernorm = LayerNorm(sizes, "vision", eps=cfg.norm_eps) if cfg.post_norm else None

    def _table(self) -> jax.Array:
        assert self.position_embedding is not None
        return self.position_embedding.weight.get_value()

    def positions(self, rows: int, columns: int) -> jax.Array:
        """float[positions, vision] embeddings of an image of rows x columns patches, the class token's first.

        Raises:
          UserError: another grid than the tower was trained on, and the tower does not resize (only InternViT does).
        """
        table, cfg = self._table(), self.cfg
        if (rows, columns) == (cfg.position_grid, cfg.position_grid):
            return table
        if not cfg.resizes:
            raise UserError(
                f"an image of {rows} x {columns} patches in a {cfg.kind} tower of {cfg.position_grid} a side: "
                f"resize images to {cfg.image_size} pixels a side"
            )
        patches = table[int(cfg.class_token) :].astype(jnp.float32)
        patches = patches.reshape(cfg.position_grid, cfg.position_grid, -1)
        down, across = bicubic(cfg.position_grid, rows), bicubic(cfg.position_grid, columns)
        resized = jnp.einsum("ri,cj,ijd->rcd", jnp.asarray(down), jnp.asarray(across), patches)
        resized = resized.reshape(rows * columns, -1).astype(table.dtype)
        return jnp.concatenate([table[: int(cfg.class_token)], resized])

    def spread(self, patches: jax.Array) -> jax.Array:
        """float[images, positions, vision] embeddings of masked images, bool[images, rows, columns] `patches`.

        Patch i of n in a row or column has the position of the table's that it would fall on, were the real patches
        stretched over the whole image (Dehghani et al. 2023; reference: transformers' `SmolVLMVisionEmbeddings`, whose
        float32 boundaries are those of whole numbers here).
        """
        table, grid = self._table(), self.cfg.position_grid

        def places(real: jax.Array) -> jax.Array:
            count = jnp.maximum(real.sum(axis=1, dtype=jnp.int32), 1)[:, None]
            return jnp.minimum(jnp.arange(real.shape[1], dtype=jnp.int32)[None] * grid // count, grid - 1)

        down, across = places(patches[:, :, 0]), places(patches[:, 0])
        index = down[:, :, None] * grid + across[:, None]
        return table[jnp.where(patches, index, 0).reshape(len(patches), -1)]

    def places(self, pixels: jax.Array, grid: jax.Array) -> Places:
        """Where the patches [images, patches, values] of images of int[images, 3] `grid` lie."""
        return places_of(grid, pixels.shape[1], self.cfg.merge)

    def context(self, pixels: jax.Array, grid: jax.Array | None) -> VisionContext:
        """What the blocks share over these pixels; nothing for whole images of one size (no `grid`)."""
        if grid is None:
            return NOWHERE
        cfg, places = self.cfg, self.places(pixels, grid)
        sides = sorted({shape.window or 0 for shape in cfg.layers})
        segments = {side: windows_of(places, grid, cfg.merge, side) if side else places.image for side in sides}
        return VisionContext(segments, *axial_angles(places, cfg.head_dim, cfg.rope_theta))

    def embed(self, pixels: jax.Array, patches: jax.Array | None = None, grid: jax.Array | None = None) -> jax.Array:
        """float[images, positions, vision] states before the blocks of float[images, channel, height, width] pixels.

        The class token, where there is one, comes first; patches follow row by row. `patches`, `grid`: see `tapped`.
        """
        n, patch = pixels.shape[0], self.cfg.patch_size
        x = self.patch_embedding(pixels)
        if grid is not None:
            if self.position_embedding is not None:
                table = constrain(self._table(), (None, None))  # small, and gathered from whole
                x = x + resampled(table, self.places(pixels, grid), grid)
            return constrain(x, ("batch", None, None))
        if self.class_embedding is not None:
            cls = self.class_embedding.weight.get_value()[None, None]
            x = jnp.concatenate([jnp.broadcast_to(cls, (n, 1, x.shape[-1])), x], axis=1)
        if patches is None:
            x = x + self.positions(pixels.shape[2] // patch, pixels.shape[3] // patch)[None]
        else:
            x = x + self.spread(patches)
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        return constrain(x, ("batch", None, None))

    def run_parts(self, run: str) -> tuple[Callable[..., Any], nnx.State]:
        """One run as `(apply, state)`, see `Decoder.run_parts`.

        `apply(slice of state, x, tap_inputs, real, context)` is one block.
        """
        graph, state = nnx.split(self.layers[run])

        def apply(
            layer_state: nnx.State,
            x: jax.Array,
            tap_inputs: tuple[str, ...] = (),
            real: jax.Array | None = None,
            context: VisionContext = NOWHERE,
        ):
            return nnx.merge(graph, layer_state)(x, tap_inputs, real, context)

        return apply, state

    def __call__(self, pixels: jax.Array, patches: jax.Array | None = None, grid: jax.Array | None = None) -> jax.Array:
        """States behind the last block (and its norm), as `embed` has those before the first; see `tapped`."""
        return self.tapped(pixels, None, patches=patches, grid=grid)[0]

    def levels(self, pixels: jax.Array, grid: jax.Array) -> list[jax.Array]:
        """float[images, patches, vision] states behind the last block, and behind every one of `deepstack`."""
        last, _, kept = self._run(pixels, None, (), None, grid, self.cfg.deepstack)
        return [last, *(kept[i] for i in range(len(self.cfg.deepstack)))]

    def tapped(
        self,
        pixels: jax.Array,
        tap: Tap | None,
        tap_inputs: tuple[str, ...] = (),
        patches: jax.Array | None = None,
        grid: jax.Array | None = None,
    ) -> tuple[jax.Array, list[Any]]:
        """States behind the last block, and what `tap(Block)` gave for each, see `Decoder.__call__`.

        `patches`: bool[images, rows, columns], which patches show the image and not padding (None: all); for towers
        that `spread` positions alone. `grid`: int[images, 3] frames, rows and columns of patches, where images are of
        any size and pixels are their patches, padding behind them.
        """
        return self._run(pixels, tap, tap_inputs, patches, grid, ())[:2]

    def _run(
        self,
        pixels: jax.Array,
        tap: Tap | None,
        tap_inputs: tuple[str, ...],
        patches: jax.Array | None,
        grid: jax.Array | None,
        wanted: tuple[int, ...],
    ) -> tuple[jax.Array, list[Any], Any]:
        """What `tapped` says, and [n + 1, ...] states behind the n blocks `wanted` (the last entry is arbitrary)."""
        x, taps = self.embed(pixels, patches, grid), list[Any]()
        real = None if patches is None else patches.reshape(len(patches), -1)
        context = self.context(pixels, grid)
        kept = jnp.zeros((len(wanted) + 1, *x.shape), x.dtype) if wanted else None
        for run, (start, length, _) in enumerate(runs(self.cfg.layers)):
            apply, state = self.run_parts(str(run))
            places = [wanted.index(i) if i in wanted else len(wanted) for i in range(start, start + length)]

            def body(carry: Any, layer: Any, apply=apply) -> tuple[Any, Any]:
                (x, kept), (state, place) = carry, layer
                y, read = apply(state, x, tap_inputs, real, context)
                if kept is not None:
                    kept = jax.lax.dynamic_update_index_in_dim(kept, y, place, axis=0)
                return (y, kept), None if tap is None else tap(Block(x, y, read, nnx.to_pure_dict(state)))

            (x, kept), tapped = jax.lax.scan(body, (x, kept), (state, jnp.asarray(places) if wanted else None))
            taps += [jax.tree.map(operator.itemgetter(i), tapped) for i in range(length)]
        return x if self.post_layernorm is None else self.post_layernorm(x), taps, kept


def bicubic(n_in: int, n_out: int) -> np.ndarray:
    """float32[n_out, n_in] weights of torch's bicubic interpolation (align_corners=False, borders repeated)."""
    a = _CUBIC
    weights = np.zeros((n_out, n_in))
    for i in range(n_out):
        center = (i + 0.5) * n_in / n_out - 0.5
        for j in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            t = abs(center - j)
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * (t**3 - 5 * t**2 + 8 * t - 4)
            weights[i, min(max(j, 0), n_in - 1)] += near if t <= 1 else far if t < 2 else 0.0
    return weights.astype(np.float32)
