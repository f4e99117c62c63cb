"""SmolVLM and SmolVLM2: a SigLIP tower, pixel shuffle and a linear projector, and a Llama decoder (SmolLM2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.projector import ProjectorConfig
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.families.decoders import text_from_hf, text_weights, vlm_text_to_hf
from vlmprune_jax.io.families.llava import RECIPE
from vlmprune_jax.io.families.shapes import tied_embeddings, vlm_token_ids
from vlmprune_jax.io.families.table import Family, JsonDict, Stock
from vlmprune_jax.io.families.templates import Template, VideoText
from vlmprune_jax.io.families.towers import (
    projector_of,
    projector_weights,
    vision_from_hf,
    vision_of,
    vision_to_hf,
    vision_weights,
)

# Defaults of SmolVLMConfig for the decoder.
_TEXT: JsonDict = {"model_type": "llama", "rms_norm_eps": 1e-5}
_TOWER = "smolvlm_vision"

_TEMPLATE = Template(
    name="smolvlm",
    start="<|im_start|>",
    system_start="System: ",
    system="",
    system_end="<end_of_utterance>\n",
    user="User:",
    user_end="<end_of_utterance>\n",
    assistant="Assistant:",
    assistant_end="<end_of_utterance>\n",
    gap=" ",
    image_first=True,
    behind_image="",
    tight_image=True,
    image_tokens=("<fake_token_around_image><global-img>", "<image>", "<fake_token_around_image>"),
    tile_start="<fake_token_around_image><row_{row}_col_{column}>",
    row_end="\n",
    video=VideoText(
        "<image>",
        "\nFrame from {clock}:<fake_token_around_image><global-img><image><fake_token_around_image>",
        start="You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n",
        end="\n\n",
    ),
    by_turn=True,
    special=("<|im_start|>", "<end_of_utterance>"),
)


def _from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
    del vision
    text = {**_TEXT, **(config.get("text_config") or {})}
    text["tie_word_embeddings"] = tied_embeddings(config, text, default=False)
    tower = vision_from_hf(config.get("vision_config") or {}, -1, _TOWER)
    if tower.kind != "smolvlm":
        raise UserError(f"SmolVLM with a {tower.kind} vision tower is not supported (supported: {_TOWER})")
    projector = ProjectorConfig(
        activation="gelu", bias=False, kind="linear", downsample=int(config.get("scale_factor", 2))
    )
    return ModelConfig(
        family="smolvlm",
        layout="transformers",
        text=text_from_hf(text),
        vision=tower,
        projector=projector,
        image_token_id=int(config.get("image_token_id", 128257)),
        feature_select="full",
        **vlm_token_ids(config, text),
    )


def _to_hf(cfg: ModelConfig, source: JsonDict) -> JsonDict:
    config = vision_to_hf(vision_of(cfg), source, _TOWER, None)
    return vlm_text_to_hf(cfg.text, config, {**_TEXT, **(source.get("text_config") or {})})


SMOLVLM = Family(
    name="smolvlm",
    layout="transformers",
    model_types=("smolvlm",),
    from_hf=_from_hf,
    to_hf=_to_hf,
    text_section="text_config",
    weights=lambda cfg: (
        text_weights(cfg.text, "model.text_model.", "lm_head.weight")
        + projector_weights(projector_of(cfg), "model.connector.modality_projection.", ("proj",))
        + vision_weights(vision_of(cfg), "model.vision_model.")
    ),
    ignored=(r".*\.rotary_emb\.inv_freq", r"lm_head\.weight", r"model\.vision_model\.embeddings\.position_ids"),
    templates=(_TEMPLATE,),
    image_processors=("SmolVLM",),
    images="splits",
    video=VideoConfig("trimmed", fps=1.0, num_frames=64, longest_edge=4 * 364, size=(364, 364), resample=1),
    recipe={**RECIPE, "data": {"max_length": 4096}},
    runs_in=("vllm", "mlx"),
    tried={"vllm": "", "mlx": ""},
    derives_head_dim=("mlx",),
    stock=Stock(
        "SmolVLMForConditionalGeneration",
        "AutoModelForImageTextToText",
        by_row=True,
        miscomputes=("4.55.", "4.56.", "4.57."),  # patches get the positions of their upper left neighbours
    ),
)
