"""Writing of a GGUF file: header and tensors, with one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlmprune_jax.core.files import read_bytes
from vlmprune_jax.export.gguf_model import GgufFile
from vlmprune_jax.hf.disk.verified import CheckedFile

_ALIGNMENT = 32


def write_gguf(content: GgufFile, folder: Path) -> None:
    """Write a file with one tensor in memory at a time; every block is read back and compared."""
    with CheckedFile(folder / content.name) as file:
        header = _header(content, folder)
        file.write(header + bytes(-len(header) % _ALIGNMENT))
        for tensor in content.tensors:
            data = tensor.fetch()
            assert data.nbytes == tensor.n_bytes, f"{tensor.key}: {data.nbytes} bytes, {tensor.n_bytes} announced"
            file.write(data)
            file.write(bytes(-data.nbytes % _ALIGNMENT))


def _header(content: GgufFile, folder: Path) -> bytes:
    """Return all bytes before the tensors (gguf can only write them to a file, which would not be verified)."""
    from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType

    writer = GGUFWriter(None, content.architecture)
    for name, value in content.fields.items():
        if "." in name:
            (writer.add_array if isinstance(value, list) else writer.add_uint32)(name, value)
        else:
            getattr(writer, f"add_{name}")(RopeScalingType(value) if name == "rope_scaling_type" else value)
    for tensor in content.tensors:
        kind = GGMLQuantizationType[tensor.dtype]
        writer.add_tensor_info(tensor.key, tensor.shape, np.dtype(np.float32), tensor.n_bytes, kind)
    path = folder / f"{content.name}.header"
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return read_bytes(path)
    finally:
        path.unlink(missing_ok=True)
