"""Limits of vLLM on TPUs, read from tpu-inference 0.32 and not run on a TPU."""

from __future__ import annotations

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.limits import Limit
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import SCHEMES, CompressedTensors
from vlmprune_jax.io.families.limits import implementation

_TENSOR_SIZES = (1, 2, 4, 8, 16)
_WIDE = 128  # groups of 4-bit weights from this size on need the MXU of v6e, of 256 columns


def check_storage(cfg: ModelConfig, storage: CompressedTensors, tensor: int) -> None:
    """Raise UserError if vLLM on TPUs cannot load these integer weights with this tensor-parallel size."""
    reason = _problem(cfg, storage, tensor)
    if reason is not None:
        raise UserError(f"loads_in='vllm_tpu': vLLM on TPUs could not load {storage.name} weights: {reason}")


def facts(cfg: ModelConfig, storage: CompressedTensors | None = None) -> str:
    """Return text on vLLM on TPUs: supported tensor-parallel sizes, head padding and integer formats."""
    properties = [f"tensor-parallel sizes {', '.join(map(str, _tensor_sizes(cfg)))}"]
    properties += [f"heads of {size} channels padded to {computed}" for size, computed in _padded(cfg).items()]
    if storage is None:
        return "; ".join([*properties, f"integers: {_integers(cfg) or 'none'}"])
    wide = f"groups of {storage.group} need v6e or newer" if storage.bits == 4 and storage.group >= _WIDE else ""
    return "; ".join([*properties, _problem(cfg, storage, 1) or wide or "these integers load"])


def _tensor_sizes(cfg: ModelConfig) -> list[int]:
    """Return the possible tensor-parallel sizes: chips over which all layers' heads can be split."""
    query = {mixer.q_heads for stack in cfg.stacks.values() for mixer in stack.attentions}
    keys = {mixer.kv_heads for mixer in cfg.text.attentions}
    fits = lambda size: not any(heads % size for heads in query)  # noqa: E731
    return [n for n in _TENSOR_SIZES if fits(n) and not any(max(heads, n) % min(heads, n) for heads in keys)]


def _padded(cfg: ModelConfig) -> dict[int, int]:
    """Return {head_dim: padded head_dim} for head sizes that vLLM's TPU kernels pad."""
    sizes = sorted({mixer.head_dim for mixer in cfg.text.attentions})
    return {size: -(-size // 128) * 128 for size in sizes if size != 64 and size % 128}


def _integers(cfg: ModelConfig) -> str:
    """Return the quantisations that vLLM on TPUs can load, as text."""
    stored = {name: CompressedTensors(bits, activations=activations) for name, (bits, activations) in SCHEMES.items()}
    return ", ".join(name for name, storage in stored.items() if _scheme_problem(cfg, storage) is None)


def _problem(cfg: ModelConfig, storage: CompressedTensors, tensor: int) -> str | None:
    """Return why vLLM on TPUs cannot load these integer weights, with advice; None if it can."""
    problem, loads = _scheme_problem(cfg, storage), _integers(cfg)
    if problem is not None:
        return f"{problem}: " + (f"use symmetric {loads}" if loads else 'use quantize="none"')
    if storage.bits != 4:
        return None
    needed = f"each of {tensor} chips needs whole key/value heads and groups of {storage.group}"
    needed += ": use a smaller group_size or tensor_parallel"
    heads = Limit("vllm_tpu", needed, axes=("kv_heads",), multiple=tensor)
    widths = [cfg.text.hidden_size]
    for layer in cfg.text.layers:
        split = (layer.mixer.q_heads * layer.mixer.head_dim, *layer.channel.neuron_counts)
        widths += [width // tensor for width in split]
    fits = heads.holds(cfg) and not any(width % (storage.group or width) for width in widths)
    return None if fits else needed


def _scheme_problem(cfg: ModelConfig, storage: CompressedTensors) -> str | None:
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
    return "w4a16 does not load with padded heads" if _padded(cfg) else None
