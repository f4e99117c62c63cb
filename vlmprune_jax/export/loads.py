"""Loading of pruned models at their true size: support in stock transformers, vLLM, MLX, OpenVINO and llama.cpp.

The limits of each engine come from the descriptions of families, decoders and architectures. `how_known` says which of
them were tried (tools/engines/table.py) and which were read from an engine's code.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmprune_jax.core.checks import one_of
from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.part import AXES, Part
from vlmprune_jax.core.stack import Stack
from vlmprune_jax.export.gguf_fit import fit
from vlmprune_jax.export.vllm_tpu import implementation
from vlmprune_jax.families import family_of, target_of
from vlmprune_jax.families.decoders import decoder_of, layer_problem

# Engine -> the program and its version that was tried, or whose code was read.
VERSIONS = {
    "transformers": "transformers 5.24",
    "vllm": "vLLM 0.32",
    "vllm_tpu": "tpu-inference 0.32",
    "mlx": "mlx-vlm 0.7.10",
    "openvino": "optimum-intel 2.2",
    "gguf": "llama.cpp of October 2026",
}
TARGETS = tuple(VERSIONS)
_VLLM_CPU_HEADS = {32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512}  # head sizes of its attention kernels
_PAD = 'export with uneven="pad" (zeros: the same function, no savings)'
_ALIKE = f"prune all layers alike (no attn_layers and mlp_layers, selection local), or {_PAD}"


def why_not(cfg: ModelConfig, target: str, *, loader: bool = False) -> str | None:
    """Return why one of the engines in `TARGETS` cannot load a model at its true size; None if it can.

    `loader`: the model's folder has the PyTorch file that gives each decoder layer its own widths.
    """
    one_of("loads_in", target, TARGETS)
    if target == "gguf":
        try:
            fit(cfg, "per_layer")
        except UserError as error:
            return str(error)
        return None
    family, text, vision = family_of(cfg), cfg.text, cfg.vision if cfg.tower else None
    if family.layout != "transformers" and target_of(family) is None:
        return f"transformers has no class for {family.name}: leave out {target!r}"
    family = target_of(family) or family
    has_class = implementation(cfg) if target == "vllm_tpu" else target in ("transformers", *family.runs_in)
    if not has_class:
        return f"{VERSIONS[target]} has no class for {cfg.family}: serve it with another engine"
    if (problem := family.engine_problem(target, cfg)) is not None:
        return problem
    if (problem := layer_problem(text)) is not None:
        return problem
    if not text.uniform and not loader:
        return f"its class has one width for all layers: {_ALIKE}"
    heads_changed = any(mixer.q_heads * mixer.head_dim != text.hidden_size for mixer in text.attentions)
    derives = (*decoder_of(text.decoder).derives_head_dim, *family.derives_head_dim)
    if heads_changed and not loader and target in derives:
        return f'its class computes the head size of {text.decoder} as hidden_size / heads: use heads="keep"'
    if vision is not None and not vision.uniform:
        return f"its class has one width for all layers of the tower: {_ALIKE}"
    if vision is not None and not vision.whole_heads:
        return f'its class computes the head size of the tower as hidden_size / heads: use heads="keep", or {_PAD}'
    return None


def how_known(cfg: ModelConfig, target: str) -> str:
    """Return the evidence that an engine supports a model's family: tried, or read from the engine's code."""
    family = target_of(family_of(cfg)) or family_of(cfg)
    remarks = {"transformers": "", "gguf": "", **family.tried}
    if target not in remarks:
        return f"by the code of {VERSIONS[target]}"
    remark, refused = remarks[target], {mixer.head_dim for mixer in cfg.text.attentions} - _VLLM_CPU_HEADS
    if target == "vllm" and refused:
        heads = f"on CPUs, heads of {max(refused)} need export.head_dim"
        remark = f"{remark}; {heads}" if remark else heads
    return f"tried with {VERSIONS[target]}" + (f": {remark}" if remark else "")


def keeps_heads(cfg: ModelConfig, stack: str, targets: Sequence[str]) -> bool:
    """Return True if an engine in `targets` can load the model only if all heads of this stack are kept."""
    fewer = cfg.with_layers(_fewer_heads(cfg.stack(stack)), stack)
    if layer_problem(cfg.text) is None and layer_problem(fewer.text) is not None:
        return True
    return any(why_not(cfg, target) is None and why_not(fewer, target) is not None for target in targets)


def check_loads(cfg: ModelConfig, targets: Sequence[str]) -> None:
    """Raise UserError if one of the `targets` cannot load a pruned model at its true size."""
    for target in targets:
        reason = why_not(cfg, target)
        if reason is not None:
            raise UserError(f"loads_in={target!r}: this engine could not load the pruned model: {reason}")


def what_loads(cfg: ModelConfig) -> dict[str, dict[str, dict[str, str | None]]]:
    """Return {engine: {stack: {type of pruning: why the engine cannot load the pruned model, or None}}}."""
    copies = {name: _copies(stack) for name, stack in cfg.stacks.items()}
    return {
        target: {
            stack: {kind: _why_not_copy(cfg, stack, layers, target) for kind, layers in kinds.items()}
            for stack, kinds in copies.items()
        }
        for target in TARGETS
    }


def _why_not_copy(cfg: ModelConfig, stack: str, layers: Sequence[Layer], target: str) -> str | None:
    """Return why an engine cannot load the model with these layers, or why no class allows them; None if it can."""
    try:
        changed = cfg.with_layers(layers, stack)
    except UserError as error:
        return str(error)
    return layer_problem(changed.text) or why_not(changed, target)


# Smallest prunings of each type -----------------------------------------------------------------------------


def _copies(stack: Stack) -> dict[str, list[Layer]]:
    """Return {type of pruning: the stack's layers after the smallest pruning of this type}."""
    first, *others = stack.layers
    return {
        "fewer layers": _fewer_layers(stack),
        AXES[first.channel.root].title: [_without(layer, layer.channel) for layer in stack.layers],
        "heads": _fewer_heads(stack),
        "unequal widths": [_without(first, first.channel, 1), *others],
    }


def _fewer_layers(stack: Stack) -> list[Layer]:
    """Remove one layer: the last one without which the decoder's transformers class still supports the others."""
    cuts = [[*stack.layers[:i], *stack.layers[i + 1 :]] for i in reversed(range(len(stack.layers)))]
    fits = (left for left in cuts if left and _fits(stack, left))
    return next(fits, cuts[0] or [*stack.layers])


def _fits(stack: Stack, layers: Sequence[Layer]) -> bool:
    return not isinstance(stack, TextConfig) or layer_problem(stack.with_layers(layers)) is None


def _fewer_heads(stack: Stack) -> list[Layer]:
    return [_without(layer, layer.mixer) if layer.mixer.root else layer for layer in stack.layers]


def _without(layer: Layer, part: Part, units: int | None = None) -> Layer:
    """Remove one unit (or `units`), with its child units, from a part of the layer; keep at least one unit."""
    fewer = layer.sizes[part.root] - (part.relative_width if units is None else units)
    return layer.resized(layer.completed({part.root: max(1, fewer)}))
