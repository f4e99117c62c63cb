"""Projector between a vision tower and a decoder."""

from __future__ import annotations

from dataclasses import dataclass

from vlmprune_jax.base.errors import UserError


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
