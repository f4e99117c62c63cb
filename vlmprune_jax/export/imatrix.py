"""Importance file ("imatrix") for llama.cpp's quantiser: the weight of each input channel of each matrix.

Source: llama.cpp of October 2026, common/imatrix-loader.cpp: `NAME.in_sum2` float32[1, in], the sum of squares over all
tokens, and `NAME.counts` float32[1, 1], whole numbers, by which it divides.
"""

from __future__ import annotations

import numpy as np

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.export.format import Importance
from vlmprune_jax.export.gguf_model import GgufFile, fit, under_names
from vlmprune_jax.export.uneven import pad_tensor
from vlmprune_jax.families import family_of
from vlmprune_jax.hf.disk.tensors import Tensor
from vlmprune_jax.hf.layout import Slot, by_key, make_slots

PREFIX, SUFFIX = "imatrix-", ".gguf_file"  # not .gguf, the suffix of models


def imatrix_file(importance: Importance, model: GgufFile, cfg: ModelConfig, uneven: str) -> GgufFile:
    """Return the importance file for a GGUF file `model` of a model with `cfg`, padded if `uneven` is "pad"."""
    architecture, wide = fit(cfg, uneven)
    family = family_of(cfg)
    here = under_names(family, "text", architecture.tensors)
    before = {slot.name: slot for slot in make_slots(cfg, here)}
    slots = [
        slot for slot in make_slots(wide, here) if slot.path.startswith("text/layers/") and len(slot.hf_shape) == 2
    ]
    tensors = list[Tensor]()
    for key, parts in by_key(slots).items():
        after = parts[0]  # parts of a tensor have the same inputs
        mean = importance.means.get(after.name)
        if mean is None or mean.shape != (before[after.name].hf_shape[1],):
            raise UserError(
                f"{after.name}: the importance is not of this model: compute it for the model that is saved"
            )
        sums = _widened(mean, before[after.name], after, cfg, wide) * importance.tokens
        tensors.append(_tensor(f"{key}.in_sum2", sums[None]))
        tensors.append(_tensor(f"{key}.counts", np.full((1, 1), importance.tokens)))
    fields = {
        "type": "imatrix",
        "imatrix.datasets": ["calibration records"],
        "imatrix.chunk_count": importance.rows,
        "imatrix.chunk_size": -(-importance.tokens // importance.rows),
    }
    stem = model.name.removesuffix(".gguf").rpartition("-")[0]
    return GgufFile(f"{PREFIX}{stem}{SUFFIX}", "imatrix", fields, tensors, model.layers)


def _widened(mean: np.ndarray, before: Slot, after: Slot, cfg: ModelConfig, wide: ModelConfig) -> np.ndarray:
    """Return the channel means of a padded matrix, with zeros for padded channels."""
    if before.shape == after.shape:
        return mean
    assert before.layer is not None
    shapes = [config.text.layers[before.layer] for config in (cfg, wide)]
    inside = len(before.shape) - 1
    while np.prod(before.shape[inside:]) < mean.size:
        inside -= 1
    return pad_tensor(mean.reshape(before.shape[inside:]), before.axes[inside:], *shapes).reshape(-1)


def _tensor(key: str, values: np.ndarray) -> Tensor:
    data = np.ascontiguousarray(values, np.float32)
    return Tensor(key, "F32", data.shape, data.nbytes, lambda: data.reshape(-1).view(np.uint8))
