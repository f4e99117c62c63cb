"""Gemma 3: a SigLIP tower, pooled to few tokens that see each other, and a decoder with windows in most layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig, ProjectorConfig, TextConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import vlm_family, vlm_from_hf
from vlmprune_jax.io.families.llama_like import defaults_of, llama_like
from vlmprune_jax.io.families.llava import HF_MODULES, NATIVE_PREFIXES, NATIVE_RENAMES, NATIVE_UNUSED
from vlmprune_jax.io.families.shapes import FULL, SLIDING, rope_from_hf, typed_layers_to_hf, windows_from_hf
from vlmprune_jax.io.families.table import LLAMA_NAMES, Decoder, JsonDict, in_layers
from vlmprune_jax.io.families.templates import Template
from vlmprune_jax.io.families.towers import TOWERS, vision_from_hf

_DECODER, _TOWER = "gemma3_text", "siglip_vision_model"
_TEXT = defaults_of(
    _DECODER,
    hidden_activation="gelu_pytorch_tanh",
    max_position_embeddings=131072,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
    tie_word_embeddings=True,
)
THETA = {FULL: 1e6, SLIDING: 1e4}
# Names of decoders whose layers have a norm before and after attention and MLP.
GEMMA_NAMES = {path: name for path, name in LLAMA_NAMES.items() if "post_attention_layernorm" not in path} | in_layers(
    {
        "post_attention_layernorm": "pre_feedforward_layernorm",  # the norm of the MLP's input
        "attention_output_norm": "post_attention_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    }
)

TEMPLATE = Template(
    name="gemma3",
    start="<bos>",
    system="",
    system_end="",
    user="<start_of_turn>user\n",
    user_end="<end_of_turn>\n",
    assistant="<start_of_turn>model\n",
    assistant_end="<end_of_turn>\n",
    tight_image=True,
    strips=True,
    image_tokens=("\n\n<start_of_image>", "<image_soft_token>", "<end_of_image>\n\n"),
    crops="Here is the original image {image} and here are some crops to help you see better {crops}",
    by_turn=True,
    special=("<start_of_turn>", "<end_of_turn>"),
)


def _ropes(config: Mapping[str, Any]) -> dict[str, JsonDict]:
    """Return Gemma 3's `rope_parameters` by layer type, from a config of transformers 4 or 5."""
    nested = config.get("rope_parameters") or {}
    older = {
        FULL: {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})},
        SLIDING: {"rope_theta": config.get("rope_local_base_freq")},
    }
    stated = {kind: {k: v for k, v in (nested.get(kind) or older[kind]).items() if v is not None} for kind in older}
    return {kind: {"rope_type": "default", "rope_theta": THETA[kind], **fields} for kind, fields in stated.items()}


def gemma_windows(config: Mapping[str, Any]) -> list[int | None]:
    """Return each layer's sliding window size (None = full attention): by default, every sixth layer has none."""
    n_layers, pattern = int(config["num_hidden_layers"]), int(config.get("sliding_window_pattern") or 6)
    types = config.get("layer_types") or [SLIDING if (i + 1) % pattern else FULL for i in range(n_layers)]
    return windows_from_hf({**config, "use_sliding_window": True, "layer_types": types})


def _text_from_hf(config: Mapping[str, Any]) -> TextConfig:
    if config.get("use_bidirectional_attention"):
        raise UserError("use_bidirectional_attention true of Gemma 3 is not supported: such a model is an encoder")
    ropes = _ropes(config)
    return llama_like(
        {**config, "hidden_act": config["hidden_activation"], "rope_parameters": ropes[FULL]},
        _DECODER,
        windows=gemma_windows,
        biased=True,
        attention={
            "qk_norm": True,
            "scale": float(config["query_pre_attn_scalar"]) ** -0.5,
            "sees_images": True,
        },
        local={"rope": rope_from_hf({"rope_parameters": ropes[SLIDING]})},
        block={"norm_place": "both", "norm_offset": 1.0},
        embed_scale=math.sqrt(int(config["hidden_size"])),
    )


