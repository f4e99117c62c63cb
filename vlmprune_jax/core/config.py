"""Shapes and hyper-parameters of a model as frozen dataclasses, without arrays and without jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.layer import Encoder, Layer, Stack
from vlmprune_jax.core.mixers import RopeConfig
from vlmprune_jax.core.sections import FakeQuant, LoraConfig
from vlmprune_jax.core.video import VideoConfig

IGNORED = -100  # label of a position without loss, as in torch's cross-entropy
TIMES_POSITIONS, SHORT_ROW = 4, 4096  # maximum tokens of a row: 4 times the model's positions, or 4096 if that is more
# Decoder and vision tower: names of the fields of a `ModelConfig` and of its params. Encoders have names of their own.
STACKS = ("text", "vision")


@dataclass(frozen=True)
class TextConfig(Stack):
    """Configuration of a language model's decoder."""

    causal: ClassVar[bool] = True

    vocab_size: int
    """Rows of the embedding table."""

    tie_embeddings: bool
    """True if the output head shares the embedding's weights."""

    max_positions: int
    """Number of positions that the model was trained with."""

    decoder: str
    """`model_type` of the decoder in the checkpoint's config."""

    head_bias: bool = False
    """True if the output head has a bias."""

    whole_heads: bool = False
    """True if the PyTorch class derives the size of a head as hidden_size / heads."""

    embed_scale: float = 1.0
    """Factor on the embeddings of tokens."""

    logit_cap: float = 0.0
    """Bound c of the logits, c * tanh(logit / c); 0 for none."""

    @property
    def sees_images(self) -> bool:
        """True if image tokens also attend to later tokens of the same image, in some layers."""
        return any(getattr(layer.mixer, "sees_images", False) for layer in self.layers)

    @property
    def rope(self) -> RopeConfig:
        """Rotary position embedding of the layers without a window."""
        rope = self.attention.rope
        assert rope is not None  # every decoder has rotary embedding
        return rope

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise UserError("a decoder needs at least one layer")
        if self.head_bias and self.tie_embeddings:
            raise UserError(
                "tie_word_embeddings is true, but an output head with a bias cannot share the embedding: set it to "
                "false"
            )


@dataclass(frozen=True)
class PositionTable:
    """Learned position embeddings of a vision tower's patches."""

    image_size: int = 0
    """Image size that the table was made for; 0 for the tower's `image_size`."""

    resizes: bool = False
    """True if the table is interpolated for images of another size."""

    spreads: bool = False
    """True if the real patches of a masked image are distributed over the whole table."""

    antialiased: bool = False
    """True if interpolation uses antialiasing and no aligned corners (SigLIP 2), with dynamic resolution."""

    by_axis: int = 0
    """Number of entries per axis if a patch takes the sum of a column's and a row's entry; 0 for one per patch."""


@dataclass(frozen=True)
class PatchConfig:
    """Configuration of the patch embedding of a vision tower."""

    bias: bool = False
    """True if the embedding has a bias."""

    temporal: int = 0
    """Frames per patch (an image is repeated) for towers with dynamic resolution; 0 for images of one size."""

    channels_last: bool = False
    """True if a patch's channels come last."""

    centres: bool = False
    """True if pixel values are in 0..1, and the tower maps them to -1..1."""


