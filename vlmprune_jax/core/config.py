"""Every shape and hyper-parameter of a model, as frozen dataclasses; no arrays and no jax here."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from vlmprune_jax.core.checks import check_settings, setting
from vlmprune_jax.core.errors import UserError

IGNORED = -100  # the label of a position where nothing is to be learnt, as torch's cross-entropy has it


@dataclass(frozen=True)
class LayerShape:
    """Widths of one layer of a stack: query heads, key/value heads and MLP neurons.

    `window` is the layer's own attention window, None if it sees everything (before it, in a decoder): as many tokens,
    sliding, or in a tower squares of as many merged cells a side. It is no width: pruning never changes it, and plans
    do not record it.
    """

    q_heads: int
    kv_heads: int
    mlp: int
    window: int | None = None

    def __post_init__(self) -> None:
        if min(self.q_heads, self.kv_heads, self.mlp) < 1:
            raise UserError(f"{self}: every width of a layer must be at least 1")
        if self.q_heads % self.kv_heads:
            raise UserError(f"{self}: q_heads must be a multiple of kv_heads (grouped-query attention)")
        if self.window is not None and self.window < 1:
            raise UserError(f"{self}: a sliding window must hold at least 1 token")

    @property
    def widths(self) -> tuple[int, int, int]:
        """(q_heads, kv_heads, mlp): what plans and `per_layer_shapes` record."""
        return self.q_heads, self.kv_heads, self.mlp


@dataclass(frozen=True)
class ImageShape:
    """What an image becomes: `rows` x `columns` pieces (1 x 1: it stays whole), in `slots` of a batch's image array.

    A slot is what a batch counts images in: a whole image or a tile; a grid of several may have its overview as one
    more, the last. An image of a size of its own is one slot whose pieces are patches, and says how many `tokens` they
    make; the slots of others all have a model's `tokens_per_image` (0).
    """

    rows: int = 1
    columns: int = 1
    slots: int = 1
    tokens: int = 0

    def positions(self, per_slot: int) -> int:
        """Decoder positions that it takes; `per_slot`: of images that all have one size."""
        return self.tokens or per_slot * self.slots

    @property
    def grid(self) -> tuple[int, int, int]:
        """(frames, rows, columns) of patches, of an image of a size of its own."""
        return (1, self.rows, self.columns)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding as Hugging Face configs describe it (`rope_theta` and `rope_scaling`).

    `kind` is "default", "linear", "llama3", "yarn" or "longrope"; the other fields are that kind's parameters, 0 or
    empty where unused. LongRoPE divides each frequency by its short factor, or by its long factor for the whole batch
    as soon as one position reaches `original_max_positions`.

    With `sections` images have positions in three rows (M-RoPE): so many frequencies turn with the frame, the row and
    the column, one block after the other, or `interleaved` in turns.
    """

    theta: float
    kind: str
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    sections: tuple[int, ...] = ()
    interleaved: bool = False

    def __post_init__(self) -> None:
        wrong = (
            (self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor)
            or (self.kind == "yarn" and not (self.theta > 1 and 0 < self.beta_slow <= self.beta_fast))
            or (self.kind in ("llama3", "yarn") and self.original_max_positions < 1)
        )
        if wrong:
            raise UserError(
                f"{self.kind} rope with theta {self.theta:g}, original_max_position_embeddings "
                f"{self.original_max_positions}, low and high_freq_factor {self.low_freq_factor:g} and "
                f"{self.high_freq_factor:g}, beta_slow and beta_fast {self.beta_slow:g} and {self.beta_fast:g}: "
                "these do not fit together"
            )


TIMES_POSITIONS, SHORT_ROW = 4, 4096  # a row may have so many times a model's positions, and always so many tokens
# The decoder, and the tower of a model that sees images: names of the fields of a `ModelConfig` and of its params.
STACKS = ("text", "vision")


