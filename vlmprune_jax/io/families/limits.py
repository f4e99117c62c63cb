"""Engines that load exported models, and their limits for every family: transformers, vLLM, MLX, OpenVINO, llama.cpp.

The limits come from the declarations of families, decoders and architectures; docs/explanation/results.md says which of
them were tried (tools/engines/table.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer, Stack, keep_layers
from vlmprune_jax.core.limits import ENGINES, Engine, Limit, first_unmet, why_no_class, why_not
from vlmprune_jax.core.part import AXES
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.io.families.decoders import decoder_of
from vlmprune_jax.io.families.gguf import Architecture
from vlmprune_jax.io.families.gguf_towers import tower_lacks
from vlmprune_jax.io.families.table import FAMILIES, family_of, target_of

PAD = 'export with uneven="pad" (zeros: the same function, no savings)'
_ALIKE = f"prune all layers alike (no attn_layers and mlp_layers, selection local), or {PAD}"


def limits_of(cfg: ModelConfig, engine: str, *, loader: bool = False) -> Iterator[Limit]:
    """Yield the limits of an engine that loads Hugging Face folders, most general first.

    `loader`: the model's folder has the PyTorch file that gives each decoder layer its own widths.
    """
    family = family_of(cfg)
    if family.layout != "transformers" and target_of(family) is None:
        yield never(engine, f"transformers has no class for {family.name}: leave out {engine!r}")
        return
    family = target_of(family) or family
    has_class = implementation(cfg) if engine == "vllm_tpu" else engine in ("transformers", *family.runs_in)
    if not has_class:
        yield never(engine, f"{ENGINES[engine].version} has no class for {cfg.family}: serve it with another engine")
    if (problem := family.engine_problem(engine, cfg)) is not None:
        yield never(engine, problem)
    yield from _of_class(cfg)
    if not loader:
        yield Limit(engine, f"its class has one width for all layers: {_ALIKE}", equal=True)
        if engine in (*decoder_of(cfg.text.decoder).derives_head_dim, *family.derives_head_dim):
            heads = f"its class computes the head size of {cfg.text.decoder} as hidden_size / heads"
            yield Limit(engine, f'{heads}: use heads="keep"', axes=("q_heads",), allowed=_whole_heads(cfg.text))
    if cfg.vision is not None and cfg.tower:
        heads = f'its class computes the head size of the tower as hidden_size / heads: use heads="keep", or {PAD}'
        yield Limit(engine, f"its class has one width for all layers of the tower: {_ALIKE}", "vision", equal=True)
        yield Limit(engine, heads, "vision", axes=("q_heads",), allowed=_whole_heads(cfg.vision))


def never(engine: str, why: str) -> Limit:
    """Return the limit of an engine that cannot load a model in any size."""
    return Limit(engine, why, allowed=())


def _whole_heads(stack: Stack) -> set[int]:
    """Return the numbers of query heads with which heads x head_dim is the hidden size."""
    return {stack.hidden_size // mixer.head_dim for mixer in stack.attentions}


def _of_class(cfg: ModelConfig) -> Iterator[Limit]:
    decoders = [f.decoder for f in FAMILIES.values() if f.decoder is not None]
    known = [decoder for decoder in decoders if decoder.model_type == cfg.text.decoder]
    if known and (problem := known[-1].problem(cfg.text)) is not None:
        yield never("transformers", problem)


def implementation(cfg: ModelConfig) -> str:
    """Return how vLLM on TPUs runs the exported model: "jax", "torchax", or "" if it cannot."""
    family, text = family_of(cfg), cfg.text
    backend = (target_of(family) or family).vllm_tpu
    mistral = decoder_of(text.decoder).heads_divide and text.hidden_size % text.attention.q_heads
    return "torchax" if backend and mistral else backend


# llama.cpp ----------------------------------------------------------------------------------------------------------


def architectures_of(cfg: ModelConfig) -> list[Architecture]:
    """Return llama.cpp's architectures that compute a model, in order of preference.

    Raises UserError if there is none, or llama.cpp cannot compute the vision tower.
    """
    decoder = decoder_of(cfg.text.decoder)
    if not decoder.gguf:
        raise UserError(
            f"family {cfg.family}: GGUF export does not support decoder {cfg.text.decoder!r}: use another format"
        )
    able = [candidate for candidate in decoder.gguf if candidate.lacks(cfg.text) is None]
    if not able:
        first = decoder.gguf[0]
        raise UserError(
            f"llama.cpp's {first.name} has no {first.lacks(cfg.text)}: this model cannot be exported to GGUF"
        )
    misplaced = None if able[0].windows is None else able[0].windows(cfg.text)
    if misplaced is not None:
        raise UserError(f"llama.cpp's {able[0].name} cannot run these layers, since it has no {misplaced}")
    if cfg.vision is not None:
        if (lacks := tower_lacks(cfg)) is not None:
            raise UserError(f"llama.cpp has no {lacks}: this model cannot be exported to GGUF")
        if not cfg.tower:
            raise UserError("the model was loaded without its vision tower: load the tower too for an export to GGUF")
    return able


def width_limits(architecture: Architecture, cfg: ModelConfig) -> Iterator[Limit]:
    """Yield the limits of a llama.cpp architecture on the widths of decoder layers, which zero-padding lifts."""
    if not architecture.per_layer:
        yield _gguf_limit(architecture, "layers of unequal width", equal=True)
    if not architecture.free_heads:
        heads = cfg.text.hidden_size // cfg.text.attention.head_dim
        lacking = f"other numbers of heads than hidden_size / head_dim ({heads})"
        yield _gguf_limit(architecture, lacking, axes=("q_heads",), allowed=_whole_heads(cfg.text))


def tower_limit(architecture: Architecture, cfg: ModelConfig) -> Limit:
    """Return the limit of llama.cpp on the heads of a vision tower, which zero-padding lifts."""
    lacking = "a vision tower whose heads x head_dim differ from its width"
    heads = () if cfg.vision is None else _whole_heads(cfg.vision)
    return _gguf_limit(architecture, lacking, component="vision", axes=("q_heads",), allowed=heads)


def _gguf_limit(architecture: Architecture, lacking: str, **condition: Any) -> Limit:
    advice = f"prune all layers alike and keep the heads, or {PAD}"
    return Limit("gguf", f"llama.cpp's {architecture.name} has no {lacking}: {advice}", **condition)


def _gguf_limits(cfg: ModelConfig) -> Iterator[Limit]:
    try:
        able = architectures_of(cfg)
    except UserError as error:
        yield never("gguf", str(error))
        return
    rows = [[*width_limits(architecture, cfg)] for architecture in able]
    yield from next((limits for limits in rows if first_unmet(limits, cfg) is None), rows[0])
    yield tower_limit(able[0], cfg)


ENGINES.update(
    {
        "transformers": Engine("transformers 5.24", functools.partial(limits_of, engine="transformers"), _of_class),
        "vllm": Engine("vLLM 0.32", functools.partial(limits_of, engine="vllm")),
        "vllm_tpu": Engine("tpu-inference 0.32", functools.partial(limits_of, engine="vllm_tpu")),
        "mlx": Engine("mlx-vlm 0.7.10", functools.partial(limits_of, engine="mlx")),
        "openvino": Engine("optimum-intel 2.2", functools.partial(limits_of, engine="openvino")),
        "gguf": Engine("llama.cpp of October 2026", _gguf_limits),
    }
)


# Reading the rows ---------------------------------------------------------------------------------------------------


def why_not_in_transformers(cfg: ModelConfig, *, loader: bool) -> str | None:
    """Return why transformers cannot load a folder; `loader`: it has the PyTorch file for layers of unequal width."""
    return first_unmet(limits_of(cfg, "transformers", loader=loader), cfg)


def what_loads(cfg: ModelConfig) -> dict[str, dict[str, dict[str, str | None]]]:
    """Return {engine: {stack: {type of pruning: why the engine cannot load the pruned model, or None}}}."""
    loads: dict[str, dict[str, dict[str, str | None]]] = {}
    for stack in cfg.stacks:
        for kind, layers in _copies(cfg, stack).items():
            try:
                pruned = cfg.with_layers(layers, stack)
                problem = why_no_class(pruned)
            except UserError as error:
                pruned, problem = cfg, str(error)
            for engine in ENGINES:
                kinds = loads.setdefault(engine, {}).setdefault(stack, {})
                kinds[kind] = problem or why_not(pruned, engine)
    return loads


def _copies(cfg: ModelConfig, name: str) -> dict[str, list[Layer]]:
    """Return {type of pruning: the stack's layers after the smallest pruning of this type}."""
    first, *others = layers = cfg.stack(name).layers
    return {
        "fewer layers": _fewer_layers(cfg, name),
        AXES[first.channel.root].title: [layer.smaller(layer.channel.root) for layer in layers],
        "heads": [layer.smaller(layer.mixer.root) if layer.mixer.root else layer for layer in layers],
        "unequal widths": [first.smaller(first.channel.root, 1), *others],
    }


def _fewer_layers(cfg: ModelConfig, name: str) -> list[Layer]:
    """Remove one layer: the last one without which the model's class still supports the others."""
    layers = cfg.stack(name).layers
    numbers = range(len(layers))
    cuts = [[*keep_layers(layers, [n for n in numbers if n != removed])] for removed in reversed(numbers)]
    fits = (left for left in cuts if left and (name != "text" or why_no_class(cfg.with_layers(left, name)) is None))
    return next(fits, cuts[0] or [*layers])


def unusual_counts(plan: PrunePlan, cfg: ModelConfig) -> str | None:
    """Return a notice if engines serve the remaining number of some units by a slower path; None otherwise."""
    for axis in (axis for axis in AXES.values() if axis.multiple):
        count, multiple = plan.options.get(axis.name), plan.options.get(axis.multiple) or 1
        if count is not None and count % multiple:
            return (
                f"{count} {axis.title} per layer are not a multiple of {multiple}: vLLM serves them by a slower path, "
                "and expert parallelism needs a number that is divisible by the number of devices"
            )
    return None