def _text_to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    ropes = _ropes(source)
    scaling = {name: value for name, value in ropes[FULL].items() if name != "rope_theta"}
    return {
        **typed_layers_to_hf(text, source),
        "rope_parameters": ropes,
        "rope_theta": ropes[FULL]["rope_theta"],
        "rope_local_base_freq": ropes[SLIDING]["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
    }


def _problem(text: TextConfig) -> str | None:
    heads = {shape.mixer.q_heads for shape in text.layers}
    wrong = sorted(count for count in heads if text.uniform and text.hidden_size % count)
    if not wrong:
        return None
    group = text.layers[0].mixer.q_heads // text.layers[0].mixer.kv_heads
    fits = [n for n in range(1, text.layers[0].mixer.kv_heads + 1) if text.hidden_size % (n * group) == 0]
    return (
        f"transformers 5 refuses {wrong[0]} heads in Gemma 3: hidden_size {text.hidden_size} is not a multiple: keep "
        f"{' or '.join(f'{n * group}/{n}' for n in fits[-3:])} (heads_multiple={max(fits)}), or all (heads='keep')"
    )


def _engine_problem(engine: str, cfg: ModelConfig) -> str | None:
    """Return why mlx-vlm, which ignores config.json's windows, would use wrong ones, with advice; None otherwise."""
    if engine != "mlx" or all((layer.mixer.window is None) == (i % 6 == 5) for i, layer in enumerate(cfg.text.layers)):
        return None
    return (
        "mlx-vlm gives every sixth layer of Gemma 3 full attention, whatever config.json says: remove layers so that "
        "this stays true (the last ones, or six in a row)"
    )


def _from_hf(config: Mapping[str, Any], _: Mapping[str, Any] | None) -> ModelConfig:
    tower = dataclasses.replace(vision_from_hf(config.get("vision_config") or {}, -1, _TOWER), post_norm=True)
    tokens, grid = int(config.get("mm_tokens_per_image") or 256), tower.grid
    side = math.isqrt(tokens)
    if side**2 != tokens or grid % side:
        raise UserError(
            f"mm_tokens_per_image {tokens} must be the square of a divisor of {grid}, the vision tower's number of "
            "patches per side"
        )
    projector = ProjectorConfig(
        activation="gelu",
        bias=False,
        kind="pool",
        norm="rms",
        norm_eps=tower.block.norm_eps,
        norm_offset=1.0,
        inputs_first=True,
        downsample=grid // side,
    )
    token = config.get("image_token_index") or 262144
    return vlm_from_hf("gemma3", config, _TEXT, tied=True, image_token=token, vision=tower, projector=projector)


# The spelling of the hub, which every version of transformers loads; 5.24 saves another one, which 4.57 ignores.
GEMMA3 = vlm_family(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    from_hf=_from_hf,
    tower=TOWERS[_TOWER],
    defaults=_TEXT,
    projector={"pool_norm": "mm_soft_emb_norm", "linear/weight": "mm_input_projection_weight"},
    prefixes=NATIVE_PREFIXES | {"vision": "vision_tower.vision_model."},
    renames=(*NATIVE_RENAMES, (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.")),
    respells=True,
    modules=HF_MODULES,
    ignored=(
        *NATIVE_UNUSED,
        r"vision_tower\.vision_model\.(head\..*|embeddings\.position_ids)",
    ),
    templates=(TEMPLATE,),
    image_processors=("Gemma3",),
    images="crops",
    decoder=Decoder(
        _DECODER,
        "Gemma3ForCausalLM",
        _text_from_hf,
        _text_to_hf,
        GEMMA_NAMES,
        defaults=_TEXT,
        heads_divide=True,
        gguf=(gguf.GEMMA3,),
        problem=_problem,
    ),
    runs_in=("vllm", "mlx", "openvino"),
    engine_problem=_engine_problem,
)
