"""Declaration of a vision tower (config in both directions, names of weights), and towers of several families."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import ModelConfig, PatchConfig, PositionTable, ProjectorConfig, VisionConfig
from vlmprune_jax.core.layer import BlockConfig, Layer
from vlmprune_jax.core.mixers import Attention, RopeConfig
from vlmprune_jax.io.families.table import JsonDict, Weight, in_layers, part_weights

# Config fields of most towers, in the order of exported files.
FIELDS = {
    "hidden_size": "hidden_size",
    "mlp": "intermediate_size",
    "q_heads": "num_attention_heads",
    "depth": "num_hidden_layers",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "channels": "num_channels",
    "norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
}
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
    """{size, axis or setting of the tower: config field}."""

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

    def write(
        self, vision: VisionConfig, source: JsonDict, before: VisionConfig, feature_layer: str | None = None
    ) -> JsonDict:
        """Return config.json with the fields updated that depend on the tower's layers.

        Args:
          vision: the tower; if it is pruned, it ends with its feature layer, which then is the last hidden state.
          source: config.json, which is returned if the layers are the same.
          before: VisionConfig of `source`.
          feature_layer: field with the feature layer; None for classes that always use the last.

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
        sizes = {"depth": len(vision.layers), **vision.layers[0].sizes}
        for name in ("depth", "q_heads", "kv_heads", "mlp"):
            if name in self.fields:
                section[self.fields[name]] = sizes[name]
        if any(layer.mixer.window for layer in vision.layers):
            section["fullatt_block_indexes"] = [i for i, x in enumerate(vision.layers) if x.mixer.window is None]
        if "head_dim" not in self.defaults and ("head_dim" in section or not vision.whole_heads):
            section["head_dim"] = vision.attention.head_dim
        if vision.kind == "siglip":
            section["vision_use_head"] = False
        return {**source, "vision_config": section, **({feature_layer: -1} if feature_layer else {})}

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


