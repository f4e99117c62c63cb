"""Choice of the llama.cpp architecture and zero-padding for a model, or the reason why none supports it."""

from __future__ import annotations

import dataclasses

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.io.exports.uneven import padded
from vlmprune_jax.io.families.decoders import decoder_of
from vlmprune_jax.io.families.gguf import Architecture
from vlmprune_jax.io.families.gguf_towers import tower_misfit
from vlmprune_jax.io.families.limits import architectures_of, misfit, uneven_problem


def fit(cfg: ModelConfig, uneven: str) -> tuple[Architecture, ModelConfig]:
    """Return llama.cpp's architecture for a model, and the model config after zero-padding if `uneven` is "pad"."""
    able = architectures_of(cfg)
    text, vision = cfg.text, cfg.vision
    if uneven == "pad":
        text = _padded_text(text, able[0])
        if vision is not None:
            heads = vision.hidden_size // vision.attention.head_dim
            whole = {"q_heads": heads, "kv_heads": heads}
            vision = vision.with_layers([layer.resized(whole) for layer in vision.layers])
    chosen = next((candidate for candidate in able if candidate.misfit(text) is None), None)
    problem = None if vision is None else tower_misfit(vision)
    if chosen is None or (uneven == "refuse" and not text.uniform):
        problem = able[0].misfit(text)
    if problem is not None:
        raise UserError(misfit(able[0], problem))
    assert chosen is not None
    return chosen, dataclasses.replace(cfg, text=text, vision=vision)


def support(cfg: ModelConfig) -> str:
    """Return a text that says which pruned versions of a model llama.cpp can load."""
    try:
        architecture, _ = fit(cfg, "pad")
    except UserError as error:
        return str(error)
    able = [candidate for candidate in decoder_of(cfg.text.decoder).gguf if candidate.lacks(cfg.text) is None]
    wide = next((candidate.name for candidate in able if candidate.per_layer), None)
    heads = next((candidate.name for candidate in able if candidate.free_heads), None)
    unequal = "" if uneven_problem(cfg.text) else f", unequal widths {_held(wide)}"
    return f"llama.cpp's {architecture.name}; fewer heads {_held(heads)}{unequal}" + (
        "; tower: all heads, or uneven=pad" if cfg.vision is not None else ""
    )


def _held(name: str | None) -> str:
    return "with uneven=pad only" if name is None else f"at true size ({name})"


def _padded_text(text: TextConfig, architecture: Architecture) -> TextConfig:
    if architecture.misfit(text) is None:
        return text
    whole = None if architecture.free_heads else text.hidden_size // text.attention.head_dim
    wide = text.with_layers(padded(text.layers, whole))
    if architecture.misfit(wide) is not None:
        raise UserError(
            f"llama.cpp's {architecture.name} needs {whole} heads in equal groups in every layer, which zero "
            "heads cannot make of these: prune without removing heads"
        )
    return wide
