"""Bunny-v1.0-3B in its hub layout: SigLIP, a two-layer projector and Phi-2 (BunnyPhiForCausalLM)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.projector import ProjectorConfig
from vlmprune_jax.io.families.decoders import text_from_hf
from vlmprune_jax.io.families.llava import LLAVA_ORIGINAL, ORIGINAL_IMAGE_TOKEN, RECIPE
from vlmprune_jax.io.families.shapes import layers_to_hf, token_ids
from vlmprune_jax.io.families.table import JsonDict
from vlmprune_jax.io.families.templates import LLAVA_V1
from vlmprune_jax.io.families.towers import PIXELS, check_unpruned, vision_from_hf, vision_of

TEMPLATE = dataclasses.replace(LLAVA_V1, name="bunny", assistant_end="<|endoftext|>")
# Bunny's code computes all blocks but the last, whatever the config says (siglip_encoder.py).
_FEATURE_LAYER = -2
# Bunny's config.json has only the tower's name and width; these are the sizes of the tower of Bunny-v1.0 on the hub.
_HUB_TOWER = "siglip-so400m-patch14-384"
_HUB_TOWER_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "image_size": 384,
    "patch_size": 14,
}


def _from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
    name, width = str(config.get("mm_vision_tower", "")), config.get("mm_hidden_size")
    if vision is None and name.rstrip("/").endswith(_HUB_TOWER) and width == _HUB_TOWER_CONFIG["hidden_size"]:
        vision = _HUB_TOWER_CONFIG
    if vision is None:
        raise UserError(
            f"Bunny: config.json names the vision tower {name!r} (width {width}) but not its sizes: "
            "set vision_dir (--config.model.vision_dir) to the tower's folder"
        )
    kind = config.get("mm_projector_type", "mlp2x_gelu")
    if kind != "mlp2x_gelu":
        raise UserError(f"mm_projector_type {kind!r} is not supported (supported: mlp2x_gelu)")
    if config.get("use_s2"):
        raise UserError("Bunny with use_s2 (several image scales, Bunny-v1.1) is not supported")
    tower = vision_from_hf(vision, _FEATURE_LAYER, "siglip_vision_model")
    if tower.kind != "siglip":
        raise UserError(f"Bunny with a {tower.kind} vision tower is not supported (supported: SigLIP)")
    if width not in (None, tower.hidden_size):
        raise UserError(f"mm_hidden_size is {width} but the vision tower {name!r} has width {tower.hidden_size}")
    return ModelConfig(
        family="bunny",
        layout="original",
        text=text_from_hf({**config, "model_type": "phi"}),
        vision=tower,
        projector=ProjectorConfig(activation="gelu", bias=True),
        image_token_id=ORIGINAL_IMAGE_TOKEN,
        feature_select="full",
        **token_ids(config),
    )


def _to_hf(cfg: ModelConfig, source: JsonDict) -> JsonDict:
    check_unpruned(vision_of(cfg), _FEATURE_LAYER)
    return layers_to_hf(cfg.text, source)  # the hub has no class for unequal widths


def _pixels(size: int) -> JsonDict:
    """Return Bunny's image processor settings, which its hub code has as constants instead of a file."""
    mean, std = PIXELS["siglip"]
    side = {"height": size, "width": size}
    return {"image_processor_type": "SiglipImageProcessor", "size": side, "image_mean": mean, "image_std": std}


BUNNY = dataclasses.replace(
    LLAVA_ORIGINAL,
    name="bunny",
    model_types=("bunny-phi",),
    matches=lambda config: True,
    from_hf=_from_hf,
    to_hf=_to_hf,
    holds_tower=True,
    templates=(TEMPLATE,),
    recipe={**RECIPE, "data": {**RECIPE["data"], "template": TEMPLATE.name}},
    pixels=_pixels,
)
