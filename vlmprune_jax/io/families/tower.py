"""Declaration of a vision tower: fields of its config section in both directions, and names of its weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import VisionConfig
from vlmprune_jax.core.layer import BlockConfig, Layer
from vlmprune_jax.core.mixers import Attention, RopeConfig
from vlmprune_jax.io.families.table import JsonDict, Weight, part_weights

# Config fields of most towers.
FIELDS = {
    "depth": "num_hidden_layers",
    "q_heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
    "channels": "num_channels",
}
_SIZES = ("q_heads", "kv_heads", "mlp")  # fields of axes
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")  # of clipped projections


@dataclass(frozen=True)
class Tower:
    """Declaration of a vision tower: its config section in both directions, and the names of its weights."""

    kind: str
    """`VisionConfig.kind`."""

    defaults: JsonDict
    """Defaults of the config class in transformers (InternViT: in the hub's remote code)."""

    keys: Mapping[str, str]
    """{path in `params["vision"]`: key in files}, in the order of exported files, as in `Weight`; paths that share a
    key are rows of a fused tensor.
    """

    layouts: Mapping[str, str] = field(default_factory=dict)
    """{path: layout} of tensors that are stored in an unusual layout."""

    fields: Mapping[str, str] = field(default_factory=lambda: FIELDS)
    """{depth, axis, activation, norm_eps or channels: config field}."""

    rope_theta: float | None = None
    """Default base of the rotary embedding by rows and columns; None: no rotary embedding."""

    attention: Mapping[str, Any] = field(default_factory=lambda: {"out_bias": True})
    """Fields of Attention; without `bias`, the config says whether queries, keys and values have biases."""

    dense: Mapping[str, Any] = field(default_factory=lambda: {"gated": False, "bias": True})
    """Fields of Dense."""

    block: Mapping[str, Any] = field(default_factory=lambda: {"norm": "layer"})
    """Fields of BlockConfig; without `norm_eps`, the config has the epsilon."""

    vision: Mapping[str, Any] = field(default_factory=dict)
    """Fields of VisionConfig."""

    def filled(self, section: Mapping[str, Any]) -> JsonDict:
        """Return a config section with the defaults of absent fields."""
        return {**self.defaults, **{name: value for name, value in section.items() if value is not None}}

    def read(
        self,
        section: Mapping[str, Any],
        *,
        windows: Sequence[int | None] = (),
        block: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> VisionConfig:
        """Return the VisionConfig of a config section that has all fields.

        `windows` has the side of each layer's attention windows (empty: full attention); `block` and `fields` are
        fields of BlockConfig and VisionConfig besides the declared ones.

        Raises UserError if the heads do not divide the width, or the type of rotary embedding is not supported.
        """
        hidden, heads = int(section["hidden_size"]), int(section[self.fields["q_heads"]])
        if "head_dim" not in section and hidden % heads:
            raise UserError(f"vision tower: hidden_size {hidden} is not a multiple of its {heads} heads")
        depth = int(section[self.fields["depth"]])
        attention = {"bias": bool(section.get("qkv_bias", section.get("attention_bias", True))), **self.attention}
        if self.rope_theta is not None:
            rope = section.get("rope_parameters") or {}
            if rope.get("rope_type", "axial") not in ("axial", "default"):
                raise UserError(f"vision tower: rope type {rope['rope_type']!r} is not supported (supported: axial)")
            attention["rope"] = RopeConfig(float(rope.get("rope_theta", self.rope_theta)), "axial")
        mixer = Attention(
            heads,
            int(section[self.fields.get("kv_heads", self.fields["q_heads"])]),
            head_dim=int(section.get("head_dim", hidden // heads)),
            **attention,
        )
        neurons, activation = int(section[self.fields["mlp"]]), section[self.fields["activation"]]
        channel = Dense(neurons, activation=activation, **self.dense)
        block = {**self.block, **(block or {})}
        if "norm_eps" not in block:
            block["norm_eps"] = float(section[self.fields["norm_eps"]])
        return VisionConfig(
            hidden_size=hidden,
            layers=tuple(
                Layer(dataclasses.replace(mixer, window=window), channel) for window in windows or [None] * depth
            ),
            block=BlockConfig(**block),
            n_layers_total=depth,
            patch_size=square_side(section["patch_size"], "patch_size"),
            kind=self.kind,
            **{"channels": int(section.get(self.fields["channels"], 3)), **self.vision, **fields},
        )

    def write(self, vision: VisionConfig, source: JsonDict, before: VisionConfig) -> JsonDict:
        """Return config.json with the fields of its vision section updated that depend on the tower's layers.

        `before`: VisionConfig of `source`, which is returned if the layers are the same.

        Raises UserError if the layers have unequal widths, which no class loads.
        """
        if (before.layers, before.n_layers_total) == (vision.layers, vision.n_layers_total):
            return source
        if not vision.uniform:
            raise UserError(
                "the layers of the vision tower have unequal widths, which no transformers class can load: prune all "
                'layers alike, or export with uneven="pad" (same function, no savings)'
            )
        section = dict(source.get("vision_config") or {})
        section[self.fields["depth"]] = len(vision.layers)
        for axis in _SIZES:
            if axis in self.fields:
                section[self.fields[axis]] = vision.layers[0].sizes[axis]
        if any(layer.mixer.window for layer in vision.layers):
            section["fullatt_block_indexes"] = [i for i, x in enumerate(vision.layers) if x.mixer.window is None]
        if "head_dim" not in self.defaults and ("head_dim" in section or not vision.whole_heads):
            section["head_dim"] = vision.attention.head_dim
        if self.kind == "siglip":
            section["vision_use_head"] = False
        return {**source, "vision_config": section}

    def weights(self, prefix: str) -> list[Weight]:
        """Return the tower's weight table; keys begin with `prefix`."""
        table = []
        for line in part_weights("vision", prefix, self.keys, self.layouts):
            table.append(line)
            if line.key.endswith(".linear"):  # clipped projections have their bounds beside it
                module = line.key.removesuffix("linear")
                table += [Weight(f"{line.path}/{bound}", module + bound, "") for bound in _BOUNDS]
        return table


def position_side(positions: int) -> int:
    """Return the side length of a square position embedding table.

    Raises UserError if the number of positions is not a square.
    """
    side = math.isqrt(positions)
    if side**2 != positions:
        raise UserError(f"vision tower: num_position_embeddings {positions} is not the square of an integer")
    return side


def square_side(size: Any, name: str) -> int:
    """Return the side length of a square image or patch, given as a number or a pair."""
    sides = {int(side) for side in (size if isinstance(size, (list, tuple)) else (size,))}
    if len(sides) != 1:
        raise UserError(
            f"vision tower: {name} {size} has unequal height and width, but only square sizes are supported"
        )
    return sides.pop()
