"""Gemma 4 (E2B, E4B, 26B-A4B, dense): a tower for images of any aspect, and layers that share keys and values.

The audio tower is not computed; exports copy its tensors unchanged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import Dense, ExpertsBesideDense
from vlmprune_jax.core.config import ModelConfig, PatchConfig, PositionTable, ProjectorConfig, TextConfig, VisionConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.mixers import NO_LAYER
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import UNUSED, vlm_family, vlm_from_hf
from vlmprune_jax.io.families.experts import expert_count, expert_names, has_experts
from vlmprune_jax.io.families.gemma3 import GEMMA_NAMES, THETA, gemma_windows
from vlmprune_jax.io.families.gemma3 import TEMPLATE as GEMMA3_TEMPLATE
from vlmprune_jax.io.families.llama_like import defaults_of, llama_like
from vlmprune_jax.io.families.shapes import FULL, PER_LAYER, SLIDING, rope_from_hf, typed_layers_to_hf
from vlmprune_jax.io.families.table import Decoder, JsonDict, in_layers
from vlmprune_jax.io.families.templates import VideoText, role_marks
from vlmprune_jax.io.families.towers import FIELDS, Tower

_DECODER = "gemma4_text"
_TEXT = defaults_of(
    _DECODER,
    hidden_activation="gelu_pytorch_tanh",
    max_position_embeddings=131072,
    sliding_window=512,
    global_head_dim=512,
    hidden_size_per_layer_input=256,
    num_kv_shared_layers=0,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
    tie_word_embeddings=True,
)
_ROPE: JsonDict = {
    SLIDING: {"rope_type": "default", "rope_theta": THETA[SLIDING]},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": THETA[FULL]},
}
_TEMPLATE = dataclasses.replace(
    GEMMA3_TEMPLATE,
    name="gemma4",
    **role_marks("<|turn>{role}\n", "<turn|>\n", assistant="model"),
    image_tokens=("\n\n<|image>", "<|image|>", "<image|>\n\n"),
    crops="",
    special=("<|turn>", "<turn|>"),
    video=VideoText("<|video|>", "{clock} <|image><|video|><image|>", start="\n\n", joint=" ", end="\n\n"),
)


def _full_heads(config: Mapping[str, Any], windows: list[int | None]) -> tuple[int, int]:
    """Return (head_dim, key/value heads) of full-attention layers, from the hub's or transformers' field names.

    Raises UserError if `per_layer_config` gives layers of one type different heads, as stale entries do.
    """
    kv_heads, other = int(config["num_key_value_heads"]), config.get("num_global_key_value_heads")
    if "per_layer_config" not in config:
        return int(config["global_head_dim"]), int(other or kv_heads) if config.get("attention_k_eq_v") else kv_heads
    usual, full_heads = {"head_dim": int(config["head_dim"]), "num_key_value_heads": kv_heads}, set[tuple[int, int]]()
    entries = {int(name): entry for name, entry in (config["per_layer_config"] or {}).items()}
    for layer, window in enumerate(windows):
        layer_heads = {**usual, **entries.pop(layer, {})}
        if layer_heads.keys() != usual.keys() or (window is not None and layer_heads != usual):
            raise UserError(
                f"per_layer_config is out of date (it gives layer {layer}, which has windowed attention, "
                f"{layer_heads}): remove it and set global_head_dim"
            )
        if window is None:
            full_heads.add((int(layer_heads["head_dim"]), int(layer_heads["num_key_value_heads"])))
    if entries or len(full_heads) > 1:
        raise UserError(
            "per_layer_config is out of date (it has "
            f"{'entries for layers that do not exist' if entries else 'different layers with full attention'}): "
            "remove it and set global_head_dim"
        )
    return full_heads.pop() if full_heads else (usual["head_dim"], kv_heads)


def _text_from_hf(config: Mapping[str, Any]) -> TextConfig:
    if config.get("use_bidirectional_attention") == "all":
        raise UserError("use_bidirectional_attention 'all' of Gemma 4 is not supported")
    n_layers, ropes = int(config["num_hidden_layers"]), config.get("rope_parameters") or _ROPE
    windows = gemma_windows(config)
    full_head_dim, full_kv_heads = _full_heads(config, windows)
    extra, double = int(config["hidden_size_per_layer_input"] or 0), bool(config.get("use_double_wide_mlp"))
    if extra and int(config.get("vocab_size_per_layer_input") or 262144) != int(config["vocab_size"]):
        raise UserError("vocab_size_per_layer_input must equal vocab_size: trim both embedding tables alike")
    text = llama_like(
        {**config, "hidden_act": config["hidden_activation"], "rope_parameters": ropes[FULL]},
        _DECODER,
        windows=gemma_windows,
        biased=True,
        attention={
            "head_dim": full_head_dim,
            "qk_norm": True,
            "v_norm": True,
            "scale": 1.0,
            "keys_as_values": bool(config.get("attention_k_eq_v")),
        },
        local={
            "head_dim": int(config["head_dim"]),
            "rope": rope_from_hf({"rope_parameters": ropes[SLIDING]}),
            "keys_as_values": False,
            "sees_images": config.get("use_bidirectional_attention") == "vision",
        },
        block={"norm_place": "both", "layer_inputs": extra, "layer_scalar": True},
        embed_scale=math.sqrt(int(config["hidden_size"])),
        logit_cap=float(config.get("final_logit_softcapping") or 0.0),
    )
    first_shared = n_layers - int(config["num_kv_shared_layers"] or 0)
    stated = config.get(PER_LAYER)

    moe = bool(config.get("enable_moe_block"))
    unequal = next((name for name in ("use_double_wide_mlp", PER_LAYER) if config.get(name)), None)
    if moe and unequal is not None:
        raise UserError(f"{unequal} is not supported with experts: give all layers equal widths and remove the field")

    def shape(i: int, layer: Layer) -> Layer:
        source = None
        if i >= first_shared:
            source = max((n for n in range(first_shared) if windows[n] == windows[i]), default=NO_LAYER)
        wide = 2 if double and source is not None else 1
        kv_heads = full_kv_heads if layer.mixer.window is None and not stated else layer.mixer.kv_heads
        neurons = layer.sizes["mlp"] * (1 if stated else wide)
        mixer = dataclasses.replace(layer.mixer, kv_heads=kv_heads, source=source)
        if not moe:
            return Layer(mixer, Dense(neurons, wide, activation=config["hidden_activation"]))
        count, active = expert_count(config), int(config["top_k_experts"])
        total, activation = count * int(config["moe_intermediate_size"]), config["hidden_activation"]
        return Layer(mixer, ExpertsBesideDense(count, total, active, mlp=neurons, activation=activation))

    text = text.with_layers([shape(i, layer) for i, layer in enumerate(text.layers)])
    problem = _problem(text)
    if problem is not None:
        raise UserError(f"transformers' Gemma 4 class does not support these layers: {problem}")
    return text


def _problem(text: TextConfig) -> str | None:
    """Return why transformers' Gemma 4 class does not support these layers, with advice; None if it does."""
    if text.layers[-1].mixer.window is not None:
        return "the last layer of Gemma 4 must have full attention (its class turns it into that): keep it"
    windows_without_source = {shape.mixer.window for shape in text.layers if shape.mixer.source == NO_LAYER}
    if windows_without_source:
        kind = "full" if None in windows_without_source else "sliding"
        return f"no layer with {kind} attention has keys and values of its own, which shared ones need: keep one"
    sharing = [shape.mixer.source is not None for shape in text.layers]
    if sharing != sorted(sharing):
        return "layers that share keys and values must follow all others"
    return None if text.uniform else "its class has one width for all layers: prune them alike, with selection local"


