"""SmolVLM and SmolVLM2: a SigLIP tower, pixel shuffle and a linear projector, and a Llama decoder (SmolLM2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.config import ModelConfig, ProjectorConfig
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.families.decoders import UNUSED, vlm_family, vlm_from_hf
from vlmprune_jax.io.families.table import JsonDict
from vlmprune_jax.io.families.templates import Template, VideoText
from vlmprune_jax.io.families.towers import TOWERS, vision_from_hf

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


def _from_hf(config: Mapping[str, Any], _: Mapping[str, Any] | None) -> ModelConfig:
    tower = vision_from_hf(config.get("vision_config") or {}, -1, _TOWER)
    projector = ProjectorConfig(
        activation="gelu", bias=False, kind="linear", downsample=int(config.get("scale_factor", 2))
    )
    return vlm_from_hf("smolvlm", config, _TEXT, tied=False, image_token=128257, vision=tower, projector=projector)


SMOLVLM = vlm_family(
    "smolvlm",
    "SmolVLMForConditionalGeneration",
    # versions in which patches get the positions of their upper left neighbours
    stock={"by_row": True, "miscomputes": ("4.55.", "4.56.", "4.57.")},
    from_hf=_from_hf,
    tower=TOWERS[_TOWER],
    defaults=_TEXT,
    projector={"linear": "modality_projection.proj"},
    prefixes={"text": "model.text_model.", "projector": "model.connector.", "vision": "model.vision_model."},
    ignored=(*UNUSED, r"model\.vision_model\.embeddings\.position_ids"),
    templates=(_TEMPLATE,),
    image_processors=("SmolVLM",),
    images="splits",
    video=VideoConfig("trimmed", fps=1.0, num_frames=64, longest_edge=4 * 364, size=(364, 364), resample=1),
    runs_in=("vllm", "mlx"),
    derives_head_dim=("mlx",),
)