# Names inside a block of CLIP's and SigLIP's towers, and of towers that fuse queries, keys and values.
_BLOCK_KEYS = {
    path: path.replace("/", ".")
    for path in ("layer_norm1", *(f"self_attn/{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
                 "layer_scale1/weight", "layer_norm2", "mlp/fc1", "mlp/fc2", "layer_scale2/weight")
}  # fmt: skip
FUSED_KEYS = {
    **_BLOCK_KEYS,
    "layer_norm1": "norm1",
    **{f"self_attn/{name}_proj": "attn.qkv" for name in "qkv"},
    "self_attn/out_proj": "attn.proj",
    "layer_norm2": "norm2",
}
_CLIP_KEYS = {
    "class_embedding/weight": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "position_embedding": "embeddings.position_embedding",
    "pre_layrnorm": "pre_layrnorm",
    **in_layers(_BLOCK_KEYS, "encoder.layers"),
    "post_layernorm": "post_layernorm",
}
_INTERNVIT_KEYS = {
    "class_embedding/weight": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "position_embedding/weight": "embeddings.position_embedding",
    **in_layers(FUSED_KEYS | {f"layer_scale{n}/weight": f"ls{n}" for n in (1, 2)}, "encoder.layers"),
}
_INTERNVL_KEYS = {
    "class_embedding/weight": "embeddings.cls_token",
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "position_embedding/weight": "embeddings.position_embeddings",
    **in_layers(
        {
            **_BLOCK_KEYS,
            "layer_norm1": "layernorm_before",
            **{f"self_attn/{name}_proj": f"attention.{name}_proj" for name in "qkv"},
            "self_attn/out_proj": "attention.projection_layer",
            "layer_scale1/weight": "lambda_1",
            "layer_norm2": "layernorm_after",
            "layer_scale2/weight": "lambda_2",
        },
        "encoder.layer",
    ),
}
PROJECTOR_KEYS = {name: name for name in ("layer_norm", "linear_1", "linear_2")}  # of transformers' projectors
_BIASED = PatchConfig(bias=True)
_CLIP: JsonDict = {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
    "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}  # fmt: skip
_SIGLIP: JsonDict = {**_CLIP, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
_INTERNVL: JsonDict = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
    "image_size": 448, "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
    "attention_bias": False, "use_qk_norm": False, "norm_type": "layer_norm", "use_mean_pooling": True,
    "use_absolute_position_embeddings": True,
}  # fmt: skip
_INTERNVIT: JsonDict = {
    "hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25, "num_hidden_layers": 48,
    "image_size": 224, "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
    "qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm",
}  # fmt: skip
_OF_SIGLIP: JsonDict = {"class_token": False, "patches": _BIASED, "pre_norm": False}
_OF_INTERNVIT: JsonDict = {
    # class token and positions have a batch axis
    "layouts": {"class_embedding/weight": "1 1 vision", "position_embedding/weight": "1 position vision"},
    "block": {"norm": "layer", "layer_scale": True},
    "vision": {"patches": _BIASED, "pre_norm": False, "positions": PositionTable(resizes=True)},
}
# Towers of any family by the `model_type` of their config section.
TOWERS = {
    "clip_vision_model": Tower("clip", _CLIP, _CLIP_KEYS),
    "siglip_vision_model": Tower("siglip", _SIGLIP, _CLIP_KEYS, vision=_OF_SIGLIP),
    "smolvlm_vision": Tower(
        "smolvlm",
        {**_SIGLIP, "hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32},
        _CLIP_KEYS,
        vision={**_OF_SIGLIP, "post_norm": True, "positions": PositionTable(spreads=True)},
    ),
    "siglip2_vision_model": Tower(
        "siglip2",
        {name: value for name, value in _SIGLIP.items() if name != "image_size"},
        _CLIP_KEYS,
        vision={
            **_OF_SIGLIP,
            "post_norm": True,
            "positions": PositionTable(antialiased=True),
            "patches": PatchConfig(bias=True, temporal=1, channels_last=True),
        },
    ),
    "internvl_vision": Tower("internvit", _INTERNVL, _INTERNVL_KEYS, **_OF_INTERNVIT),
    "intern_vit_6b": Tower("internvit", _INTERNVIT, _INTERNVIT_KEYS, **_OF_INTERNVIT),
}
# Mean and standard deviation of each tower's training images (openai/clip, google/siglip, ImageNet).
PIXELS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "smolvlm": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "siglip2": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "internvit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# Complete CLIP or SigLIP configs -> type of their vision part, which may not state it.
_OUTER = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
# Only supported values of InternViT's fields.
_FIXED: JsonDict = {"qk_normalization": False, "use_qk_norm": False, "norm_type": "layer_norm",
                    "use_mean_pooling": True, "use_absolute_position_embeddings": True}  # fmt: skip
# Key prefixes of SigLIP's pooling head, which image features bypass; its MLP is as wide as those of the layers.
_POOLING_HEAD = ("vision_tower.head.", "vision_tower.vision_model.head.")


def vision_from_hf(
    config: Mapping[str, Any], feature_layer: Any, *types: str, image_size: int | None = None
) -> VisionConfig:
    """Return the VisionConfig of a vision config dictionary, or of a complete CLIP or SigLIP config.

    Args:
      config: the config.
      feature_layer: index into the hidden states (0 = embeddings); blocks above are not computed.
      types: types of towers that the model's class supports; the first one is the default.
      image_size: side of the images (pixels), if it differs from that of the tower's position table.

    Raises UserError if the type of tower or an option is not supported, or there are several feature layers.
    """
    section = config.get("vision_config") or config
    model_type = section.get("model_type") or _OUTER.get(config.get("model_type", ""), types[0])
    if model_type not in types:
        raise UserError(f"vision tower {model_type!r} is not supported (supported: {', '.join(types)})")
    tower = TOWERS[model_type]
    section = tower.filled(section)
    for name, supported in _FIXED.items():
        if section.get(name, supported) != supported:
            raise UserError(
                f"vision tower: {name} = {section[name]!r} is not supported (supported: InternViT-300M with "
                "layer_norm, no norm of queries and keys, mean pooling, absolute positions)"
            )
    total = int(section["num_hidden_layers"])
    if not isinstance(feature_layer, int):
        raise UserError(f"vision feature layer {feature_layer!r} is not supported: it must be one integer")
    used = feature_layer if feature_layer >= 0 else total + 1 + feature_layer
    if not 0 < used <= total:
        raise UserError(f"vision feature layer {feature_layer} does not exist in a vision tower of {total} layers")
    table_size = square_side(section["image_size"], "image_size")
    positions = tower.vision.get("positions", PositionTable())
    if image_size not in (None, table_size):
        positions = dataclasses.replace(positions, image_size=table_size)
    vision = tower.read(section, image_size=image_size or table_size, positions=positions)
    return dataclasses.replace(vision, layers=vision.layers[:used])


def is_left_out(key: str, config: JsonDict) -> bool:
    """Return True if the checkpoint may lack this key: SigLIP's pooling head, if config.json switches it off."""
    vision = config.get("vision_config") or {}
    return key.startswith(_POOLING_HEAD) and vision.get("vision_use_head") is False


def projector_of(cfg: ModelConfig) -> ProjectorConfig:
    """Return a model's ProjectorConfig; the model must have a projector."""
    assert cfg.projector is not None
    return cfg.projector


def vision_of(cfg: ModelConfig) -> VisionConfig:
    """Return a model's VisionConfig; the model must have a vision tower."""
    assert cfg.vision is not None
    return cfg.vision


def stock_tower(vision: VisionConfig) -> JsonDict:
    """Return transformers' vision_config for a tower without the layers after the one whose features are used."""
    model_type, tower = next(item for item in TOWERS.items() if item[1].kind == vision.kind)
    values = {
        **{name: getattr(vision, name) for name in ("hidden_size", "image_size", "patch_size", "channels")},
        **vision.layers[0].sizes,
        "depth": len(vision.layers),
        "norm_eps": vision.block.norm_eps,
        "activation": vision.channel.activation,
    }
    config = {"model_type": model_type, **{field: values[name] for name, field in tower.fields.items()}}
    if vision.kind == "siglip":
        config["vision_use_head"] = False
    if vision.kind == "internvit":
        sides = {name: [config[name]] * 2 for name in ("image_size", "patch_size")}
        config |= {**sides, "attention_bias": vision.attention.bias, "norm_type": "layer_norm", "use_qk_norm": False}
    return config


def rescaling(vision: VisionConfig) -> JsonDict:
    """Return the last settings of an image processor: pixels from 0 to 1, normalised as in the tower's training."""
    mean, std = PIXELS[vision.kind]
    scaled = {"do_rescale": True, "rescale_factor": 1 / 255}
    return {**scaled, "do_normalize": True, "image_mean": mean, "image_std": std}


def stock_tower_constants(vision: VisionConfig) -> dict[str, tuple[tuple[int, ...], float]]:
    """Return {key: (shape, value)} of weights that transformers' tower class has but never uses."""
    if vision.kind == "internvit":
        return {}
    # a norm after the last block; features are taken before it
    norm = "vision_tower.vision_model.post_layernorm."
    return {f"{norm}weight": ((vision.hidden_size,), 1.0), f"{norm}bias": ((vision.hidden_size,), 0.0)}