def _text_to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    full = [shape for shape in text.layers if shape.mixer.window is None]
    local = [shape for shape in text.layers if shape.mixer.window is not None] or full
    return {
        **typed_layers_to_hf(text, source),
        "num_key_value_heads": max(shape.mixer.kv_heads for shape in local),
        "intermediate_size": max(layer.sizes["mlp"] // layer.channel.relative_width for layer in text.layers),
        "num_kv_shared_layers": sum(shape.mixer.source is not None for shape in text.layers),
        "global_head_dim": text.attention.head_dim,
        "num_global_key_value_heads": max(s.mixer.kv_heads for s in full) if text.attention.keys_as_values else None,
    }


_LAYER = GEMMA_NAMES | {
    "layers/{i}/layer_scalar/weight": "layers.{i}.layer_scalar",
    **in_layers(
        {
            "extra/gate": "per_layer_input_gate",
            "extra/project": "per_layer_projection",
            "extra/norm": "post_per_layer_input_norm",
        }
    ),
    "extra_inputs/table": "embed_tokens_per_layer",
    "extra_inputs/project": "per_layer_model_projection",
    "extra_inputs/norm": "per_layer_projection_norm",
}
# A layer's MLP is alone, or beside its experts.
_NAMES = {
    **{place: name for path, name in _LAYER.items() for place in (path, path.replace("/mlp/", "/mlp/dense/"))},
    **expert_names("experts"),
    **in_layers(
        {
            "mlp/dense_output_norm": "post_feedforward_layernorm_1",
            "mlp/experts_norm": "pre_feedforward_layernorm_2",
            "mlp/experts_output_norm": "post_feedforward_layernorm_2",
            "mlp/router": "router.proj",
            "mlp/router_scale/weight": "router.scale",
            "mlp/expert_scale/weight": "router.per_expert_scale",
        }
    ),
}


# Clipped projections have their bounds beside `linear.weight`.
_TOWER = Tower(
    "gemma4",
    {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "pooling_kernel_size": 3,
        "patch_size": 16,
        "position_embedding_size": 10240,
        "use_clipped_linears": False,
        "standardize": False,
    },
    {
        "patch_embedding": "patch_embedder.input_proj",
        "position_embedding/weight": "patch_embedder.position_embedding_table",
        **in_layers(
            {
                "layer_norm1": "input_layernorm",
                "attention_output_norm": "post_attention_layernorm",
                "layer_norm2": "pre_feedforward_layernorm",
                "mlp_output_norm": "post_feedforward_layernorm",
                "self_attn/q_norm": "self_attn.q_norm",
                "self_attn/k_norm": "self_attn.k_norm",
                **{f"self_attn/{name}_proj": f"self_attn.{name}_proj.linear" for name in "qkv"},
                "self_attn/out_proj": "self_attn.o_proj.linear",
                **{f"mlp/{name}_proj": f"mlp.{name}_proj.linear" for name in ("gate", "up", "down")},
            },
            "encoder.layers",
        ),
    },
    fields=FIELDS | {"kv_heads": "num_key_value_heads", "activation": "hidden_activation", "norm_eps": "rms_norm_eps"},
    rope_theta=100.0,
    attention={"rope_parts": 2, "scale": 1.0, "qk_norm": True, "v_norm": True, "bias": False},
    dense={},
    block={},
    vision={"class_token": False, "pre_norm": False, "channels": 3},
)
_TYPICAL = 16  # tokens per side of a typical image: the default budget is 280 tokens


def _vision_from_hf(config: Mapping[str, Any]) -> VisionConfig:
    section = _TOWER.filled(config)
    merge = int(section["pooling_kernel_size"])
    if section.get("attention_bias"):
        raise UserError("vision tower: attention_bias true is not supported")
    return _TOWER.read(
        section,
        block={"norm_place": "both", "clips": bool(section["use_clipped_linears"])},
        image_size=_TYPICAL * merge * int(section["patch_size"]),
        merge=merge,
        positions=PositionTable(by_axis=int(section["position_embedding_size"])),
        patches=PatchConfig(temporal=1, channels_last=True, centres=True),
    )


def _from_hf(config: Mapping[str, Any], _: Mapping[str, Any] | None) -> ModelConfig:
    section = config.get("vision_config")
    if section is None:
        raise UserError("vision_config null of Gemma 4 is not supported: the model needs its vision tower")
    tower = _vision_from_hf(section)
    projector = ProjectorConfig(
        activation="gelu",
        bias=False,
        kind="pool",
        norm="rms",
        norm_eps=tower.block.norm_eps,
        plain_norm=True,
        downsample=tower.merge,
        feature_scale=math.sqrt(tower.hidden_size),
        standardizes=bool(section.get("standardize")),
    )
    video = int(config.get("video_token_id") or 258884)
    parts = {"vision": tower, "projector": projector, "video_token_id": video}
    return vlm_from_hf("gemma4", config, _TEXT, tied=True, image_token=258880, **parts)


def _engine_problem(engine: str, cfg: ModelConfig) -> str | None:
    if engine == "openvino" and cfg.text.block.layer_inputs:
        return "optimum-intel 2.2 did not convert an E model of Gemma 4: serve it with another engine"
    if engine == "openvino" and has_experts(cfg.text):
        return "optimum-intel 2.2 was not tried with experts of Gemma 4: serve it with another engine"
    return None


GEMMA4 = vlm_family(
    "gemma4",
    "Gemma4ForConditionalGeneration",
    from_hf=_from_hf,
    tower=_TOWER,
    defaults=_TEXT,
    projector={
        **{f"{name}/weight": f"vision_tower.{name}" for name in ("std_bias", "std_scale")},
        "linear": "embed_vision.embedding_projection",
    },
    prefixes={"text": "model.language_model.", "vision": "model.vision_tower.", "projector": "model."},
    ignored=(*UNUSED, r"model\.(audio_tower|embed_audio)\..*"),
    dropped=(r"model\.language_model\.layers\.\d+\.self_attn\.(k_proj|v_proj|k_norm)\.weight",),  # unused: shared keys
    templates=(_TEMPLATE,),
    image_processors=("Gemma4",),
    images="budget",
    budget_field="default_output_length",
    video=VideoConfig("starts", num_frames=32, max_soft_tokens=70, mean=(0.0,) * 3, std=(1.0,) * 3),
    decoder=Decoder(
        _DECODER,
        "Gemma4ForCausalLM",
        _text_from_hf,
        _text_to_hf,
        _NAMES,
        defaults=_TEXT,
        gguf=(gguf.GEMMA4,),
        problem=_problem,
    ),
    vllm_tpu="jax",
    runs_in=("vllm", "mlx", "openvino"),
    engine_problem=_engine_problem,
)