@dataclass(frozen=True)
class VisionConfig(Stack):
    """Configuration of a vision transformer; only layers up to the one whose features the projector reads are included.

    A tower with dynamic resolution interpolates its position table (if any) for every image.
    """

    n_layers_total: int
    """Number of blocks in the checkpoint; blocks above the feature layer are neither loaded nor run."""

    image_size: int
    """Pixels per side of an image; with dynamic resolution, of a typical image, for estimates."""

    patch_size: int
    """Pixels per side of a patch."""

    channels: int
    """Number of channels of an image."""

    kind: str
    """Name of the tower's table of weights (io/families/towers.py)."""

    class_token: bool = True
    """True if a class token stands before the patches."""

    pre_norm: bool = True
    """True if embeddings are normalised before the first block."""

    post_norm: bool = False
    """True if the last block's output is normalised."""

    merge: int = 1
    """Number of neighbouring patches per side that become one image token; these patches are consecutive."""

    deepstack: tuple[int, ...] = ()
    """Blocks whose outputs are added to the outputs of the first decoder layers (DeepStack)."""

    positions: PositionTable | None = PositionTable()
    """Table of position embeddings; None if the tower has none."""

    patches: PatchConfig = PatchConfig()
    """Configuration of the patch embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < self.patch_size:
            raise UserError(f"vision tower: image_size {self.image_size} is below patch_size {self.patch_size}")
        for layer in self.layers:
            if layer.mixer.rope is not None and layer.mixer.head_dim % 4:
                raise UserError(
                    f"vision tower: head_dim {layer.mixer.head_dim} must be a multiple of 4 (2-D rotary embedding)"
                )
        last, ascending = self.n_layers_total - 1, sorted(set(self.deepstack))
        if ascending != list(self.deepstack) or not set(ascending) <= set(range(len(self.layers))):
            raise UserError(
                f"vision tower: deepstack_visual_indexes {list(self.deepstack)} must be ascending layer numbers "
                f"from 0 to {last}"
            )

    @property
    def dynamic_resolution(self) -> bool:
        """True if the vision tower accepts images of varying size, as sequences of patches."""
        return self.patches.temporal > 0

    @property
    def patch_values(self) -> int:
        """Number of values in one patch (channels x frames x height x width)."""
        return self.channels * max(self.patches.temporal, 1) * self.patch_size**2

    @property
    def grid(self) -> int:
        """Number of patches along each side of an image; pixels after the last complete patch are ignored."""
        return self.image_size // self.patch_size

    @property
    def position_grid(self) -> int:
        """Number of patches along each side of the position embedding table."""
        size = self.positions.image_size if self.positions is not None else 0
        return (size or self.image_size) // self.patch_size

    @property
    def whole_heads(self) -> bool:
        """True if heads x head_dim equals hidden_size in every layer, as stock PyTorch classes assume."""
        return all(layer.mixer.q_heads * layer.mixer.head_dim == self.hidden_size for layer in self.layers)

    def with_layers(self, layers: Sequence[Layer]) -> Self:
        """Return a copy of the vision config with other layer shapes; the projector then reads the last layer."""
        layers = tuple(layers)
        if self.deepstack and len(layers) != len(self.layers):
            raise UserError(
                "layers of this vision tower cannot be removed, because their features enter several decoder layers "
                "(deepstack): prune heads and neurons of the tower, or prune the decoder"
            )
        return self if layers == self.layers else dataclasses.replace(self, layers=layers, n_layers_total=len(layers))

    def alone(self, shape: Layer) -> Self:
        """Return a copy of the vision config with a single layer of this shape."""
        return dataclasses.replace(self, layers=(shape,), n_layers_total=1, deepstack=())


@dataclass(frozen=True)
class ProjectorConfig:
    """Configuration of the projector, which maps vision features to decoder embeddings.

    Kinds:
      mlp: LLaVA's two layers.
      pixel_shuffle: InternVL's and LFM2-VL's; a layer norm (`norm_eps`, unless `input_norm` is False), then two layers.
      linear: SmolVLM's single layer without activation.
      merger: Qwen-VL's; a norm before patches are joined, then two layers of the joined width.
      pool: Gemma's; the mean of neighbouring patches, a norm (`norm`, `norm_eps`, `norm_offset`), and one layer without
        activation, whose matrix is stored [inputs, outputs] with `inputs_first`. The mean is multiplied by
        `feature_scale` and, if `standardizes`, shifted and scaled by channel. `plain_norm`: the norm has no weight.

    All kinds but "mlp" first join `downsample` x `downsample` neighbouring patches into one longer feature, or take
    their mean (`shuffle_version` "v1" transposes the cells, "v2" does not). `deepstack` is the number of additional
    mergers, each with a layer norm after joining, in the order of the tower's deepstack blocks. `hidden_size` is the
    width between the two layers (0: the decoder's width, or in mergers the width of the joined features).
    """

    activation: str
    bias: bool
    kind: str = "mlp"
    norm_eps: float = 0.0
    downsample: int = 1
    shuffle_version: str = "v2"
    norm: str = "layer"
    deepstack: int = 0
    norm_offset: float = 0.0
    inputs_first: bool = False
    feature_scale: float = 1.0
    standardizes: bool = False
    plain_norm: bool = False
    input_norm: bool = True
    hidden_size: int = 0

    def __post_init__(self) -> None:
        if self.shuffle_version not in ("v1", "v2"):
            raise UserError(f"ps_version {self.shuffle_version!r} is not one of v1, v2")

    @property
    def pools(self) -> bool:
        """True if the projector averages neighbouring patches to one feature."""
        return self.kind == "pool"

    @property
    def shuffles(self) -> bool:
        """True if the projector concatenates neighbouring patches to one feature (pixel shuffle)."""
        return self.kind not in ("mlp", "pool")


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of one model: decoder, optional vision tower and projector, and checkpoint layout.

    `feature_select` is "patch" (drop the tower's first position, the class token if it has one) or "full".
    `image_token_id` marks the positions that image features replace; the original LLaVA and Bunny layouts use the
    sentinel -200, which is never embedded. `video_token_id` marks the positions of video frames; None if frames use the
    image token. `tokens_per_second` is the number of temporal positions per second of video (M-RoPE). It is 0 if the
    prompt states the time of each frame as text; frames then have positions like images. If `tower` is False, the
    tower's weights are not loaded, and the model takes vision features instead of pixels. `video` is the model folder's
    video processor; None for families without one. `encoders` are pairs (name, encoder) of encoders besides the vision
    tower; the name is also that of the encoder's params.
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
    fake_quant: FakeQuant | None = None
    tower: bool = True
    video_token_id: int | None = None
    tokens_per_second: float = 0.0
    video: VideoConfig | None = None
    encoders: tuple[tuple[str, Encoder], ...] = ()

    def __post_init__(self) -> None:
        if self.vision is None or self.projector is None:
            return
        grid, factor = self.vision.grid, self.projector.downsample
        if grid % factor:
            raise UserError(
                f"vision tower: {grid} patches per side are not divisible by the downsampling factor {factor}"
            )
        if len(self.text.layers) < self.deepstack:
            raise UserError(
                f"decoder has {len(self.text.layers)} layers, but the vision tower has features for the first "
                f"{self.deepstack} (deepstack_visual_indexes): keep at least {self.deepstack} layers"
            )

    @property
    def visual_token_ids(self) -> tuple[int, ...]:
        """Token ids that stand for images and video frames in a prompt."""
        return tuple(token for token in (self.image_token_id, self.video_token_id) if token is not None)

    @property
    def deepstack(self) -> int:
        """Number of leading decoder layers after which vision features are added at image tokens (DeepStack)."""
        return 0 if self.vision is None else len(self.vision.deepstack)

    @property
    def dynamic_resolution(self) -> bool:
        """True if the model accepts images of varying size, as sequences of patches."""
        return self.vision is not None and self.vision.dynamic_resolution

    @property
    def merge(self) -> int:
        """Number of patches per side of a token (1 without a vision tower)."""
        return 1 if self.vision is None else self.vision.merge

    @property
    def tokens_per_image(self) -> int:
        """Number of decoder tokens per image or tile (0 without a vision tower; typical if image sizes vary)."""
        if self.vision is None:
            return 0
        positions = self.vision.grid**2 + self.vision.class_token - (self.feature_select == "patch")
        return positions if self.projector is None else positions // self.projector.downsample**2

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Shape (tokens, width) of the vision features of one image or tile; (0, 0) without a vision tower."""
        if self.vision is None or self.projector is None:
            return 0, 0
        width = self.vision.hidden_size * (1 if self.projector.pools else self.projector.downsample**2)
        return self.tokens_per_image, width * (1 + self.projector.deepstack)

    @property
    def longest_row(self) -> int:
        """Maximum tokens per sequence that vlmprune accepts: 4 x max_position_embeddings, at least 4,096."""
        return max(TIMES_POSITIONS * self.text.max_positions, SHORT_ROW)

    def check_row(self, setting: str, tokens: int) -> None:
        """Raise UserError naming `setting` if its sequence length exceeds `longest_row`."""
        if tokens > self.longest_row:
            raise UserError(
                f"{setting}={tokens} is more than {TIMES_POSITIONS} times the model's max_position_embeddings "
                f"({self.text.max_positions}): lower it"
            )

    def __repr__(self) -> str:
        """Return family, layout and layers of every stack as one line."""
        return f"ModelConfig({'; '.join([f'{self.family}, {self.layout} layout', *self.stack_lines])})"

    @property
    def stack_lines(self) -> list[str]:
        """Layer sizes of every stack as text, one line per stack."""
        return [
            f"{name}: hidden size {stack.hidden_size:,}, {stack.describe(most=3)}"
            for name, stack in self.stacks.items()
        ]

    @property
    def stacks(self) -> dict[str, Stack]:
        """Transformer stacks of the model by name: "text" (decoder), "vision" (vision tower), and encoders."""
        tower: dict[str, Stack] = {} if self.vision is None or not self.tower else {"vision": self.vision}
        return {"text": self.text, **tower, **dict(self.encoders)}

    def stack(self, name: str) -> Stack:
        """Return the transformer stack "text", "vision" or an encoder; raise UserError if the model lacks it."""
        stack: Stack | None = getattr(self, name) if name in STACKS else dict(self.encoders).get(name)
        if stack is None:
            raise UserError(f"this model has no stack of layers {name!r} (it has {', '.join(self.stacks)})")
        return stack

    def with_layers(self, layers: Sequence[Layer], stack: str = "text") -> ModelConfig:
        """Return a copy of the model config in which one stack, such as "text" or "vision", has other layer shapes."""
        changed: Any = self.stack(stack).with_layers(layers)
        encoders = tuple((name, changed if name == stack else encoder) for name, encoder in self.encoders)
        return dataclasses.replace(self, **{stack: changed} if stack in STACKS else {"encoders": encoders})
