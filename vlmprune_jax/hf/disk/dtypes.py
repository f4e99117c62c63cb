"""Dtypes by their names in weight files and configs: one table, and others derived from it."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

# Dtypes of safetensors headers.
FILE_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    }.items()
}  # fmt: skip
# Dtypes of weights; others belong to storages or to buffers that are copied as bytes.
WEIGHT_DTYPES = {name: FILE_DTYPES[name] for name in ("F32", "F16", "BF16")}
# The same by their names in settings, configs, numpy and torch.
DTYPES = {FILE_DTYPES[name].name: FILE_DTYPES[name] for name in ("F32", "BF16", "F16")}
# Choices for the weights of a new folder: "source" keeps the dtype of each tensor.
WRITTEN = (*DTYPES, "source")


def file_name(dtype: str) -> str:
    """Return the name in weight files of a numpy or torch dtype ("BF16" for "bfloat16"), or the name itself."""
    return next((name for name, known in FILE_DTYPES.items() if known.name == dtype), dtype)


def bytes_in_file(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size in bytes of a tensor with a dtype of `FILE_DTYPES`."""
    return math.prod(shape) * FILE_DTYPES[dtype].itemsize