@dataclass(frozen=True)
class Stack:
    """Layers that share one residual stream of `hidden_size`, one shape each, in order; heads are of `head_dim`.

    Models and plans have them by name, see `STACKS`.
    """

    hidden_size: int
    head_dim: int
    layers: tuple[LayerShape, ...]

    @property
    def even(self) -> bool:
        """Whether all layers have the same widths, as stock transformers wants them."""
        return len({shape.widths for shape in self.layers}) <= 1

    def with_layers(self, layers: Sequence[LayerShape]) -> Self:
        """The same stack with other layers."""
        return dataclasses.replace(self, layers=tuple(layers))

    def alone(self, shape: LayerShape) -> Self:
        """One layer of the stack by itself."""
        return self.with_layers((shape,))


_CHOICES = {"block": ("sequential", "parallel"), "norm": ("rms", "layer"), "mlp_kind": ("gated", "plain")}


@dataclass(frozen=True)
class TextConfig(Stack):
    """A pre-norm decoder.

    `rotary_dim` channels of every head are rotated (its first ones). `block` is "sequential", or "parallel" for Phi's
    x + attention(norm x) + mlp(norm x) with one norm; `norm` is "rms" or "layer"; `mlp_kind` is "gated" or "plain" (two
    projections); `qk_norm` is Qwen3's norm of every query and key head. `decoder` is the `model_type` in files, and
    `whole_heads` says that its class in PyTorch takes hidden_size / heads for the size of a head.
    """

    vocab_size: int
    norm_eps: float
    activation: str
    rope: RopeConfig
    tie_embeddings: bool
    max_positions: int
    rotary_dim: int
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_bias: bool = False
    qk_norm: bool = False
    block: str = "sequential"
    norm: str = "rms"
    mlp_kind: str = "gated"
    whole_heads: bool = False
    decoder: str = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("a decoder needs at least one layer")
        if not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(f"{self.rotary_dim} rotated channels of heads of {self.head_dim}: need 1 to head_dim")
        if self.rotary_dim % 2:
            raise UserError(f"{self.rotary_dim} rotated channels of each head is odd: rotary embedding rotates pairs")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} {getattr(self, name)!r} of a decoder is not one of {', '.join(known)}")
        sections = self.rope.sections
        if sections and (len(sections) != 3 or min(sections) < 0 or sum(sections) != self.rotary_dim // 2):
            raise UserError(
                f"mrope_section {list(sections)}: needs three numbers that add up to {self.rotary_dim // 2}, half of "
                f"the {self.rotary_dim} rotated channels of a head"
            )
        if self.head_bias and self.tie_embeddings:
            raise UserError("an output head with a bias cannot be tied to the embeddings (tie_word_embeddings)")
        for factors in (self.rope.short_factors, self.rope.long_factors):
            if self.rope.kind == "longrope" and len(factors) != self.rotary_dim // 2:
                raise UserError(
                    f"longrope has {len(factors)} factors for {self.rotary_dim // 2} frequencies: config.json's "
                    "short_factor and long_factor need one per pair of rotated channels"
                )


@dataclass(frozen=True)
class VisionConfig(Stack):
    """A vision transformer; its `layers` are the blocks that are computed, up to the feature layer.

    `n_layers_total` counts the blocks of the checkpoint: those above the feature layer are neither loaded nor run.
    `kind` names its weight table in files (families/towers.py); the fields after it say how the towers differ.
    `position_size` is the image size that the position table is for (0: `image_size`); a tower that `resizes` fits its
    table to other images, one that `spreads` has the real patches of a masked image spread over the whole table.

    With `temporal` (copies of the image in a patch) images are of any size and come as patches, `merge` x `merge`
    neighbours one after the other; `image_size` is then a typical one, for estimates. Such a tower fits its table to
    every image, if it has one (`table`), and turns queries and keys by row and column (`rope_theta`). What the blocks
    `deepstack` make is handed to the decoder's first layers.
    """

    n_layers_total: int
    image_size: int
    patch_size: int
    channels: int
    norm_eps: float
    activation: str
    kind: str = dataclasses.field(kw_only=True)
    class_token: bool = True
    patch_bias: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    layer_scale: bool = False
    qkv_bias: bool = True
    position_size: int = 0
    resizes: bool = False
    spreads: bool = False
    temporal: int = 0
    merge: int = 1
    table: bool = True
    rope_theta: float = 0.0
    norm: str = "layer"
    mlp_kind: str = "plain"
    deepstack: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.image_size < self.patch_size:
            raise UserError(f"vision tower: image_size {self.image_size} is below patch_size {self.patch_size}")
        if self.rope_theta and self.head_dim % 4:
            raise UserError(
                f"vision tower: heads of {self.head_dim} channels, of which rows and columns turn half each: needs a "
                "multiple of 4"
            )
        last, ascending = self.n_layers_total - 1, sorted(set(self.deepstack))
        if ascending != list(self.deepstack) or not set(ascending) <= set(range(len(self.layers))):
            raise UserError(
                f"vision tower: deepstack_visual_indexes {list(self.deepstack)} must be ascending numbers of its "
                f"blocks, 0 to {last}"
            )

    @property
    def any_size(self) -> bool:
        """Whether images are of any size and come as patches."""
        return self.temporal > 0

    @property
    def patch_values(self) -> int:
        """Numbers of a patch."""
        return self.channels * max(self.temporal, 1) * self.patch_size**2

    @property
    def grid(self) -> int:
        """Patches a side; pixels beyond the last whole patch are not looked at."""
        return self.image_size // self.patch_size

    @property
    def position_grid(self) -> int:
        """Patches a side of the position table."""
        return (self.position_size or self.image_size) // self.patch_size

    @property
    def n_patches(self) -> int:
        """Patches per image, without the class token."""
        return self.grid**2

    @property
    def whole_heads(self) -> bool:
        """Whether the heads of every layer make up the width, from which classes in PyTorch take the size of one."""
        return all(shape.q_heads * self.head_dim == self.hidden_size for shape in self.layers)

    def with_layers(self, layers: Sequence[LayerShape]) -> Self:
        """The same tower with other layers; it then ends with the feature layer, since no block above it fits them."""
        layers = tuple(layers)
        if self.deepstack and len(layers) != len(self.layers):
            raise UserError(
                "blocks of a vision tower whose features enter several decoder layers (deepstack) cannot be removed: "
                "prune its widths, or the decoder"
            )
        return self if layers == self.layers else dataclasses.replace(self, layers=layers, n_layers_total=len(layers))

    def alone(self, shape: LayerShape) -> Self:
        """One block of the tower by itself."""
        return dataclasses.replace(self, layers=(shape,), n_layers_total=1, deepstack=())


@dataclass(frozen=True)
class ProjectorConfig:
    """From vision features to decoder embeddings.

    `kind` "mlp" is LLaVA's: two layers. In the others `downsample` x `downsample` neighbours become one longer feature
    first (`shuffle_version` "v1" transposes the cells, "v2" does not): "pixel_shuffle" is InternVL's, with a layer norm
    (`norm_eps`) before the same two layers, "linear" SmolVLM's, one layer without activation. "merger" has the norm
    before the patches are joined, and two layers as wide as they are then; the first of `deepstack` more of them, whose
    norm (a layer norm) comes after, is for the first of the tower's deepstack blocks.
    """

    activation: str
    bias: bool
    kind: str = "mlp"
    norm_eps: float = 0.0
    downsample: int = 1
    shuffle_version: str = "v2"
    norm: str = "layer"
    deepstack: int = 0

    def __post_init__(self) -> None:
        if self.shuffle_version not in ("v1", "v2"):
            raise UserError(f"ps_version {self.shuffle_version!r} is not one of v1, v2")

    @property
    def shuffles(self) -> bool:
        """Whether neighbouring patches become one feature."""
        return self.kind != "mlp"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on decoder projections (Hu et al. 2021): y += alpha/rank * B A dropout(x).

    Used where `recover.trainable` trains adapters.
    """

    rank: int = setting(128, "Rank of the two factors.", affects=("recover",), least=1)
    alpha: float = setting(256.0, "The adapter is scaled by alpha / rank.", affects=("recover",), above=0)
    dropout: float = setting(0.05, "Of the adapter's input, in training.", affects=("recover",), least=0, below=1)
    targets: tuple[str, ...] = setting(
        (), "Projections with adapters, as `q_proj`; none means all that the decoder has.", affects=("recover",)
    )

    def __post_init__(self) -> None:
        check_settings("recover.lora", self)


@dataclass(frozen=True)
class ModelConfig:
    """One model: decoder, optional vision tower and projector, and how its folder is laid out.

    `feature_select` is "patch" (the tower's first position, the class token if it has one, is dropped) or "full".
    `image_token_id` marks the positions that image features replace; the original LLaVA and Bunny layouts use the
    sentinel -200, which is never embedded; `video_token_id` marks what is refused. With `tower` False there are no
    weights of the tower, and the model takes its features instead of pixels.
    """

    family: str
    layout: str
    text: TextConfig
    vision: VisionConfig | None = None
    projector: ProjectorConfig | None = None
    image_token_id: int | None = None
    feature_select: str = "patch"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    lora: LoraConfig | None = None
    tower: bool = True
    video_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.vision is None or self.projector is None:
            return
        grid, factor = self.vision.grid, self.projector.downsample
        if grid % factor:
            raise UserError(f"images of {grid} patches a side cannot be downsampled {factor} times")
        if len(self.text.layers) < self.deepstack:
            raise UserError(
                f"a decoder of {len(self.text.layers)} layers, and features of the vision tower for the first "
                f"{self.deepstack} (deepstack_visual_indexes): at least as many layers must stay"
            )

    @property
    def deepstack(self) -> int:
        """How many of the first decoder layers have features of the tower added to their output at image tokens."""
        return 0 if self.vision is None else len(self.vision.deepstack)

    @property
    def any_size(self) -> bool:
        """Whether images are of any size and come as patches."""
        return self.vision is not None and self.vision.any_size

    @property
    def tokens_per_image(self) -> int:
        """Decoder positions that one image, or one tile of it, occupies (0 without a vision tower).

        Of a tower for images of any size: that a typical one does.
        """
        if self.vision is None:
            return 0
        positions = self.vision.n_patches + self.vision.class_token - (self.feature_select == "patch")
        return positions if self.projector is None else positions // self.projector.downsample**2

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(tokens, features) of one image, or one tile of it, before the projector ((0, 0) without a vision tower)."""
        if self.vision is None or self.projector is None:
            return 0, 0
        width = self.vision.hidden_size * self.projector.downsample**2
        return self.tokens_per_image, width * (1 + self.projector.deepstack)

    @property
    def longest_row(self) -> int:
        """Most tokens of a row that records and settings may ask for, so that it is known before memory is taken.

        Rotary positions go on beyond `max_positions`, as in transformers, and a model gets worse there; at several
        times as many it is of no use. Rows that any machine holds are not refused. Arrays of one's own may be of any
        length.
        """
        return max(TIMES_POSITIONS * self.text.max_positions, SHORT_ROW)

    def check_row(self, setting: str, tokens: int) -> None:
        """Refuse a setting that asks for longer rows.

        Raises:
          UserError: names it.
        """
        if tokens > self.longest_row:
            raise UserError(
                f"{setting}={tokens} is more than {TIMES_POSITIONS} times the {self.text.max_positions} positions of "
                "the model (max_position_embeddings): lower it"
            )

    @property
    def stacks(self) -> dict[str, Stack]:
        """The stacks of layers that the model has weights of, by name."""
        tower: dict[str, Stack] = {} if self.vision is None or not self.tower else {"vision": self.vision}
        return {"text": self.text, **tower}

    def stack(self, name: str) -> Stack:
        """The stack of this name.

        Raises:
          UserError: the model has none.
        """
        found: Stack | None = getattr(self, name) if name in STACKS else None
        if found is None:
            raise UserError(f"this model has no stack of layers {name!r} (it has {', '.join(self.stacks)})")
        return found

    def with_layers(self, layers: Sequence[LayerShape], stack: str = "text") -> ModelConfig:
        """The same model with other layers of a stack."""
        changes: dict[str, Any] = {stack: self.stack(stack).with_layers(layers)}
        return dataclasses.replace(self, **changes)


def runs(layers: Sequence[LayerShape]) -> tuple[tuple[int, int, LayerShape], ...]:
    """Maximal runs of equal consecutive layers as (first layer, length, shape); each run is one scan."""
    result, start = [], 0
    for shape, group in itertools.groupby(layers):
        length = len(list(group))
        result.append((start, length, shape))
        start += length
    return tuple(result)
