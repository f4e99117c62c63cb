"""Integer storage that fits a model: group sizes, matrices, engines, and rounding in training as in the checkpoint."""

from __future__ import annotations

import functools

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.limits import Limit
from vlmprune_jax.core.models.fake_quant import FAKE_QUANTS
from vlmprune_jax.core.sections import FakeQuant
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import (
    GROUPS,
    SCHEMES,
    CompressedTensors,
    check_scheme,
    is_matrix,
)
from vlmprune_jax.io.checkpoints.layout import Slot, make_slots
from vlmprune_jax.io.families import family_of
from vlmprune_jax.io.families.experts import with_separate_experts
from vlmprune_jax.io.families.limits import implementation
from vlmprune_jax.io.families.table import Family


def make_storage(
    cfg: ModelConfig, family: Family, quantize: str, group_size: int | None, symmetric: bool
) -> CompressedTensors:
    """Return the integer storage format for a checkpoint with layers of these widths.

    Without `group_size`, 8-bit weights have one scale per row, and 4-bit weights have the largest group size that
    divides every row. If no group size does, the smallest is used, and matrices whose rows it does not divide remain
    unquantised.

    Raises UserError if `group_size` does not divide every row, or no group size divides any row.
    """
    check_scheme(quantize, group_size, symmetric)
    bits, activations = SCHEMES[quantize]
    widths = {slot.name: slot.hf_shape[1] for slot in matrices(cfg, family)}
    largest = next((size for size in GROUPS if not any(width % size for width in widths.values())), None)
    if group_size is not None:
        instead = f"use {largest}" if largest else "leave it out (rows that do not divide stay plain)"
        wrong = [name for name, width in widths.items() if width % group_size]
        if wrong:
            raise UserError(
                f"group_size={group_size} does not divide the {widths[wrong[0]]} values of a row of {wrong[0]} "
                f"({len(wrong)} matrices in total): {instead}, or prune with "
                'align_to="int4"'
            )
    elif bits == 4:
        group_size = largest or GROUPS[-1]
        if all(width % group_size for width in widths.values()):
            raise UserError(
                f"w4a16: no row length of this model is a multiple of {group_size}: use w8a16, which has one scale "
                "per row"
            )
    return CompressedTensors(bits, group_size or 0, symmetric, activations)


def matrices(cfg: ModelConfig, family: Family) -> list[Slot]:
    """Return the checkpoint locations (`Slot`) of the decoder's matrices that integers may replace."""
    slots = make_slots(cfg, with_separate_experts(family))
    return [slot for slot in slots if is_matrix(slot.name, slot.hf_shape)]


def check_on_tpus(cfg: ModelConfig, storage: CompressedTensors, chips: int) -> None:
    """Raise UserError if vLLM on TPUs (tpu-inference 0.32, not run there) cannot load these integers on many chips."""
    problem = _tpu_problem(cfg, storage)
    if problem is not None:
        schemes = {name: CompressedTensors(bits, activations=rounds) for name, (bits, rounds) in SCHEMES.items()}
        loads = ", ".join(name for name, other in schemes.items() if _tpu_problem(cfg, other) is None)
        problem += f": use symmetric {loads}" if loads else ': use quantize="none"'
    elif storage.bits == 4:
        widths = [cfg.text.hidden_size]
        for layer in cfg.text.layers:
            split = (layer.mixer.q_heads * layer.mixer.head_dim, *layer.channel.neuron_counts)
            widths += [width // chips for width in split]
        heads = Limit("vllm_tpu", "", axes=("kv_heads",), multiple=chips)
        if not heads.holds(cfg) or any(width % (storage.group or width) for width in widths):
            problem = f"each of {chips} chips needs whole key/value heads and groups of {storage.group}"
            problem += ": use a smaller group_size or tensor_parallel"
    if problem is not None:
        raise UserError(f"loads_in='vllm_tpu': vLLM on TPUs could not load {storage.name} weights: {problem}")


def _tpu_problem(cfg: ModelConfig, storage: CompressedTensors) -> str | None:
    """Return why vLLM on TPUs loads these integers on no number of chips; None if it does."""
    text, native = cfg.text, implementation(cfg) == "jax"
    if storage.activations:
        return f"w8a8 does not load in the JAX class of {cfg.family}" if native else None
    if storage.bits == 8:
        return "w8a16 loads in no class"
    if not native:
        return f"w4a16 does not load in the PyTorch class of {cfg.family}"
    if not storage.symmetric:
        return "zero points do not load"
    if text.attention.bias or text.attention.out_bias or text.channel.bias:
        return "w4a16 does not load with biases"
    padded = any(mixer.head_dim != 64 and mixer.head_dim % 128 for mixer in text.attentions)
    return "w4a16 does not load with padded heads" if padded else None


def fake_quant(cfg: ModelConfig, scheme: str) -> FakeQuant:
    """Return the rounding in training for a checkpoint with a scheme's default group size and no zero points."""
    storage = make_storage(cfg, family_of(cfg), scheme, None, True)
    return FakeQuant(storage.bits, storage.group, storage.activations)


FAKE_QUANTS.update({scheme: functools.partial(fake_quant, scheme=scheme) for scheme in SCHEMES})
